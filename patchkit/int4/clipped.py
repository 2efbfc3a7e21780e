"""Rounding to the nearest level of a grid that is narrower than its group: the one of a few widths with the smallest squared error."""

from __future__ import annotations

import torch

from patchkit.int4.grouped import LARGEST, MIDDLE, Grouped, nearest

# Widths of the grid that are tried, relative to the range of a group's weights. The largest weights are clipped where it is narrower.
WIDTHS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Groups at once, so that they stay in the processor's caches.
_AT_ONCE = 1 << 13


def clipped(groups: torch.Tensor, symmetric: bool) -> Grouped:
    """Round ``groups`` [M, g] float32 with the smallest squared error (differences in float32, their sums in float64).

    The scale and minimum of each grid are those of least squares for its levels. A group with an inf or a NaN has NaN as its scale.
    """
    parts = [_best(part, symmetric) for part in groups.split(_AT_ONCE)]
    levels, scales, minima = zip(*parts, strict=True)
    return Grouped(torch.cat(levels), torch.cat(scales), None if symmetric else torch.cat(minima))


def _best(groups: torch.Tensor, symmetric: bool) -> Grouped:
    best, least = _narrowed(groups, 1.0, symmetric), None
    for width in WIDTHS:
        first = _narrowed(groups, width, symmetric)
        tried = nearest(groups, *least_squares(groups, first))
        error = squared_error(groups, tried)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        best.put(better, tried, better)
        least = error if least is None else torch.minimum(error, least)
    strange = ~groups.isfinite().all(1)
    best.levels[strange], best.scale[strange] = 0, torch.nan
    return best


def _narrowed(groups: torch.Tensor, width: float, symmetric: bool) -> Grouped:
    """The nearest levels of a grid that has ``width`` of the range of its group."""
    if symmetric:
        # The weight of the largest magnitude has the level that has no mirror image, and its sign gives the scale its own.
        extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))[:, 0]
        return nearest(groups, (-width * extreme / MIDDLE).half(), None)
    low, high = groups.aminmax(dim=1)
    narrower = (1 - width) / 2 * (high - low)
    return nearest(groups, (width * (high - low) / LARGEST).half(), (low + narrower).half())


def least_squares(groups: torch.Tensor, rounded: Grouped) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale and the minimum with which the levels of ``rounded`` have the smallest squared error.

    Products are in float32, their sums in float64.
    """
    if rounded.minimum is None:
        levels = rounded.levels - MIDDLE
        square = _mean(levels.square())
        return torch.where(square > 0, _half(_mean(levels * groups) / square), rounded.scale), None
    levels = rounded.levels
    level, weight = _mean(levels), _mean(groups)
    spread = _mean(levels.square()) - level.square()
    scale = _half(torch.where(spread > 0, (_mean(levels * groups) - level * weight) / spread, rounded.scale.double()))
    return scale, _half(weight - scale.double() * level)


def _mean(products: torch.Tensor) -> torch.Tensor:
    return products.sum(1, dtype=torch.float64) / products.shape[1]


def _half(wide: torch.Tensor) -> torch.Tensor:
    return wide.float().half()  # what torch does too, said openly: each step rounds


def squared_error(groups: torch.Tensor, rounded: Grouped) -> torch.Tensor:
    """Squared error [M] float64 of groups [M, g]."""
    return (groups - rounded.values()).square_().sum(1, dtype=torch.float64)
