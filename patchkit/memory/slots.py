"""M exact keys and values per kv head, chosen from the tokens that leave the window.

Shapes: B batch, G kv heads, K key dim, V value dim; M slots, W window, E block, r reach of a score's pooling.

At every *border*, a row position t that is a multiple of E, the tokens that the next E tokens will push out of the window compete with the
M tokens in the slots: those at row positions ``t - W .. t - W + E - 1``, sinks excepted.

1. A token's own score is computed once, at the first border at which it is at ``t - W + E + r - 1`` or before, from its key without rotation
   and the mean of all keys before t: see `keydiff`. A token at a row position below S has none (minus infinity).
2. Its score is the largest of the own scores of its 2 r + 1 neighbours, itself included.
3. The new tokens in descending order of their scores meet the slots in ascending order, pair by pair; ties go to the earlier token among
   the new ones and to the lower slot. A new token that scores higher takes the slot, and what was there is gone; an empty slot scores minus
   infinity. So the M tokens with the highest scores stay.

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
    """What one layer keeps beyond its window.

    Attributes:
        keys, values: [B, G, M, K] and [B, G, M, V], rotated as those of the window.
        tokens: [B, G, M] int64, token numbers; `EMPTY` in empty slots.
        scores: [B, G, M] float32; minus infinity in empty slots.
        trail: [B, G, 2 r] float32, own scores of the last tokens that have one.
        total: [B, G, K] float64, sum of the keys without rotation of all tokens before the last border.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    trail: torch.Tensor
    total: torch.Tensor

    @classmethod
    def empty(cls, keys: torch.Tensor, values: torch.Tensor, reach: int) -> Slots:
        """Empty slots in the buffers ``keys`` [B, G, M, K] and ``values`` [B, G, M, V]."""
        size = keys.shape[:3]
        return cls(
            keys,
            values,
            torch.full(size, EMPTY, device=keys.device),
            keys.new_full(size, -torch.inf, dtype=torch.float32),
            keys.new_full((*size[:2], 2 * reach), -torch.inf, dtype=torch.float32),
            keys.new_zeros(*size[:2], keys.shape[-1], dtype=torch.float64),
        )

    def visible(self, oldest: int | torch.Tensor) -> torch.Tensor:
        """Whether a slot holds a token that is older than the token number ``oldest``: bool [B, G, M], or of the broadcast shape."""
        return (self.tokens >= 0) & (self.tokens < oldest)

    def copy_from(self, other: Slots) -> None:
        """Write all tensors of ``other`` into these, in place."""
        for mine, its in zip(self, other, strict=True):
            if mine is not its:
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
        slots: [B, G, E] int64, the slots that met new tokens.
        keys, values, tokens, scores: what these held.
        trail, total: before the competition.
    """

    start: int
    slots: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    trail: torch.Tensor
    total: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Taken:
        """Apply a function to every tensor."""
        return Taken(self.start, *map(function, self[1:]))  # type: ignore[arg-type]


def compete(slots: Slots, entry: Entry, start: int) -> tuple[Slots, Taken]:
    """Return the slots after the competition before token ``start``, in new tensors, and what was overwritten."""
    count = entry.own.shape[2]
    own = torch.cat([slots.trail, entry.own], 2)
    reach = slots.trail.shape[2] // 2
    scores = F.max_pool1d(own, 2 * reach + 1, 1) if reach else own
    # Tokens without an own score are no candidates: sinks, padding, what is before the text.
    scores = scores.masked_fill(own[:, :, reach : reach + count] == -torch.inf, -torch.inf)
    best, order = scores.sort(dim=2, descending=True, stable=True)
    worst, places = (x[:, :, :count] for x in slots.scores.sort(dim=2, stable=True))
    wins = best[:, :, : places.shape[2]] > worst
    order = order[:, :, : places.shape[2]]
    if entry.due is not None:
        wins = wins & entry.due.to(wins.device)[:, None, None]

    def met(kept: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at, frm = (places, order) if kept.ndim == 3 else (_wide(places, kept), _wide(order, new))
        old = kept.gather(2, at)
        won = wins if kept.ndim == 3 else wins[..., None]
        return kept.scatter(2, at, torch.where(won, new.gather(2, frm).to(kept.dtype), old)), old

    keys, old_keys = met(slots.keys, entry.keys)
    values, old_values = met(slots.values, entry.values)
    tokens, old_tokens = met(slots.tokens, entry.tokens.expand(scores.shape))
    kept_scores, old_scores = met(slots.scores, scores)
    trail, total = own[:, :, count:], entry.total
    if entry.due is not None:
        due = entry.due.to(wins.device)[:, None, None]
        trail, total = torch.where(due, trail, slots.trail), torch.where(due, total, slots.total)
    taken = Taken(start, places, old_keys, old_values, old_tokens, old_scores, slots.trail.clone(), slots.total.clone())
    return Slots(keys, values, tokens, kept_scores, trail, total), taken


def undo(slots: Slots, taken: Taken) -> None:
    """Write back, in place, what a competition has overwritten; the last one first."""
    for kept, old in zip(slots[:4], (taken.keys, taken.values, taken.tokens, taken.scores), strict=True):
        at = taken.slots if kept.ndim == 3 else _wide(taken.slots, kept)
        kept.scatter_(2, at, old.to(kept.dtype))
    slots.trail.copy_(taken.trail)
    slots.total.copy_(taken.total)


def _wide(places: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Expand indices [B, G, n] into x [B, G, m, D] to [B, G, n, D]."""
    return places[..., None].expand(-1, -1, -1, x.shape[-1])
