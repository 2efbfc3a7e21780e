"""The sinks of one layer before the rotation of a step, from which every step computes its own."""

from __future__ import annotations

from typing import NamedTuple

import torch

from patchkit.anatomy.rotary import Rotary
from patchkit.prefix.written_state import part_of_state


@part_of_state
class UnrotatedSinks(NamedTuple):
    """The rotated dimensions of the sinks, at their row positions; ``raw cos t + quarter sin t`` rotates them by the angle t.

    Attributes:
        raw: [B, G, S, n] float32.
        quarter: [B, G, S, n] float32, ``raw`` rotated by a right angle.
    """

    raw: torch.Tensor
    quarter: torch.Tensor

    @classmethod
    def of(cls, part: torch.Tensor, rotary: Rotary) -> UnrotatedSinks:
        """Make a float32 copy of ``part`` [B, G, S, n], the rotated dimensions of sinks at their row positions."""
        raw = part.float().clone()
        return cls(raw, rotary.quarter_rotated(raw))

    def update_quarter(self, rotary: Rotary) -> None:
        """Compute ``quarter`` again, in place, after a write to ``raw``."""
        self.quarter.copy_(rotary.quarter_rotated(self.raw))
