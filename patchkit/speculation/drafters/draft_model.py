"""A smaller model with the same vocabulary drafts (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from patchkit.anatomy.target import Target
from patchkit.errors import StreamError, UnsupportedModel
from patchkit.speculation.cached_model import CachedModel, keeps_own_cache, make_cache
from patchkit.speculation.drafter import Drafter, Draws, Proposal, Session, State
from patchkit.speculation.obstacles import find_obstacle

# First tokens that a shortened prompt keeps: attention needs them (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).
_FIRST = 4


@dataclass(frozen=True, eq=False)
class DraftModel(Drafter):
    """Another causal LM drafts, one token after the other, with a cache of its own.

    Args:
        model: the draft, loaded, on the target's device; it is not changed.
        sample: in sampled runs, draw drafts from the draft's own distribution under the run's processors and accept them by the
            rejection rule. False proposes its most likely tokens: they are accepted less often at high temperatures, but leave the text
            that a seed gives what it is without drafts.
        context: feed only the first 4 and the last ``context`` tokens of a longer prompt; None feeds all of it.

    Raises:
        TypeError: model is no transformers model.
        ValueError: context < 1.
    """

    model: Any
    sample: bool = True
    context: int | None = None
    # Whether the model keeps a cache of its own, and whether rows may advance by themselves; found out in `prepared`.
    able: tuple[bool, bool] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not hasattr(self.model, "get_input_embeddings") or not hasattr(self.model, "config"):
            raise TypeError(f"the draft is a {type(self.model).__name__}: give a causal LM of transformers, or a path as draft='...'")
        if self.context is not None and self.context < 1:
            raise ValueError(f"context={self.context}: give at least 1 token, or None for the whole prompt")

    def check(self, target: Target) -> None:
        name, own = type(target.model).__name__, type(self.model).__name__
        if self.model is target.model:
            raise UnsupportedModel(
                f"the draft is the target itself: give a smaller model, or SelfDraft(patches) to draft with a patched view of {name}"
            )
        if vocabulary(target.model) != vocabulary(self.model):
            raise UnsupportedModel(
                f"the draft {own} has a vocabulary of {vocabulary(self.model)} tokens, {name} one of {vocabulary(target.model)}: "
                "give a draft with the same tokenizer"
            )
        if self.model.device != target.model.device:
            raise UnsupportedModel(
                f"the draft is on {self.model.device}, {name} on {target.model.device}: move it, draft.to('{target.model.device}')"
            )
        obstacle, _ = _able(self.model)
        if obstacle is not None:
            raise UnsupportedModel(f"{own} cannot draft: {obstacle}")

    def prepared(self, target: Target) -> Drafter:
        return dataclasses.replace(self, able=(keeps_own_cache(self.model), _able(self.model)[1]))

    def begin(self, model: Any, state: State) -> Session:
        if self.model.device != state.tokens.device:
            raise UnsupportedModel(
                f"the draft is on {self.model.device}, the text on {state.tokens.device}: unpatch, move both, patch again"
            )
        return DraftModelSession(self, state)

    def __str__(self) -> str:
        return f"draft_model({type(self.model).__name__}, {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters)"


def vocabulary(model: Any) -> int:
    """Vocabulary size of the model: tokens that it takes and gives."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


class DraftModelSession(Session):
    """The draft's cache, and what it drafted last."""

    def __init__(self, options: DraftModel, state: State) -> None:
        self.options = options
        length = state.lengths[0]
        # A shortened prompt moves up: token i of the text is token i - skipped of what the draft sees.
        self.skipped = 0
        if options.context is not None and not any(state.pads):
            self.skipped = max(0, length - _FIRST - options.context)
        assert options.able is not None
        own, ragged = options.able
        cache = None if own else make_cache(options.model)
        self.cached = CachedModel(options.model, cache, state.pads, ragged=not own and ragged)
        config = options.model.config.get_text_config(decoder=True)
        # Tables of positions end; rotary ones do not.
        self.limit = None if getattr(config, "rope_parameters", None) else getattr(config, "max_position_embeddings", None)
        self.aligned = self.cached.aligned
        self.drafts: list[list[int]] = [[] for _ in range(state.rows)]  # of the last round

    def propose(self, state: State, k: int) -> Proposal | None:
        if self.limit is not None and max(state.lengths) + k > self.limit:
            return None
        self._take_back(state)
        logits = self._catch_up(state)
        draws = Draws(state, greedy=not self.options.sample)
        for i in range(k):
            draws.draw(self.cached.forward(draws.last[:, None])[:, -1] if i else logits)
        self.drafts = draws.tokens.tolist()
        return Proposal(draws.tokens, [k] * state.rows, draws.probabilities)

    def select_rows(self, rows: list[int]) -> None:
        self.cached.keep([0] * len(self.drafts))
        self.cached.select_rows(rows)
        self.drafts = [[] for _ in rows]

    def _take_back(self, state: State) -> None:
        """Of the drafts in the cache, keep those that have become part of the text."""
        pending = self.cached.pending
        if not pending:
            return
        counts = []
        for row, drafts in enumerate(self.drafts):
            start = self.cached.fed[row] + self.skipped
            known = state.tokens[row, start : state.lengths[row] - 1].tolist()  # the last token is fed again, for its logits
            counts.append(_common_prefix(drafts[:pending], known))
        self.cached.keep([min(counts)] * len(counts) if self.aligned else counts)

    def _catch_up(self, state: State) -> torch.Tensor:
        """Feed the known tokens that were not fed yet; return the logits [R, V] after the last known token."""
        unfed = [length - self.skipped - fed for length, fed in zip(state.lengths, self.cached.fed, strict=True)]
        first = self.cached.fed[0] == 0
        if first and self.skipped:
            tokens = torch.cat([state.tokens[:, :_FIRST], state.tokens[:, self.skipped + _FIRST : max(state.lengths)]], 1)
        else:
            tokens = state.tokens.new_zeros(state.rows, max(unfed))
            for row, (count, length) in enumerate(zip(unfed, state.lengths, strict=True)):
                tokens[row, :count] = state.tokens[row, length - count : length]
        logits = self.cached.forward(tokens, only_last=len(set(unfed)) == 1)
        self.cached.keep(unfed)
        if first:
            self.cached.record()
        if logits.shape[1] == 1:
            return logits[:, 0]
        rows = torch.arange(state.rows, device=logits.device)
        return logits[rows, torch.tensor(unfed, device=logits.device) - 1]


def _able(model: Any) -> tuple[str | None, bool]:
    """`find_obstacle`, also of a model that a patch has given a cache of its own; that cache only has to be one that rolls back."""
    if not keeps_own_cache(model):
        return find_obstacle(model, drafts=True)
    cached = CachedModel(model, None, [0], ragged=False)
    with torch.no_grad():
        cached.forward(torch.zeros(1, 2, dtype=torch.int64, device=model.device))
    try:
        cached.record()
    except StreamError as error:
        return str(error), False
    return None, False


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
