"""Definition of modules with weights of four bits: the rule by which they are rounded, in NumPy, group by group.

Numbers are float32, sums float64, scales and minima float16, so that a choice between two grids falls alike wherever it is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from patchkit.definitions.rounded import logits_over, rounded

if TYPE_CHECKING:
    from patchkit.record import PatchReport

_WIDTHS, _FITS = (1.0, 0.9, 0.8, 0.7, 0.6), 2
_FLOOR = 0.01
_Array = np.ndarray[Any, np.dtype[Any]]


def rounded_in_groups(
    model: Any,
    ids: torch.Tensor,
    facts: PatchReport,
    *,
    group: int = 32,
    symmetric: bool = False,
    squares: Mapping[str, torch.Tensor] | None = None,
    at: torch.Tensor | None = None,
    unsure: torch.Generator | None = None,
) -> torch.Tensor:
    """Logits with the weights of the patch's modules on 16 levels for each group of inputs; in mode "dynamic" inputs too, on 255 per group.

    A weight all of whose groups are on such levels stays as it is. Otherwise the grid of a group spans a share of its range (1, 0.9, ...
    0.6), and is fitted twice by least squares to the levels that it gives; of all these the one with the smallest squared error is taken.

    Args:
        squares: mean square [K] of each input, by the name of the module. An error counts as much as they say, relative to their mean,
            and 0.01 more; all count alike where there are none.
        unsure: described at `rounded_logits`.

    Raises:
        NoDefinition: as `rounded_logits`.
    """

    def round_weight(name: str, weight: torch.Tensor, across: int) -> torch.Tensor:
        given = None if squares is None or name not in squares or weight.ndim != 2 else squares[name].numpy()
        return _weight(weight, across, given, group, symmetric)

    return logits_over(model, ids, facts, round_weight, functools.partial(_inputs, group), at, unsure)


def _inputs(group: int, x: torch.Tensor, unsure: torch.Generator | None) -> torch.Tensor:
    return torch.cat([rounded(part, -1, unsure) for part in x.split(group, -1)], -1)


def _weight(weight: torch.Tensor, across: int, squares: _Array | None, group: int, symmetric: bool) -> torch.Tensor:
    if weight.ndim == 3:
        return torch.stack([_weight(each, across - 1, squares, group, symmetric) for each in weight])
    rows = (weight if across == 1 else weight.T).float().numpy()
    with np.errstate(all="ignore"):
        done = _rows(rows, squares, group, symmetric)
    made = torch.from_numpy(done).to(weight.dtype)
    return made if across == 1 else made.T.contiguous()


def _rows(rows: _Array, squares: _Array | None, group: int, symmetric: bool) -> _Array:
    n, k = rows.shape
    largest = np.abs(rows).max(1, keepdims=True)
    unit = np.where(largest > 0, np.ldexp(np.float32(1), np.maximum(np.frexp(largest)[1], -115) - 11), np.float32(1))
    missing = -k % group
    groups = np.pad(rows / unit, ((0, 0), (0, missing)), mode="edge").astype(np.float32).reshape(-1, group)
    counts = np.ones(k) if squares is None or not squares.any() else squares / squares.mean() + _FLOOR
    counts = np.pad(counts.astype(np.float32).astype(np.float64), (0, missing)).reshape(-1, group)
    if not (_is_symmetric(groups) if symmetric else _is_on_levels(groups)):
        apart = max(1, 4096 // len(counts)) * len(counts)
        parts = [groups[first : first + apart] for first in range(0, len(groups), apart)]
        groups = np.concatenate([_fitted(part, np.tile(counts, (len(part) // len(counts), 1)), symmetric) for part in parts])
    return (groups.reshape(n, -1)[:, :k] * unit).astype(np.float32)


def _is_on_levels(groups: _Array) -> bool:
    """Whether the differences within every group are multiples, up to 15, of one number in float16, beginning at another."""
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    # One value is the sum of two numbers in float16.
    start = _half(low).astype(np.float32)
    known = (_half(low - start).astype(np.float32) + start == groups).all(1)
    for span in range(1, 16):
        for sign in (1, -1):
            scale = _half(sign * (high - low) / np.float32(span)).astype(np.float32)
            for first in range(16 - span):
                start = _half((low if sign > 0 else high) - first * scale).astype(np.float32)
                level = np.nan_to_num(np.rint((groups - start) / scale)).clip(0, 15)
                known |= (level * scale + start == groups).all(1)
    return bool(known.all())


def _is_symmetric(groups: _Array) -> bool:
    """Whether every group consists of multiples, from -8 to 7, of one number in float16."""
    known = (groups == 0).all(1)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    for level in (*range(-8, 0), *range(1, 8)):
        scale = _half(largest / np.float32(level)).astype(np.float32)
        known |= (np.rint(groups / scale).clip(-8, 7) * scale == groups).all(1)
    return bool(known.all())


def _fitted(groups: _Array, counts: _Array, symmetric: bool) -> _Array:
    best, least = np.zeros_like(groups), np.full(len(groups), np.inf)
    lowest = -8 if symmetric else 0
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    for width in _WIDTHS:
        if symmetric:
            scale = _half(np.float32(-width) * np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1) / np.float32(8))
            start = _half(0 * low)
        else:
            scale = _half(np.float32(width) * (high - low) / np.float32(15))
            start = _half(low + np.float32((1 - width) / 2) * (high - low))
        for _ in range(_FITS):
            level = _levels(groups, scale, start, lowest).astype(np.float64)
            square, product = _mean(level**2, counts), _mean(level * groups, counts)
            if symmetric:
                scale = np.where(square > 0, _half(product / square), scale)
            else:
                mean, middle = _mean(level, counts), _mean(groups, counts)
                spread = square - mean**2
                scale = _half(np.where(spread > 0, (product - mean * middle) / spread, scale))
                start = _half(middle - scale.astype(np.float64) * mean)
            values = _levels(groups, scale, start, lowest) * scale.astype(np.float32) + start.astype(np.float32)
            error = (counts * (groups - values).astype(np.float64) ** 2).sum(1)
            better = error < least
            best[better], least[better] = values[better], error[better]
    return best


def _mean(products: _Array, counts: _Array) -> _Array:
    return (counts * products).sum(1, keepdims=True) / counts.sum(1, keepdims=True)


def _half(wide: _Array) -> _Array:
    return wide.astype(np.float32).astype(np.float16)


def _levels(groups: _Array, scale: _Array, start: _Array, lowest: int) -> _Array:
    step = scale.astype(np.float32)
    steps = np.where(step == 0, np.float32(0), (groups - start.astype(np.float32)) / step)
    return np.rint(steps).clip(lowest, lowest + 15).astype(np.float32)
