"""A smaller model with the same vocabulary drafts (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from patchkit.anatomy.target import Target
from patchkit.errors import StreamError, UnsupportedModel
from patchkit.speculation.cached_model import CachedModel, keeps_own_cache, make_cache, table_of_positions
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
    """The draft's cache, and what it drafted last.

    Rows are fed to the draft when it is first asked for drafts of them, so the last rows of the batch may not be in the cache yet.
    """

    def __init__(self, options: DraftModel, state: State) -> None:
        self.options = options
        # A shortened prompt moves up: token i of the text is token i - skipped of what the draft sees.
        self.skipped = [0 if any(state.pads) else _skipped(options.context, length) for length in state.lengths]
        self.limit = table_of_positions(options.model)
        self.cached: CachedModel | None = None
        self.aligned = self._new_cache(state.pads).aligned
        self.drafts: list[list[int]] = []  # of the last round, for the rows in the cache

    def propose(self, state: State, k: int) -> Proposal | None:
        if self.limit is not None and max(state.lengths) + k > self.limit:
            return None
        self._take_back(state)
        logits = self._catch_up(state)
        assert self.cached is not None
        draws = Draws(state, greedy=not self.options.sample)
        for i in range(k):
            draws.draw(self.cached.forward(draws.last[:, None])[:, -1] if i else logits)
        self.drafts = draws.tokens.tolist()
        return Proposal(draws.tokens, [k] * state.rows, draws.probabilities)

    def join(self, other: Any) -> None:
        self._forget_drafts()
        other._forget_drafts()
        if self.cached is None or (other.cached is not None and len(self.cached.fed) < len(self.skipped)):
            self.cached = None  # rows are in the cache in the order of the batch: read all again
        elif other.cached is not None:
            self.cached.join(other.cached)
        self.skipped = self.skipped + other.skipped

    def select_rows(self, rows: list[int]) -> None:
        self._forget_drafts()
        if self.cached is not None:
            inside = [row for row in rows if row < len(self.cached.fed)]
            if inside and inside == rows[: len(inside)]:
                self.cached.select_rows(inside)
            else:
                self.cached = None  # a row that is not in the cache comes before one that is
        self.skipped = [self.skipped[row] for row in rows]

    def _new_cache(self, pads: list[int]) -> CachedModel:
        assert self.options.able is not None
        own, ragged = self.options.able
        return CachedModel(self.options.model, None if own else make_cache(self.options.model), pads, ragged=ragged and not own)

    def _forget_drafts(self) -> None:
        """Take all drafts of the last round out of the cache."""
        if self.cached is not None and self.cached.pending:
            self.cached.keep([0] * len(self.cached.fed))
        self.drafts = []

    def _take_back(self, state: State) -> None:
        """Of the drafts in the cache, keep those that have become part of the text."""
        if self.cached is None or not self.cached.pending:
            return
        counts = []
        for row, drafts in enumerate(self.drafts):
            start = self.cached.fed[row] + self.skipped[row]
            known = state.tokens[row, start : state.lengths[row] - 1].tolist()  # the last token is fed again, for its logits
            counts.append(_common_prefix(drafts[: self.cached.pending], known))
        self.cached.keep([min(counts)] * len(counts) if self.aligned else counts)

    def _catch_up(self, state: State) -> torch.Tensor:
        """Feed the known tokens that were not fed yet; return the logits [R, V] after the last known token."""
        known = 0 if self.cached is None else len(self.cached.fed)
        logits = [self._feed(self.cached, state, range(known))] if self.cached is not None else []
        if known < state.rows:
            rows = range(known, state.rows)
            cached = self._new_cache(state.pads[known:])
            logits.append(self._feed(cached, state, rows))
            cached.record()
            if self.cached is None:
                self.cached = cached
            else:
                self.cached.join(cached)
        return torch.cat(logits)

    def _feed(self, cached: CachedModel, state: State, rows: range) -> torch.Tensor:
        """Feed what the cache lacks of these rows; return the logits [rows, V] after the last known token of each."""
        fed = [
            [*range(_FIRST), *range(self.skipped[row] + _FIRST, state.lengths[row])]
            if have == 0 and self.skipped[row]
            else list(range(have + self.skipped[row], state.lengths[row]))
            for row, have in zip(rows, cached.fed, strict=True)
        ]
        counts = [len(columns) for columns in fed]
        tokens = state.tokens.new_zeros(len(rows), max(counts))
        for index, (row, columns) in enumerate(zip(rows, fed, strict=True)):
            tokens[index, : len(columns)] = state.tokens[row, columns]
        logits = cached.forward(tokens, only_last=len(set(counts)) == 1)
        cached.keep(counts)
        if logits.shape[1] == 1:
            return logits[:, 0]
        return logits[torch.arange(len(rows), device=logits.device), torch.tensor(counts, device=logits.device) - 1]


def _skipped(context: int | None, length: int) -> int:
    """Number of tokens of a prompt that the draft does not see."""
    return 0 if context is None else max(0, length - _FIRST - context)


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
