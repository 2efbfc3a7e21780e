"""Weights as groups of inputs, in units that bring scales and minima into fp16's range.

Shapes: N outputs, G groups, g inputs of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

# Levels are 0 to 15; of a symmetric weight, the middle one stands for 0.
LARGEST, MIDDLE = 15, 8
# Exponent of a row's largest weight in its unit: far below fp16's largest number, and 25 binades above its smallest normal one.
_EXPONENT = 11


class Grouped(NamedTuple):
    """Levels of groups of weights.

    Attributes:
        levels: [..., g] float32, whole numbers from 0 to 15.
        scale: [...] fp16.
        minimum: [...] fp16, or None for a symmetric weight.
    """

    levels: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None

    def values(self) -> torch.Tensor:
        """The weights [..., g] in float32 that the levels stand for."""
        if self.minimum is None:
            return (self.levels - MIDDLE) * self.scale.float()[..., None]
        return self.levels * self.scale.float()[..., None] + self.minimum.float()[..., None]

    def put(self, where: torch.Tensor, other: Grouped, chosen: torch.Tensor) -> None:
        """Overwrite the groups at the indices ``where`` with those of ``other`` at ``chosen``."""
        for mine, theirs in zip(self, other, strict=True):
            if mine is not None and theirs is not None:
                mine[where] = theirs[chosen]


def nearest(groups: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> Grouped:
    """The nearest levels of ``groups`` [..., g] float32 on grids of ``scale`` [...] and ``minimum`` [...] (or None), in fp16; ties to even.

    Where a scale is 0, all levels stand for the same value.
    """
    step = scale.float()[..., None]
    shifted = groups if minimum is None else groups - minimum.float()[..., None]
    steps = torch.where(step == 0, 0.0, shifted / step)
    return Grouped((steps + (MIDDLE if minimum is None else 0)).round_().clamp_(0, LARGEST), scale, minimum)


def unit_of(rows: torch.Tensor) -> torch.Tensor:
    """A power of two for each row [N, K] float32 of a weight: [N] float32. The row's largest weight is 1024 to 2048 times that."""
    largest = rows.abs().amax(1)
    exponent = torch.frexp(largest)[1].clamp(min=_EXPONENT - 126) - _EXPONENT
    ordinary = largest.isfinite() & (largest > 0)
    return torch.where(ordinary, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


def groups_of(rows: torch.Tensor, unit: torch.Tensor, group: int) -> torch.Tensor:
    """The weights [N, G, group] in float32 of ``rows`` [N, K], in ``unit`` [N]; a last group that is not full repeats its last weight."""
    scaled = rows / unit[:, None]
    missing = -rows.shape[1] % group
    return (F.pad(scaled, (0, missing), mode="replicate") if missing else scaled).unflatten(1, (-1, group))
