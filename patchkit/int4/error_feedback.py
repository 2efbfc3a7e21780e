"""Rounding one input after the other, with the error made so far taken off the inputs that follow (Frantar et al. 2022, GPTQ,
https://arxiv.org/abs/2210.17323).

It minimises the squared error of a layer's outputs on calibration text. It differs from the paper in that each group's grid is the one of
`patchkit.int4.clipped`, and in that all layers see the inputs of the unpatched model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from patchkit.anatomy.target import Target
from patchkit.int4.clipped import clipped
from patchkit.int4.grouped import Grouped, nearest
from patchkit.quantised.scheme import Layer

# Added to the diagonal, relative to its mean, so that directions that the text does not show stay bounded.
_DAMPING = 0.01
# Bytes of the moments that are collected in one pass over the text.
_MOST_BYTES = 1 << 30


def moments(target: Target, layers: Sequence[Layer], ids: torch.Tensor) -> Iterator[tuple[Layer, torch.Tensor | None]]:
    """Each layer with the second moments [K, K] float32 of its inputs on a text, or with None if it is not called.

    Args:
        ids: token ids [B, T].
    """
    for part in _parts(layers):
        sums: dict[str, torch.Tensor] = {}
        hooks = [layer.module.register_forward_pre_hook(functools.partial(_add, sums, layer.name)) for layer in part]
        try:
            for row in ids:
                target.forward(row[None])
        finally:
            for hook in hooks:
                hook.remove()
        yield from ((layer, sums.get(layer.name)) for layer in part)


def _parts(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """The layers in parts whose moments fit into memory."""
    part: list[Layer] = []
    size = 0
    for layer in layers:
        needed = 4 * layer.original.shape[0 if layer.transposed else 1] ** 2
        if part and size + needed > _MOST_BYTES:
            yield part
            part, size = [], 0
        part.append(layer)
        size += needed
    if part:
        yield part


def _add(sums: dict[str, torch.Tensor], name: str, module: Any, args: tuple[Any, ...]) -> None:
    rows = args[0].reshape(-1, args[0].shape[-1]).float()
    found = rows.T @ rows
    sums[name] = found if name not in sums else sums[name].add_(found)


def with_feedback(groups: torch.Tensor, importance: torch.Tensor, influence: torch.Tensor, symmetric: bool) -> Grouped:
    """Round ``groups`` [N, G, g] float32, one input after the other.

    Args:
        importance: [G, g] float64, with which the grid of each group is chosen.
        influence: [G g, G g] float32, of `influence_of`.
    """
    _, count, group = groups.shape
    left = groups.flatten(1).clone()
    parts: list[Grouped] = []
    for number in range(count):
        first = number * group
        here, share = left[:, first : first + group], influence[first : first + group]
        grid = clipped(here[:, None], importance[number : number + 1], symmetric)
        errors = torch.empty_like(here)
        for i in range(group):
            column = here[:, i : i + 1]
            rounded = nearest(column[:, None], grid.scale, grid.minimum)
            grid.levels[:, :, i] = rounded.levels[..., 0]
            errors[:, i : i + 1] = (column - rounded.values()[:, 0]) / share[i, first + i]
            here[:, i + 1 :] -= errors[:, i : i + 1] * share[i, first + i + 1 : first + group]
        left[:, first + group :] -= errors @ share[:, first + group :]
        parts.append(grid)
    minima = [part.minimum for part in parts if part.minimum is not None]
    levels, scales = torch.cat([part.levels for part in parts], 1), torch.cat([part.scale for part in parts], 1)
    return Grouped(levels, scales, torch.cat(minima, 1) if minima else None)


def influence_of(moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor [K, K] float32 of the inverse of second moments [K, K].

    Row i says how an error of input i is made up for by the inputs after it.
    """
    damped = moment.double().clone()
    diagonal = damped.diagonal()
    diagonal += _DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
