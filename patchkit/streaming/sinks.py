"""The sinks of one layer without their rotation, from which each step computes the rotation that it needs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from patchkit.anatomy.rotary import Rotary


class UnrotatedSinks(NamedTuple):
    """The dimensions of the sinks that the rotary embedding rotates, at row position 0 of their own: ``raw cos t + quarter sin t``
    is their rotation by the angle t.

    Attributes:
        raw: [B, G, S, n] float32.
        quarter: [B, G, S, n] float32, ``raw`` rotated by a right angle.
    """

    raw: torch.Tensor
    quarter: torch.Tensor

    @classmethod
    def of(cls, part: torch.Tensor, rotary: Rotary) -> UnrotatedSinks:
        """A float32 copy of ``part`` [B, G, S, n], the rotated dimensions of sinks that are not rotated."""
        raw = part.float().clone()
        return cls(raw, rotary.quarter_rotated(raw))

    def update_quarter(self, rotary: Rotary) -> None:
        """Compute ``quarter`` again, in place, after a write to ``raw``."""
        self.quarter.copy_(rotary.quarter_rotated(self.raw))
