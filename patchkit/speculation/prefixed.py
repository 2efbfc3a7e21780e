"""The prompts of a batch on a model that is patched with `prefix_cache` too: what is kept is not fed, and what is fed is kept.

A single prompt is fed into the batch's own cache, up to the next border at a time. Of several, each different one is fed once: alone up to
its last border, then the rest of all of them together. The rows of equal prompts are repeated at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchkit.prefix.generate import distinct
from patchkit.prefix.prompt import Prompt
from patchkit.prefix.shared import Prefixes, find_prefixes
from patchkit.prefix.snapshot import can_join, copied, joined, repeat_rows
from patchkit.speculation.cached_model import CachedModel
from patchkit.speculation.drafter import State


class PrefixedPrompts:
    """The prompts of one batch, which have equal lengths and no padding; its cache is empty.

    Args:
        wants_hidden: the drafter wants the target's hidden states of the whole prompt.

    Attributes:
        prompts: [D, L] int64, each different prompt once.
        reused: [R], tokens of each prompt that were kept, or are fed for an equal one.
    """

    def __init__(self, prefixes: Prefixes, state: State, cached: CachedModel, wants_hidden: bool) -> None:
        self.prefixes, self.wants_hidden = prefixes, wants_hidden
        self._rows, self._order = distinct(state.tokens[:, : state.lengths[0]])
        self.prompts = state.tokens[self._rows, : state.lengths[0]]
        self._lookups = prefixes.lookups(cached.cache, wants_hidden)
        self.prompt: Prompt | None = None  # of a batch of one row
        self.reused = [0] * state.rows
        if state.rows == 1:
            self.prompt = self._lookups.begin(self.prompts[0].tolist(), cached.cache)
            self.prompt.thaw(cached.cache)
            cached.fed, self.reused = [self.prompt.past], [self.prompt.past]

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
        """Feed each different one of several prompts up to the last border; from now on ``cached`` has a row for each, until `repeat`.

        Args:
            hidden_of: gives the hidden states of the last forward.

        Returns:
            Hidden states [D, t, D] of what is in the cache now, if they are wanted.
        """
        self.prefixes.hits["repeated rows"] += len(self._order) - len(self.prompts)
        several = bool(self.prefixes.last_border(self.prompts.shape[1]))
        caches, hidden = [copied(cached.cache) if several else cached.cache for _ in self.prompts], list[torch.Tensor]()
        past, fed = list[int](), 0
        for row, cache in enumerate(caches):
            prompt = self._lookups.begin(self.prompts[row].tolist(), cache)
            prompt.thaw(cache)
            past.append(prompt.past)
            alone = CachedModel(cached.model, cache, [0], cached.ragged, prompt.past)
            found = [] if prompt.hidden is None else [prompt.hidden]
            while (border := prompt.border(alone.fed[0])) is not None:
                start = alone.fed[0]
                alone.forward(self.prompts[row : row + 1, start:border], only_last=True)
                alone.keep([border - start])
                last = hidden_of() if self.wants_hidden else None
                found += [] if last is None else [last]
                prompt.freeze(cache, border, last)
            fed = alone.fed[0]
            hidden += [torch.cat(found, 1)] if found else []
        if fed:
            cached.cache = joined(caches)
        cached.fed, cached.pads = [fed] * len(caches), [0] * len(caches)
        self.reused = [past[number] if row in self._rows else self.prompts.shape[1] for row, number in enumerate(self._order)]
        return [torch.cat(hidden)] if hidden else []

    def repeat(self, cached: CachedModel, logits: torch.Tensor, hidden: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Let ``cached`` have all rows of the batch again, once the prompts are fed.

        Args:
            logits: [D, T, V].
            hidden: [D, t, D] each, hidden states.

        Returns:
            Both for all rows.
        """
        rows = len(self._order)
        if rows == len(self.prompts):
            return logits, hidden
        repeat_rows(cached.cache, self._order)
        cached.fed, cached.pads = cached.fed[:1] * rows, [0] * rows
        return logits[self._order], [each[self._order] for each in hidden]


def prefixed_prompts(model: Any, state: State, cached: CachedModel, wants_hidden: bool, chunk: int | None) -> PrefixedPrompts | None:
    """Look up the prompts of a batch; None where the model has no prefix cache, or it does not serve them.

    Args:
        chunk: the call's ``prefill_chunk_size``.
    """
    prefixes = find_prefixes(model)
    if prefixes is None:
        return None
    reason = prefixes.obstacle(max(state.lengths), cached.cache, chunk)
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
