"""The session of a draft model with another tokenizer than the target's.

The draft reads the text of each row in its own tokens. What it appends is

* in greedy runs, and with ``sample=False``, the draft's most likely tokens: their text, tokenized for the target, is a deterministic
  proposal ("universal assisted decoding", https://huggingface.co/blog/universal_assisted_generation);
* in sampled runs, tokens drawn from the draft's distribution over the tokens that both vocabularies share, under the run's processors,
  so that they are accepted by the rejection rule (Timor et al. 2025, https://arxiv.org/abs/2502.05202, algorithm 4).

Shapes: R rows, V vocabulary of the target, W of the draft.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from patchkit.speculation.drafter import Draws, Proposal, Session, State, chains
from patchkit.speculation.retokenized import Retokenized
from patchkit.speculation.row_caches import RowCaches
from patchkit.speculation.tokenizer_pair import TokenizerPair

# Logits of tokens that the draft does not have. Finite, so that there is a distribution where a processor allows nothing else.
_NONE = -1e9
# The most tokens of the draft that one token of the target is worth when the number of steps is chosen.
_MOST_STEPS = 4


class RetokenizedSession(Session):
    """The rows' texts, and the caches of the draft.

    Args:
        model: the draft.
        pair: both tokenizers.
        state: of the call.
        sample: draw drafts in sampled runs.
        able: whether the draft keeps a cache of its own, and whether rows may advance by themselves.
        context: (n, m) feeds the first n and the last m tokens of a longer prompt only; None feeds all of it.
        limit: the most positions that the draft has; None for any number.
    """

    def __init__(
        self,
        model: Any,
        pair: TokenizerPair,
        state: State,
        sample: bool,
        able: tuple[bool, bool],
        context: tuple[int, int] | None,
        limit: int | None,
    ) -> None:
        self.pair, self.context, self.limit = pair, context, limit
        self.texts = [Retokenized(pair) for _ in range(state.rows)]
        self.caches = RowCaches(model, state.rows, *able)
        # Of each row, tokens of a long prompt that are left out behind its first ones; None before its first round.
        self.skipped: list[int | None] = [None] * state.rows
        self.shared = torch.from_numpy(pair.shared).to(state.tokens.device) if sample and state.sampler is not None else None

    def propose(self, state: State, k: int) -> Proposal | None:
        for row, text in enumerate(self.texts):
            text.extend(state.text(row)[len(text.tokens) :].tolist())
        ids = self._shortened()
        ratio = max(text.ratio for text in self.texts)
        steps = k if self.shared is not None else math.ceil(k * min(ratio, _MOST_STEPS))
        if min(map(len, ids)) < 2 or (self.limit is not None and max(map(len, ids)) + steps > self.limit):
            return None
        logits = self.caches.feed(ids)
        if self.shared is not None:
            return self._drawn(state, self.shared, logits, k)
        drafts = self._likeliest(logits, steps)
        found = [text.continuation(draft)[:k] for text, draft in zip(self.texts, drafts, strict=True)]
        return chains(found, state.tokens.device)

    def select_rows(self, rows: list[int]) -> None:
        self.texts = [self.texts[row] for row in rows]
        self.skipped = [self.skipped[row] for row in rows]
        self.caches.select_rows(rows)

    def join(self, other: Any) -> None:
        self.texts, self.skipped = self.texts + other.texts, self.skipped + other.skipped
        self.caches.join(other.caches)

    def _shortened(self) -> list[list[int]]:
        """The draft's tokens of every row, without those of a long prompt that are left out."""
        first, last = self.context or (0, 0)
        ids = []
        for row, text in enumerate(self.texts):
            skipped = self.skipped[row]
            if skipped is None:
                skipped = self.skipped[row] = max(0, len(text.ids) - first - last) if self.context else 0
            ids.append(text.ids[:first] + text.ids[first + skipped :])
        return ids

    def _likeliest(self, logits: torch.Tensor, steps: int) -> list[list[int]]:
        """The draft's most likely tokens after its logits [R, W], until every row has ended."""
        drafts: list[list[int]] = [[] for _ in self.texts]
        for _ in range(steps):
            tokens = logits.argmax(-1).tolist()
            for draft, token in zip(drafts, tokens, strict=True):
                draft.append(token)
            if len(drafts[0]) == steps or all(any(map(self.pair.ends, draft)) for draft in drafts):
                break
            logits = self.caches.append([[token] for token in tokens])
        return drafts

    def _drawn(self, state: State, shared: torch.Tensor, logits: torch.Tensor, k: int) -> Proposal | None:
        """Drafts that are drawn after the draft's logits [R, W] from the tokens that both vocabularies share.

        A row's drafts end with the first token that the draft does not have, which only a processor can bring about, or that ends a text.
        """
        counts = [None if text.complete else 0 for text in self.texts]
        draws = Draws(state)
        for i in range(k):
            draws.draw(_spread(logits, shared))
            tokens = shared[draws.last].tolist()
            for row, token in enumerate(tokens):
                if counts[row] is None and (token < 0 or self.pair.ends(token)):
                    counts[row] = i + 1
            if i + 1 == k or all(count is not None for count in counts):
                break
            logits = self.caches.append([[max(token, 0)] for token in tokens])
        found = draws.tokens
        kept = [found.shape[1] if count is None else count for count in counts]
        return Proposal(found, kept, draws.probabilities) if any(kept) else None


def _spread(logits: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Logits [R, V] of the target's tokens, given those of the draft's [R, W] and the draft's token for each of the target's [V]."""
    return logits.float()[:, shared.clamp(min=0)].masked_fill(shared < 0, _NONE)
