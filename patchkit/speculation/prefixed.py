"""The prompts of a batch on a model that is patched with `prefix_cache` too: what is kept is not fed, and what is fed is kept.

A single prompt is fed into the batch's own cache, up to the next border at a time. Several are fed one by one, each different one once,
and put together at their last border.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchkit.prefix.generate import distinct
from patchkit.prefix.prompt import Prompt
from patchkit.prefix.shared import Prefixes, find_prefixes
from patchkit.prefix.snapshot import can_join, copied, joined
from patchkit.speculation.cached_model import CachedModel
from patchkit.speculation.drafter import State


class PrefixedPrompts:
    """The prompts of one batch, which have equal lengths and no padding; its cache is empty.

    Args:
        wants_hidden: the drafter wants the target's hidden states of the whole prompt.

    Attributes:
        reused: [R], tokens of each prompt that were kept, or fed for an equal one.
    """

    def __init__(self, prefixes: Prefixes, state: State, cached: CachedModel, wants_hidden: bool) -> None:
        self.prefixes, self.state, self.wants_hidden = prefixes, state, wants_hidden
        self.namespace = prefixes.namespace(cached.cache, wants_hidden)
        self.prompt: Prompt | None = None
        self.reused = [0] * state.rows
        if state.rows == 1:
            self.prompt = prefixes.begin(self._ids(0), self.namespace, cached.cache)
            self.prompt.thaw(cached.cache)
            cached.fed, self.reused = [self.prompt.past], [self.prompt.past]

    def _ids(self, row: int) -> list[int]:
        found: list[int] = self.state.tokens[row, : self.state.lengths[row]].tolist()
        return found

    def kept(self) -> list[torch.Tensor]:
        """Hidden states [1, t, D] of what was kept of a single prompt."""
        return [] if self.prompt is None or self.prompt.hidden is None else [self.prompt.hidden]

    def piece(self, fed: int, most: int) -> int:
        """Tokens to feed next, up to ``most``, after ``fed`` tokens: no forward goes across a border."""
        border = None if self.prompt is None else self.prompt.border(fed)
        return most if border is None else min(most, border - fed)

    def keep(self, cache: Any, fed: int, hidden: list[torch.Tensor]) -> None:
        """Keep the last block of a single prompt if ``fed`` tokens end at a border.

        Args:
            hidden: [1, t, D] each, hidden states of the last forwards.
        """
        if self.prompt is not None:
            self.prompt.freeze(cache, fed, _last(hidden, self.prefixes.block) if self.wants_hidden else None)

    def feed_rows(self, cached: CachedModel, hidden_of: Callable[[], torch.Tensor | None]) -> list[torch.Tensor]:
        """Feed several prompts up to their last border, into a cache of all of them, which becomes that of ``cached``.

        Args:
            hidden_of: gives the hidden states of the last forward.

        Returns:
            Hidden states [R, t, D] of what is in the cache now, if they are wanted.
        """
        lengths = self.state.lengths
        rows, order = distinct(self.state.tokens[:, : lengths[0]])
        self.prefixes.hits["repeated rows"] += len(order) - len(rows)
        caches, hidden = [copied(cached.cache) for _ in rows], list[torch.Tensor]()
        past, fed = list[int](), 0
        for row, cache in zip(rows, caches, strict=True):
            prompt = self.prefixes.begin(self._ids(row), self.namespace, cache)
            prompt.thaw(cache)
            past.append(prompt.past)
            alone = CachedModel(cached.model, cache, [0], cached.ragged, prompt.past)
            found = [] if prompt.hidden is None else [prompt.hidden]
            while (border := prompt.border(alone.fed[0])) is not None:
                start = alone.fed[0]
                alone.forward(self.state.tokens[row : row + 1, start:border], only_last=True)
                alone.keep([border - start])
                last = hidden_of() if self.wants_hidden else None
                found += [] if last is None else [last]
                prompt.freeze(cache, border, last)
            fed = alone.fed[0]
            hidden += [torch.cat(found, 1)] if found else []
        if not fed:
            return []
        cached.cache = joined(caches, order)
        cached.fed = [fed] * len(order)
        self.reused = [past[number] if row in rows else fed for row, number in enumerate(order)]
        return [torch.cat(hidden)[order]] if hidden else []


def prefixed_prompts(model: Any, state: State, cached: CachedModel, wants_hidden: bool) -> PrefixedPrompts | None:
    """Look up the prompts of a batch; None where the model has no prefix cache, or it does not serve them."""
    prefixes = find_prefixes(model)
    if prefixes is None:
        return None
    reason = prefixes.obstacle(max(state.lengths), cached.cache)
    if reason is None and any(state.pads):
        reason = "a batch with padding"
    if reason is None and not can_join(cached.cache) and len(distinct(state.tokens[:, : state.lengths[0]])[0]) > 1:
        reason = "different prompts in one batch of this kind of cache"
    if reason is not None:
        prefixes.leave_alone(reason)
        return None
    return PrefixedPrompts(prefixes, state, cached, wants_hidden)


def _last(pieces: list[torch.Tensor], count: int) -> torch.Tensor:
    """The last ``count`` tokens of hidden states [1, t, D] in pieces."""
    taken, tokens = list[torch.Tensor](), 0
    for piece in reversed(pieces):
        taken.insert(0, piece)
        tokens += piece.shape[1]
        if tokens >= count:
            break
    return torch.cat(taken, 1)[:, -count:]
