"""Difference of two sequences of logits, piece by piece, so that only one piece of each has to be in memory.

Logits are given as pieces: tensors [B, n, V] of consecutive positions; V is the vocabulary, or anything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

Pieces = Iterable[torch.Tensor]

# Bytes of logits that are subtracted at once.
_AT_ONCE = 8 << 20


@dataclass
class Difference:
    """Difference between two computations of the same logits.

    Attributes:
        largest: maximum over all logits, relative to a tenth of the largest expected one if that exceeds 10 (as in `logit_error`).
        position: root mean square over the vocabulary, at the position where it is largest.
        typical: median over positions of the maximum at a position.

    All are infinite if one side has a NaN or an infinity where the other has not.
    """

    largest: float = 0.0
    position: float = 0.0
    typical: float = 0.0


def difference(actual: Pieces, expected: Pieces) -> Difference:
    """Difference of ``actual`` from ``expected``, whatever pieces they are cut into.

    Raises:
        ValueError: the shapes differ.
    """
    scale, squares = 0.0, 0.0
    off: list[torch.Tensor] = []
    for left, right in _aligned(actual, expected):
        rows = max(1, _AT_ONCE // max(1, left[:, :1].numel() * 8))
        for a, b in zip(left.split(rows, 1), right.split(rows, 1), strict=True):
            exact = torch.float64 if b.dtype == torch.float64 else torch.float32
            apart, size = a.detach().to(exact) - b.detach().to(exact), b.abs().amax().item()
            most = apart.abs_().amax().item()
            if not (math.isfinite(most) and math.isfinite(size)):
                finite = b.isfinite()
                if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not a[finite].isfinite().all():
                    return Difference(math.inf, math.inf, math.inf)
                apart = apart.masked_fill_(~finite, 0)
                size = b[finite].abs().amax().item() if finite.any() else 0.0
            scale = max(scale, size)
            off.append(apart.amax(-1).flatten())
            squares = max(squares, apart.float().square().mean(-1).amax().item())
    if not off:
        return Difference()
    positions = torch.cat(off) / max(1.0, scale / 10)
    return Difference(positions.max().item(), math.sqrt(squares), positions.median().item())


def _aligned(actual: Pieces, expected: Pieces) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces of both at the same positions, without empty ones."""
    sides = [(piece for piece in side if piece.shape[1]) for side in (actual, expected)]
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    while True:
        left, right = (next(side, None) if held is None else held for side, held in zip(sides, (left, right), strict=True))
        if left is None or right is None:
            if left is not right:
                raise ValueError("logits of sequences of different lengths cannot be compared")
            return
        if (left.shape[0], left.shape[2:]) != (right.shape[0], right.shape[2:]):
            raise ValueError(f"logits of shape {list(left.shape)} cannot be compared with {list(right.shape)}")
        count = min(left.shape[1], right.shape[1])
        yield left[:, :count], right[:, :count]
        left, right = (side[:, count:] if side.shape[1] > count else None for side in (left, right))
