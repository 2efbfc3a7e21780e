"""Exact keys and values chosen from the tokens that leave the window: M per kv head, on average over the heads that share them.

Shapes: B batch, G kv heads, K key dim, V value dim; M slots per head, W window, E block.

At every *border*, a row position t that is a multiple of E, the tokens that the next E tokens will push out of the window compete with the
tokens in the slots: those at row positions ``t - W .. t - W + E - 1``, sinks excepted.

1. A token's score is computed once, then, from its key without rotation and the mean of all keys before t: see `keydiff`.
2. The tokens of all heads that share slots compete together, each with its score in its own head: those with the highest scores stay, many
   of some heads and few of others. Of equals the earlier token stays, then the lower head. What does not stay is gone.

So what is kept depends on tokens and row positions alone. A query sees the tokens in slots that have left its window, at their true
distances, as long as these are positions that the model was made for. At every border that is a multiple of R, tokens more than L positions
back move R positions closer: their distances stay between L and L + R from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from patchkit.prefix.written_state import part_of_state

# The token number of an empty slot.
EMPTY = -1

# A score of 1 in steps. Equal tokens have equal keys in the first layer, up to rounding, and rounding must not choose between them.
_STEPS = 4096

# The score of what may not be kept, and of an empty slot.
LOWEST = -(2**15)


def keydiff(keys: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Minus the cosine of keys [B, G, n, K] and the mean key [B, G, K], in steps of 1/4096: [B, G, n] int16.

    Park et al. 2025, "KeyDiff", https://arxiv.org/abs/2504.15364, equation 5; here of keys without rotation.
    """
    cosine = F.cosine_similarity(keys.float(), mean[:, :, None].float(), dim=-1)
    return (cosine * -_STEPS).round().to(torch.int16)


@part_of_state
class Slots(NamedTuple):
    """Keys and values that one layer keeps beyond its window, in P pools that H kv heads each share (P H = G), of N = H M slots.

    Attributes:
        keys, values: [B, P, N, K] and [B, P, N, V], rotated as those of the window.
        tokens: [B, P, N] int32, token numbers; `EMPTY` in empty slots.
        owners: [B, P, N] uint8, the kv head whose token it is, counted within the pool.
        scores: [B, P, N] int16; `LOWEST` in empty slots.
        total: [B, G, K] float64, sum of the keys without rotation of all tokens before the last border.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    owners: torch.Tensor
    scores: torch.Tensor
    total: torch.Tensor

    @classmethod
    def empty(cls, keys: torch.Tensor, values: torch.Tensor, slots: int, shared: int) -> Slots:
        """Empty slots for keys like ``keys`` [B, G, *, K] and values like ``values`` [B, G, *, V]: M each, ``shared`` by H heads."""
        batch, groups = keys.shape[:2]
        size = (batch, groups // shared, shared * slots)
        return cls(
            keys.new_zeros(*size, keys.shape[-1]),
            values.new_zeros(*size, values.shape[-1]),
            keys.new_full(size, EMPTY, dtype=torch.int32),
            keys.new_zeros(size, dtype=torch.uint8),
            keys.new_full(size, LOWEST, dtype=torch.int16),
            keys.new_zeros(batch, groups, keys.shape[-1], dtype=torch.float64),
        )

    def copy_from(self, other: Slots) -> None:
        """Write all tensors of ``other`` into these, in place."""
        for mine, its in zip(self, other, strict=True):
            mine.copy_(its)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Slots:
        """Apply a function to every tensor."""
        return Slots(*map(function, self))


class Entry(NamedTuple):
    """Tokens that enter the competition, E per kv head.

    Attributes:
        keys, values: [B, G, E, K] and [B, G, E, V], rotated as those of the window.
        tokens: [E] int64 token numbers, ascending.
        scores: [B, G, E] int16; `LOWEST` for those that may not enter.
        total: [B, G, K] float64, sum of the keys without rotation of all tokens before this border.
        due: [B] bool, the rows that are at a border; None for all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    total: torch.Tensor
    due: torch.Tensor | None


@part_of_state
class Taken(NamedTuple):
    """Entries of slots that a competition has overwritten, for a rollback.

    Attributes:
        start: the token number before which it took place.
        places: [B, P, n] int64, the slots that met new tokens.
        keys, values, tokens, owners, scores: what these held.
        total: before the competition.
        unmoved: [B, P, N, K], all keys before those far away moved; None where none did.
    """

    start: int
    places: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    owners: torch.Tensor
    scores: torch.Tensor
    total: torch.Tensor
    unmoved: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Taken:
        """Apply a function to every tensor."""
        return Taken(self.start, *(None if x is None else function(x) for x in self[1:]))  # type: ignore[arg-type]


def compete(slots: Slots, entry: Entry, start: int) -> tuple[Slots, Taken]:
    """Return the slots after the competition before token ``start``, in new tensors, and what was overwritten."""
    pools = slots.tokens.shape[1]
    batch, groups, count = entry.scores.shape
    shared = groups // pools

    def pooled(x: torch.Tensor) -> torch.Tensor:
        """[B, G, E, ...] as [B, P, E H, ...]."""
        return x.unflatten(1, (pools, shared)).transpose(2, 3).flatten(2, 3)

    best, order = pooled(entry.scores).sort(dim=2, descending=True, stable=True)
    latest = (slots.tokens.long() * shared + slots.owners).argsort(dim=2, descending=True)
    worst, places = slots.scores.gather(2, latest).sort(dim=2, stable=True)
    places = latest.gather(2, places)
    pairs = min(best.shape[2], worst.shape[2])
    order, places = order[:, :, :pairs], places[:, :, :pairs]
    wins = best[:, :, :pairs] > worst[:, :, :pairs]
    if entry.due is not None:
        wins = wins & entry.due.to(wins.device)[:, None, None]

    def met(kept: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at, frm, won = (places, order, wins) if kept.ndim == 3 else (_wide(places, kept), _wide(order, new), wins[..., None])
        old = kept.gather(2, at)
        return kept.scatter(2, at, torch.where(won, new.gather(2, frm).to(kept.dtype), old)), old

    heads = torch.arange(shared, device=order.device).expand(batch, pools, count, shared).flatten(2)
    tokens = pooled(entry.tokens.expand(batch, groups, count))
    new = [pooled(entry.keys), pooled(entry.values), tokens, heads, pooled(entry.scores)]
    after, before = zip(*(met(kept, its) for kept, its in zip(slots[:5], new, strict=True)), strict=True)
    total = entry.total
    if entry.due is not None:
        total = torch.where(entry.due.to(wins.device)[:, None, None], total, slots.total)
    keys, values, kept_tokens, kept_heads, scores = after
    return Slots(keys, values, kept_tokens, kept_heads, scores, total), Taken(
        start, places, before[0], before[1], before[2], before[3], before[4], slots.total.clone()
    )


def undo(slots: Slots, taken: Taken) -> None:
    """Write back, in place, what a competition has overwritten; the last one first."""
    if taken.unmoved is not None:
        slots.keys.copy_(taken.unmoved)
    for kept, old in zip(slots[:5], taken[2:7], strict=True):
        kept.scatter_(2, taken.places if kept.ndim == 3 else _wide(taken.places, kept), old.to(kept.dtype))
    slots.total.copy_(taken.total)


def _wide(places: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Expand indices [B, P, n] into x [B, P, m, D] to [B, P, n, D]."""
    return places[..., None].expand(-1, -1, -1, x.shape[-1])
