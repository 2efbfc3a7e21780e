"""Exact keys and values chosen from the tokens that leave the window: M per kv head, on average over the heads that share them.

Shapes: B batch, G kv heads, K key dim, V value dim; M slots per head, W window, E block, r reach of a score's pooling.

At every *border*, a row position t that is a multiple of E, the tokens that the next E tokens will push out of the window compete with the
M tokens in the slots: those at row positions ``t - W .. t - W + E - 1``, sinks excepted.

1. A token's own score is computed once, at the first border at which it is at ``t - W + E + r - 1`` or before, from its key without rotation
   and the mean of all keys before t: see `keydiff`. A token at a row position below S has none (minus infinity).
2. Its score is the largest of the own scores of its 2 r + 1 neighbours, itself included.
3. The new tokens of all heads that share slots, in descending order of their scores, meet the slots in ascending order, pair by pair; of
   equals the earlier token comes first, then the lower head, and the lower slot. A new token that scores higher takes the slot, and what was
   there is gone; an empty slot scores minus infinity. So the tokens with the highest scores stay, many of some heads and few of others.

So what is kept depends on tokens and row positions alone. A query sees the tokens in slots that have left its window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

# The token number of an empty slot.
EMPTY = -1


def keydiff(keys: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Minus the cosine of keys [B, G, n, K] and the mean key [B, G, K]: [B, G, n] float32.

    Park et al. 2025, "KeyDiff", https://arxiv.org/abs/2504.15364, equation 5; here of keys without rotation.
    """
    return -F.cosine_similarity(keys.float(), mean[:, :, None].float(), dim=-1)


class Slots(NamedTuple):
    """What one layer keeps beyond its window, in P pools that H kv heads each share (P H = G), of N = H M slots.

    Attributes:
        keys, values: [B, P, N, K] and [B, P, N, V], rotated as those of the window.
        tokens: [B, P, N] int64, token numbers; `EMPTY` in empty slots.
        owners: [B, P, N] int64, the kv head whose token it is, counted within the pool.
        scores: [B, P, N] float32; minus infinity in empty slots.
        trail: [B, G, 2 r] float32, own scores of the last tokens that have one.
        total: [B, G, K] float64, sum of the keys without rotation of all tokens before the last border.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    owners: torch.Tensor
    scores: torch.Tensor
    trail: torch.Tensor
    total: torch.Tensor

    @classmethod
    def empty(cls, keys: torch.Tensor, values: torch.Tensor, slots: int, shared: int, reach: int) -> Slots:
        """Empty slots for keys like ``keys`` [B, G, *, K] and values like ``values`` [B, G, *, V]: M each, ``shared`` by H heads."""
        batch, groups = keys.shape[:2]
        size = (batch, groups // shared, shared * slots)
        return cls(
            keys.new_zeros(*size, keys.shape[-1]),
            values.new_zeros(*size, values.shape[-1]),
            torch.full(size, EMPTY, device=keys.device),
            torch.zeros(size, dtype=torch.int64, device=keys.device),
            keys.new_full(size, -torch.inf, dtype=torch.float32),
            keys.new_full((batch, groups, 2 * reach), -torch.inf, dtype=torch.float32),
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
        own: [B, G, E] float32, own scores of the E tokens that are r tokens later.
        total: [B, G, K] float64, sum of the keys without rotation of all tokens before this border.
        due: [B] bool, the rows that are at a border; None for all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    own: torch.Tensor
    total: torch.Tensor
    due: torch.Tensor | None


class Taken(NamedTuple):
    """What a competition has overwritten, for a rollback.

    Attributes:
        start: the token number before which it took place.
        places: [B, P, n] int64, the slots that met new tokens.
        keys, values, tokens, owners, scores: what these held.
        trail, total: before the competition.
    """

    start: int
    places: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    owners: torch.Tensor
    scores: torch.Tensor
    trail: torch.Tensor
    total: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Taken:
        """Apply a function to every tensor."""
        return Taken(self.start, *map(function, self[1:]))  # type: ignore[arg-type]


def compete(slots: Slots, entry: Entry, start: int) -> tuple[Slots, Taken]:
    """Return the slots after the competition before token ``start``, in new tensors, and what was overwritten."""
    count, pools = entry.own.shape[2], slots.tokens.shape[1]
    own = torch.cat([slots.trail, entry.own], 2)
    reach = slots.trail.shape[2] // 2
    scores = F.max_pool1d(own, 2 * reach + 1, 1) if reach else own
    # Tokens without an own score are no candidates: sinks, padding, what is before the text.
    scores = scores.masked_fill(own[:, :, reach : reach + count] == -torch.inf, -torch.inf)
    shared = scores.shape[1] // pools

    def pooled(x: torch.Tensor) -> torch.Tensor:
        """[B, G, E, ...] as [B, P, E H, ...]."""
        return x.unflatten(1, (pools, shared)).transpose(2, 3).flatten(2, 3)

    best, order = pooled(scores).sort(dim=2, descending=True, stable=True)
    worst, places = slots.scores.sort(dim=2, stable=True)
    pairs = min(best.shape[2], worst.shape[2])
    order, places = order[:, :, :pairs], places[:, :, :pairs]
    wins = best[:, :, :pairs] > worst[:, :, :pairs]
    if entry.due is not None:
        wins = wins & entry.due.to(wins.device)[:, None, None]

    def met(kept: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at, frm, won = (places, order, wins) if kept.ndim == 3 else (_wide(places, kept), _wide(order, new), wins[..., None])
        old = kept.gather(2, at)
        return kept.scatter(2, at, torch.where(won, new.gather(2, frm).to(kept.dtype), old)), old

    heads = torch.arange(shared, device=order.device).expand(*scores.shape[:1], pools, count, shared).flatten(2)
    new = [pooled(entry.keys), pooled(entry.values), pooled(entry.tokens.expand(scores.shape)), heads, pooled(scores)]
    after, before = zip(*(met(kept, its) for kept, its in zip(slots[:5], new, strict=True)), strict=True)
    trail, total = own[:, :, count:], entry.total
    if entry.due is not None:
        due = entry.due.to(wins.device)[:, None, None]
        trail, total = torch.where(due, trail, slots.trail), torch.where(due, total, slots.total)
    return Slots(*after, trail, total), Taken(start, places, *before, slots.trail.clone(), slots.total.clone())


def undo(slots: Slots, taken: Taken) -> None:
    """Write back, in place, what a competition has overwritten; the last one first."""
    for kept, old in zip(slots[:5], taken[2:7], strict=True):
        kept.scatter_(2, taken.places if kept.ndim == 3 else _wide(taken.places, kept), old.to(kept.dtype))
    slots.trail.copy_(taken.trail)
    slots.total.copy_(taken.total)


def _wide(places: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Expand indices [B, P, n] into x [B, P, m, D] to [B, P, n, D]."""
    return places[..., None].expand(-1, -1, -1, x.shape[-1])
