"""Rounding to the nearest level of a grid that is narrower than its group: the one of a few widths with the smallest squared error."""

from __future__ import annotations

import torch

from patchkit.int4.grouped import LARGEST, MIDDLE, Grouped, nearest

# Widths of the grid that are tried, relative to the range of a group's weights. The largest weights are clipped where it is narrower.
_WIDTHS = (1.0, 0.9, 0.8, 0.7, 0.6)
# How often each grid is fitted to the levels that it gives.
_FITS = 2
# Weights at once, so that they stay in the processor's caches.
_AT_ONCE = 1 << 17


def clipped(groups: torch.Tensor, importance: torch.Tensor, symmetric: bool) -> Grouped:
    """Round ``groups`` [N, G, g] float32 with the smallest sum of squared errors, each times the importance of its input.

    Each grid is fitted twice, by least squares, to the levels that it gives. Numbers are float32; their products and sums in fitting and
    comparing are float64. A group with an inf or a NaN has NaN as its scale.

    Args:
        importance: [G, g] float64, of `patchkit.int4.importance.importance_of`.
    """
    height = max(1, _AT_ONCE // max(1, importance.numel()))
    parts = [_best(part, importance, symmetric) for part in groups.split(height)]
    levels, scales, minima = zip(*parts, strict=True)
    return Grouped(torch.cat(levels), torch.cat(scales), None if symmetric else torch.cat(minima))


def _best(groups: torch.Tensor, importance: torch.Tensor, symmetric: bool) -> Grouped:
    best = _narrowed(groups, 1.0, symmetric)
    least = torch.full(groups.shape[:-1], torch.inf, dtype=torch.float64, device=groups.device)
    for width in _WIDTHS:
        tried = _narrowed(groups, width, symmetric)
        for _ in range(_FITS):
            tried = nearest(groups, *_least_squares(groups, importance, tried))
            error = ((groups - tried.values()).double().square_() * importance).sum(-1)
            better = error < least
            best.put(better, tried, better)
            least = torch.minimum(error, least)
    strange = ~groups.isfinite().all(-1)
    best.levels[strange], best.scale[strange] = 0, torch.nan
    return best


def _narrowed(groups: torch.Tensor, width: float, symmetric: bool) -> Grouped:
    """The nearest levels of a grid that has ``width`` of the range of its group."""
    if symmetric:
        # The weight of the largest magnitude has the level that has no mirror image, and its sign gives the scale its own.
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        return nearest(groups, (-width * extreme / MIDDLE).half(), None)
    low, high = groups.aminmax(dim=-1)
    narrower = (1 - width) / 2 * (high - low)
    return nearest(groups, (width * (high - low) / LARGEST).half(), (low + narrower).half())


def _least_squares(groups: torch.Tensor, importance: torch.Tensor, rounded: Grouped) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale and the minimum with which the levels of ``rounded`` have the smallest error."""
    levels = rounded.levels.double() - (MIDDLE if rounded.minimum is None else 0)
    weighted = importance * levels
    total = importance.sum(-1)
    square, product = (weighted * levels).sum(-1) / total, (weighted * groups).sum(-1) / total
    if rounded.minimum is None:
        return torch.where(square > 0, _half(product / square), rounded.scale), None
    level, weight = weighted.sum(-1) / total, (importance * groups).sum(-1) / total
    spread = square - level.square()
    scale = _half(torch.where(spread > 0, (product - level * weight) / spread, rounded.scale.double()))
    return scale, _half(weight - scale.double() * level)


def _half(wide: torch.Tensor) -> torch.Tensor:
    return wide.float().half()  # what torch does too, said openly: each step rounds
