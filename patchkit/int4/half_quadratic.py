"""Fitting without data: half-quadratic quantisation (Badri and Shaji 2023, HQQ, https://mobiusml.github.io/hqq_blog/).

Minimises ``sum |w - (scale * level + minimum)|^p`` with p < 1, for which large errors count less than in a squared error, by two steps in
turn: errors ``e`` are the shrunk residuals, and scale and minimum are those of least squares for ``w - e``. It differs from the paper in
that the scale is fitted too, and in that it starts from the grid of `patchkit.int4.clipped`.
"""

from __future__ import annotations

import torch

from patchkit.int4.clipped import clipped, least_squares
from patchkit.int4.grouped import Grouped, nearest

_POWER, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


def half_quadratic(groups: torch.Tensor, symmetric: bool) -> Grouped:
    """Round ``groups`` [M, g] float32; of all steps, each group has the one with the smallest error."""
    best = clipped(groups, symmetric)
    now, least, beta = best, _error(groups, best), _BETA
    # Errors are in units of a group's range, so that beta means the same for all of them.
    size = groups.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(_STEPS):
        residual = (groups - now.values()) / size
        shrunk = residual.sign() * (residual.abs() - residual.abs().pow(_POWER - 1) / beta).clamp_(min=0)
        now = nearest(groups, *least_squares(groups - shrunk * size, now))
        error = _error(groups, now)
        better = error < least
        best.put(better, now, better)
        least, beta = torch.minimum(error, least), beta * _GROWTH
    return best


def _error(groups: torch.Tensor, rounded: Grouped) -> torch.Tensor:
    return (groups - rounded.values()).abs_().pow_(_POWER).sum(1, dtype=torch.float64)
