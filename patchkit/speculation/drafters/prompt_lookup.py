"""Prompt lookup: propose the tokens that followed the last occurrence of the current n-gram.

Saxena 2023, "Prompt Lookup Decoding" (https://github.com/apoorvumang/prompt-lookup-decoding). Differs from it in that n-grams are
looked up in an index instead of compared with the whole text, the longest first, and that the latest occurrence is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchkit.speculation.drafter import Drafter, Proposal, Session, State, chains


@dataclass(frozen=True)
class PromptLookup(Drafter, name="prompt_lookup"):
    """Draft from the prompt and the text so far. Costs next to nothing, also where nothing is found.

    Args:
        max_ngram: tokens that are compared at first.
        min_ngram: tokens that must agree at least.

    Raises:
        ValueError: not 1 <= min_ngram <= max_ngram.
    """

    example = "prompt_lookup(min_ngram=1)"

    max_ngram: int = 4
    min_ngram: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"min_ngram={self.min_ngram}, max_ngram={self.max_ngram}: give 1 <= min_ngram <= max_ngram")

    def begin(self, model: Any, state: State) -> Session:
        return PromptLookupSession(self, state.rows)

    def __str__(self) -> str:
        return f"prompt_lookup({self.min_ngram} to {self.max_ngram} tokens)"


class PromptLookupSession(Session):
    """The texts so far, and where each of their n-grams last ended."""

    def __init__(self, options: PromptLookup, rows: int) -> None:
        self.sizes = range(options.max_ngram, options.min_ngram - 1, -1)
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.after: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]

    def propose(self, state: State, k: int) -> Proposal | None:
        found = []
        for row in range(state.rows):
            self._read(state, row)
            found.append(self._continuation(row, k))
        return chains(found, state.tokens.device)

    def select_rows(self, rows: list[int]) -> None:
        self.texts = [self.texts[row] for row in rows]
        self.after = [self.after[row] for row in rows]

    def join(self, other: Any) -> None:
        self.texts, self.after = self.texts + other.texts, self.after + other.after

    def _read(self, state: State, row: int) -> None:
        """Index what is new. The last token waits: an n-gram that ends the text has nothing after it yet."""
        text, after = self.texts[row], self.after[row]
        known = len(text)
        text += state.tokens[row, state.pads[row] + known : state.lengths[row]].tolist()
        for end in range(max(known, 1), len(text)):
            for size in self.sizes:
                if size <= end:
                    after[tuple(text[end - size : end])] = end

    def _continuation(self, row: int, k: int) -> list[int]:
        text, after = self.texts[row], self.after[row]
        for size in self.sizes:
            start = after.get(tuple(text[-size:])) if size <= len(text) else None
            if start is not None:
                # A repetition shorter than k goes on into what is being proposed.
                period = len(text) - start
                return [text[start + i % period] for i in range(k)]
        return []
