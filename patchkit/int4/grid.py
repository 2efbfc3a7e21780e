"""Weights that have been rounded to 16 levels before, such as those of a GGUF file in Q4_0 or Q4_1: their own levels, without an error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from patchkit.int4.grouped import LARGEST, MIDDLE, Grouped, nearest

# Groups that are looked at before all are.
_SAMPLE = 256


def on_a_grid(groups: torch.Tensor, symmetric: bool) -> Grouped | None:
    """Levels that stand for exactly the weights ``groups`` [N, G, g], with scales and minima in fp16; None if a group has none."""
    n, flat = len(groups), groups.flatten(0, 1)
    sample = flat[:: max(1, len(flat) // _SAMPLE)]
    # Most weights have more values than levels in the first groups already.
    if (
        int(sample.sort(1).values.diff(dim=1).ne(0).sum(1).max()) > LARGEST
        or not groups.isfinite().all()
        or _found(sample, symmetric) is None
    ):
        return None
    found = _found(flat, symmetric)
    if found is None:
        return None
    minimum = None if found.minimum is None else found.minimum.view(n, -1)
    return Grouped(found.levels.view_as(groups), found.scale.view(n, -1), minimum)


def _found(groups: torch.Tensor, symmetric: bool) -> Grouped | None:
    scale = groups.new_zeros(len(groups), dtype=torch.float16)
    found = Grouped(torch.zeros_like(groups), scale, None if symmetric else torch.zeros_like(scale))
    left = torch.arange(len(groups), device=groups.device)
    for attempt in _attempts(symmetric):
        if not len(left):
            break
        tried = attempt(groups[left])
        exact = (tried.values() == groups[left]).all(1)
        found.put(left[exact], tried, exact)
        left = left[~exact]
    return None if len(left) else found


def _attempts(symmetric: bool) -> Iterator[Callable[[torch.Tensor], Grouped]]:
    """Guesses at which levels a group's weights have, the likely ones first."""
    if symmetric:
        for level in sorted(range(LARGEST + 1), key=lambda level: -abs(level - MIDDLE)):
            yield functools.partial(_symmetric, level)
        return
    for span in range(LARGEST, -1, -1):
        for first in range(LARGEST - span + 1):
            for sign in (1, -1):
                yield functools.partial(_shifted, span, first, sign)


def _symmetric(level: int, groups: torch.Tensor) -> Grouped:
    """The weight of the largest magnitude has this level."""
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))[:, 0]
    return nearest(groups, (extreme / ((level - MIDDLE) or 1)).half(), None)


def _shifted(span: int, first: int, sign: int, groups: torch.Tensor) -> Grouped:
    """The smallest and the largest weight are ``span`` levels apart, and the one with the lower level has the level ``first``.

    Args:
        sign: of the scale.
    """
    low, high = groups.aminmax(dim=1)
    if span == 0:  # one value, of more digits than fp16 has: the scale has the rest
        minimum = low.half()
        return Grouped(torch.ones_like(groups), (low - minimum.float()).half(), minimum)
    scale = (sign * (high - low) / span).half()
    minimum = ((low if sign > 0 else high) - first * scale.float()).half()
    return nearest(groups, scale, minimum)
