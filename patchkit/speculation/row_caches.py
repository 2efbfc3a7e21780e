"""Caches of a draft whose rows advance by numbers of tokens of their own, with rollback of the last ones.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from patchkit.speculation.cached_model import CachedModel, make_cache

# Last tokens of a sequence that stay in the cache for one round only, because other tokens may take their place.
_HELD = 8


class RowCaches:
    """One cache of all R rows where the draft can have one that is ragged; otherwise a cache for each row.

    Args:
        model: the draft.
        rows: R.
        own: the model makes a kind of cache of its own.
        ragged: rows of one cache may advance by themselves.
    """

    def __init__(self, model: Any, rows: int, own: bool, ragged: bool) -> None:
        self.model, self.own, self.ragged = model, own, ragged and not own
        self._begin(rows)

    def _begin(self, rows: int) -> None:
        self.rows = rows
        groups = [rows] if self.ragged or rows == 1 else [1] * rows
        self.caches = [
            CachedModel(self.model, None if self.own else make_cache(self.model), [0] * group, ragged=self.ragged) for group in groups
        ]
        if any(cached.aligned for cached in self.caches):
            self.ragged = False
            self._begin(rows)
        self.fed: list[list[int]] = [[] for _ in range(rows)]  # tokens in the cache, drafts included

    @property
    def kept(self) -> list[int]:
        """Of each row, how many of its tokens are never rolled back."""
        return [count for cached in self.caches for count in cached.fed]

    def feed(self, ids: list[list[int]]) -> torch.Tensor:
        """Bring the caches to these sequences, all of two tokens or more; return the logits [R, V] after the last token of each.

        Tokens that are there already are not fed again, except for a few at the end.
        """
        held = min(_HELD, min(map(len, ids)) - 1)
        common = [_common_prefix(before, now) for before, now in zip(self.fed, ids, strict=True)]
        limits = [min(same, len(each) - held) for same, each in zip(common, ids, strict=True)]
        if any(limit < kept for limit, kept in zip(limits, self.kept, strict=True)):  # more has changed than can be rolled back
            self._begin(self.rows)
            limits = [0] * self.rows
        width = max(len(each) - limit for each, limit in zip(ids, limits, strict=True))
        starts = [len(each) - width for each in ids]
        is_first = not any(self.kept)
        if is_first or any(start < kept for start, kept in zip(starts, self.kept, strict=True)):
            if not is_first:
                self._keep(limits)
            starts = [len(each) - held for each in ids]
            self._append([each[limit:start] for each, limit, start in zip(ids, limits, starts, strict=True)], is_first)
        else:
            self._keep(starts)
        self.fed = [each[:start] for each, start in zip(ids, starts, strict=True)]
        return self.append([each[start:] for each, start in zip(ids, starts, strict=True)])

    def append(self, tokens: list[list[int]]) -> torch.Tensor:
        """Feed an equal number of tokens to every row; return the logits [R, V] after the last."""
        logits, row = [], 0
        for cached in self.caches:
            group = tokens[row : row + len(cached.fed)]
            logits.append(cached.forward(torch.tensor(group, device=self.model.device), only_last=True)[:, -1])
            row += len(group)
        for fed, new in zip(self.fed, tokens, strict=True):
            fed += new
        return torch.cat(logits)

    def select_rows(self, rows: list[int]) -> None:
        """Go on with these rows only, without the tokens that are not kept."""
        if not any(self.kept):
            self._begin(len(rows))
            return
        self._keep(self.kept)
        self.rows = len(rows)
        self.fed = [self.fed[row] for row in rows]
        if self.ragged:
            self.caches[0].select_rows(rows)
        else:
            self.caches = [self.caches[row] for row in rows]

    def join(self, other: RowCaches) -> None:
        """Go on with the rows of another such object of the same draft too, after one's own."""
        kept, others = self.kept, other.kept
        if not any(kept) or not any(others) or self.ragged != other.ragged:
            self._begin(self.rows + other.rows)
            return
        self._keep(kept)
        other._keep(others)
        if not self.ragged:
            self.caches = self.caches + other.caches
        elif self.caches[0].joins(other.caches[0]):
            self.caches[0].join(other.caches[0])
        else:
            self._begin(self.rows + other.rows)
            return
        self.rows, self.fed = self.rows + other.rows, self.fed + other.fed

    def _keep(self, lengths: list[int]) -> None:
        """Roll every row back to its length, for good: what is in the cache then is never rolled back."""
        row = 0
        for cached in self.caches:
            group = range(row, row + len(cached.fed))
            if cached.pending:
                cached.keep([lengths[i] - fed for i, fed in zip(group, cached.fed, strict=True)])
            row = group.stop
        self.fed = [fed[:length] for fed, length in zip(self.fed, lengths, strict=True)]

    def _append(self, tokens: list[list[int]], is_first: bool) -> None:
        """Feed different numbers of tokens to the rows, and keep them."""
        row = 0
        for cached in self.caches:
            group = tokens[row : row + len(cached.fed)]
            row += len(group)
            longest = max(map(len, group))
            if not longest:
                continue
            filled = [(each + [0] * longest)[:longest] for each in group]
            cached.forward(torch.tensor(filled, device=self.model.device), only_last=True)
            cached.keep([len(each) for each in group])
            if is_first:
                cached.record()


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
