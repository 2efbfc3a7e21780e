"""A smaller model drafts, with the same tokenizer or another (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from patchkit.anatomy.target import Target
from patchkit.errors import StreamError, UnsupportedModel
from patchkit.models import load_model
from patchkit.speculation.cached_model import CachedModel, keeps_own_cache, make_cache, table_of_positions
from patchkit.speculation.drafter import Drafter, Draws, Proposal, Session, State
from patchkit.speculation.find_tokenizers import find_pair
from patchkit.speculation.obstacles import find_obstacle
from patchkit.speculation.retokenized_session import RetokenizedSession
from patchkit.speculation.tokenizer_pair import TokenizerPair, vocabulary

# First tokens that a shortened prompt keeps: attention needs them (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).
_FIRST = 4


@dataclass(frozen=True)
class DraftModel(Drafter, name="draft_model"):
    """Another causal LM drafts, one token after the other, with a cache of its own.

    A draft with another tokenizer reads the text in its own tokens, and its drafts are tokenized for the target: that is slower, and exact
    all the same. It needs both tokenizers. One that is not given is loaded by its model's ``name_or_path``.

    Args:
        model: the draft, loaded, on the target's device, where it is not changed; or a name or path that `load_model` accepts.
        sample: in sampled runs, draw drafts from the draft's own distribution under the run's processors and accept them by the
            rejection rule; with another tokenizer, from the tokens that both have. False proposes its most likely tokens: they are
            accepted less often at high temperatures, but leave the text that a seed gives what it is without drafts.
        context: feed only the first 4 and the last ``context`` tokens of a longer prompt; None feeds all of it.
        tokenizer: of the target, or the name or path of a model that has it.
        draft_tokenizer: of the draft, or the name or path of a model that has it.

    Raises:
        TypeError: model is no transformers model, or a tokenizer is none.
        ValueError: context < 1.
    """

    example = "draft_model('stdlib-1m-draft')"
    any_model = False

    model: Any
    sample: bool = True
    context: int | None = None
    tokenizer: Any = None
    draft_tokenizer: Any = None
    # What `prepared` finds out: whether the model keeps a cache of its own, and whether rows may advance by themselves; the tokenizers,
    # where the draft has others; and the target's vocabulary size.
    able: tuple[bool, bool] | None = field(default=None, init=False, repr=False, compare=False)
    pair: TokenizerPair | None = field(default=None, init=False, repr=False, compare=False)
    size: int | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        if not isinstance(self.model, str) and (not hasattr(self.model, "get_input_embeddings") or not hasattr(self.model, "config")):
            raise TypeError(f"the draft is a {type(self.model).__name__}: give a causal LM of transformers, or its name or path")
        if self.context is not None and self.context < 1:
            raise ValueError(f"context={self.context}: give at least 1 token, or None for the whole prompt")
        for name in ("tokenizer", "draft_tokenizer"):
            given = getattr(self, name)
            if isinstance(given, Path):
                object.__setattr__(self, name, str(given))
            elif given is not None and not isinstance(given, str) and not hasattr(given, "get_vocab"):
                raise TypeError(f"{name}={given!r}: give a tokenizer of transformers, or the name or path of a model that has it")

    def check(self, target: Target) -> None:
        drafter, pair = self._with_tokenizers(target)
        model, name, own = drafter.model, type(target.model).__name__, type(drafter.model).__name__
        if model is target.model:
            raise UnsupportedModel(
                f"the draft is the target itself: give a smaller model, or SelfDraft(patches) to draft with a patched view of {name}"
            )
        if model.device != target.model.device:
            raise UnsupportedModel(
                f"the draft is on {model.device}, {name} on {target.model.device}: move it, draft.to('{target.model.device}')"
            )
        obstacle, _ = _able(model)
        if obstacle is not None:
            raise UnsupportedModel(f"{own} cannot draft: {obstacle}")
        target.views[id(self)] = drafter, pair

    def prepared(self, target: Target) -> Drafter:
        drafter, pair = target.views.pop(id(self), None) or self._with_tokenizers(target)
        ready = dataclasses.replace(drafter)
        object.__setattr__(ready, "able", (keeps_own_cache(drafter.model), _able(drafter.model)[1]))
        object.__setattr__(ready, "pair", pair)
        object.__setattr__(ready, "size", vocabulary(target.model))
        return ready

    def begin(self, model: Any, state: State) -> Session:
        if self.model.device != state.tokens.device:
            raise UnsupportedModel(
                f"the draft is on {self.model.device}, the text on {state.tokens.device}: unpatch, move both, patch again"
            )
        if self.pair is None:
            return DraftModelSession(self, state)
        assert self.able is not None
        context = None if self.context is None else (_FIRST, self.context)
        return RetokenizedSession(self.model, self.pair, state, self.sample, self.able, context, table_of_positions(self.model))

    def note(self) -> str | None:
        if self.pair is None:
            return None
        return f"{self}: re-tokenized in every round, because the draft has another tokenizer, which is slower than one with the same"

    def __str__(self) -> str:
        if isinstance(self.model, str):
            return f"draft_model({self.model})"
        return f"draft_model({type(self.model).__name__}, {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters)"

    def _with_tokenizers(self, target: Target) -> tuple[DraftModel, TokenizerPair | None]:
        """This drafter with its model loaded, and both tokenizers where the draft has another than the target."""
        drafter = self
        if isinstance(self.model, str):
            model, tokenizer = load_model(self.model, target.model.dtype)
            moved: Any = model
            drafter = dataclasses.replace(self, model=moved.to(target.model.device), draft_tokenizer=self.draft_tokenizer or tokenizer)
        return drafter, find_pair(target.model, drafter.model, drafter.tokenizer, drafter.draft_tokenizer)


class DraftModelSession(Session):
    """The draft's cache, and what it drafted last.

    Rows are fed to the draft when it is first asked for drafts of them, so the last rows of the batch may not be in the cache yet.
    """

    def __init__(self, options: DraftModel, state: State) -> None:
        self.options = options
        # A shortened prompt moves up: token i of the text is token i - skipped of what the draft sees.
        self.skipped = [0 if any(state.pads) else _skipped(options.context, length) for length in state.lengths]
        self.limit = table_of_positions(options.model)
        own_size = vocabulary(options.model)
        # Vocabularies of one tokenizer may be padded to different sizes.
        self.sizes = (own_size, options.size) if options.size not in (None, own_size) else None
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
            draws.draw(self._fitted(self._forward(self.cached, draws.last[:, None])[:, -1] if i else logits))
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
        logits = self._forward(cached, tokens, only_last=len(set(counts)) == 1)
        cached.keep(counts)
        if logits.shape[1] == 1:
            return logits[:, 0]
        return logits[torch.arange(len(rows), device=logits.device), torch.tensor(counts, device=logits.device) - 1]

    def _forward(self, cached: CachedModel, tokens: torch.Tensor, only_last: bool = False) -> torch.Tensor:
        return cached.forward(tokens if self.sizes is None else tokens.clamp(max=self.sizes[0] - 1), only_last)

    def _fitted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] of as many tokens as the target has."""
        if self.sizes is None:
            return logits
        own, size = self.sizes
        return logits[:, :size] if own > size else torch.nn.functional.pad(logits, (0, size - own), value=-1e9)


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
