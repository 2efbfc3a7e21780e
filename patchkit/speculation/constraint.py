"""The grammars of the rows of one call of `generate`: which drafts they allow, and the masks of a round.

Shapes: R rows still generating, n drafts, W words of a mask. Mask i of a row is of the token after its first i drafts.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from patchkit.grammar.library import llguidance
from patchkit.grammar.masks import allows, apply, check_width, mask_of, only_token
from patchkit.grammar.matcher import Matcher
from patchkit.grammar.processor import Grammar
from patchkit.grammar.together import Together
from patchkit.speculation.drafter import State


class Constraint:
    """The parsers of the rows, and the masks of the current round.

    Args:
        grammars: the processors that the call of `generate` was given, of one vocabulary; all hold for every row.
        prompt: tokens of the prompt, padding included.
        rows: of the batch.

    Attributes:
        numbers: [R], of the rows in the batch.
        texts: [R], the tokens of each row after the prompt.
        masks: [R, 1 + n, W] int32; zeros after a draft that is not allowed.
        only: [R, 1 + n], the token where a mask allows only one.
        applied: how often a mask was applied to all logits of a position.
        seconds: spent on parsing and on masks.
    """

    def __init__(self, grammars: list[Grammar], prompt: int, rows: int) -> None:
        self.prompt = prompt
        self.vocabulary = grammars[0].vocabulary
        self.matchers = matchers_of(grammars, rows)
        self.numbers = list(range(rows))
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.masks = np.zeros((rows, 1, self.vocabulary.words), dtype=np.int32)
        self.only: list[list[int | None]] = []
        self.applied, self.seconds = 0, 0.0
        self._end_mask = mask_of(self.vocabulary.ends, self.vocabulary.words)
        # One per call: a process that is forked has none of the threads of an older one.
        self._executor = llguidance().LLExecutor(num_threads=1)

    def follow(self, state: State) -> None:
        """Bring the parser of each row to the end of the row."""
        started = time.perf_counter()
        for row, (matcher, length) in enumerate(zip(self.matchers, state.lengths, strict=True)):
            self.texts[row] = state.tokens[row, self.prompt : length].tolist()
            matcher.bring(self.texts[row])
        self.seconds += time.perf_counter() - started

    def forced(self, row: int, most: int, after: list[int] | None = None) -> list[int]:
        """Return up to ``most`` tokens that the parser expects without a choice, end tokens included.

        Args:
            after: drafts; None: at the end of the row, where `follow` has brought the parser.
        """
        started = time.perf_counter()
        matcher, start = self.matchers[row], self.texts[row]
        if after:
            matcher.bring(start + after)
        found = matcher.forced(most)
        if found and len(found) < most:
            matcher.bring(start + (after or []) + found)
            found = found + (matcher.forced(most - len(found)) if matcher.over else [])
        matcher.bring(start)
        self.seconds += time.perf_counter() - started
        return found

    def fill(self, drafts: list[list[int]]) -> list[int]:
        """Make the masks of a round, after `follow`; return how many drafts of each row are allowed, up to the first that is not."""
        started = time.perf_counter()
        longest = max(map(len, drafts))
        # Zeros: where a draft is illegal the library leaves the masks after it as they were.
        self.masks = np.zeros((len(drafts), 1 + longest, self.vocabulary.words), dtype=np.int32)
        asked = []
        for row, (matcher, tokens) in enumerate(zip(self.matchers, drafts, strict=True)):
            matcher.fill(self.masks[row, 0])  # and raises where the parser cannot go on
            end = self._end_of(tokens)
            if matcher.parser is None:
                self._fill_one_by_one(row, tokens[:end])
            elif not matcher.over and end:
                asked.append((matcher.parser, row * (1 + longest), tokens[:end]))
        if asked:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(
                asked, self.masks.ctypes.data, 4 * self.vocabulary.words, len(drafts) * (1 + longest)
            )
            for matcher in self.matchers:
                matcher.check()
        counts = [self._allowed(row, tokens) for row, tokens in enumerate(drafts)]
        self.only = [[only_token(mask) for mask in masks] for masks in self.masks]
        self.seconds += time.perf_counter() - started
        return counts

    def likeliest(self, drafted: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`State.likeliest`: [R] int64, by logits [R, V], after each row and its drafts [R, n]. Moves the parsers behind the drafts."""
        started = time.perf_counter()
        chosen = logits.argmax(-1)
        mask = np.empty((1, self.vocabulary.words), dtype=np.int32)
        for row, (token, tokens) in enumerate(zip(chosen.tolist(), drafted.tolist(), strict=True)):
            self.matchers[row].bring(self.texts[row] + tokens)
            self.matchers[row].fill(mask[0])
            if not allows(mask[0], token):
                chosen[row] = apply(logits[row : row + 1].float(), mask, self.vocabulary.size).argmax(-1)[0]
        self.seconds += time.perf_counter() - started
        return chosen

    def allows(self, row: int, node: int, token: int) -> bool:
        """Return whether ``token`` may follow after the first ``node`` drafts of a row."""
        return allows(self.masks[row, node], token)

    def masked(self, row: int, node: int, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [1, V] with minus infinity for what may not follow after the first ``node`` drafts of a row."""
        self.applied += 1
        return apply(scores, self.masks[row, node : node + 1], self.vocabulary.size)

    def check_width(self, width: int) -> None:
        """Refuse a model with fewer logits than the tokenizer has tokens, by a `GrammarError`."""
        check_width(width, self.vocabulary.size)

    def for_judging(self, number: int, own: Any, given: Any) -> Any:
        """Return a row's processors with the masks of the current round in place of the grammar.

        Args:
            number: of the row in the batch.
            own: the row's processors.
            given: those of the call of `generate`, in the same order.
        """
        result = type(own)()
        for processor, each in zip(own, given, strict=True):
            if not isinstance(each, Grammar):
                result.append(processor)
            elif not any(isinstance(earlier, _RoundMasks) for earlier in result):  # one mask is of all grammars
                result.append(_RoundMasks(self, number))
        return result

    def select_rows(self, rows: list[int]) -> None:
        """Keep these rows: the others have finished."""
        self.matchers = [self.matchers[row] for row in rows]
        self.numbers = [self.numbers[row] for row in rows]
        self.texts = [self.texts[row] for row in rows]

    def _fill_one_by_one(self, row: int, tokens: list[int]) -> None:
        matcher, masks = self.matchers[row], self.masks[row]
        for i, token in enumerate(tokens):
            if matcher.over or not allows(masks[i], token):
                break
            matcher.bring(self.texts[row] + tokens[: i + 1])
            matcher.fill(masks[i + 1])
        matcher.bring(self.texts[row])

    def _end_of(self, tokens: list[int]) -> int:
        # A drafted token that only pads the model's vocabulary would be an error of the parser.
        ends, size = self.vocabulary.ends, self.vocabulary.size
        return next((i for i, token in enumerate(tokens) if token in ends or token >= size), len(tokens))

    def _allowed(self, row: int, tokens: list[int]) -> int:
        over = self.matchers[row].over
        for i, token in enumerate(tokens):
            if not allows(self.masks[row, i], token):
                return i
            over = over or token in self.vocabulary.ends
            if over:
                self.masks[row, i + 1] = self._end_mask
        return len(tokens)


class _RoundMasks(LogitsProcessor):
    """The masks of the current round, for one row."""

    by_row = True

    def __init__(self, constraint: Constraint, number: int) -> None:
        self.constraint, self.number = constraint, number

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        """Return scores [1, V], masked for the position after input_ids [1, T]."""
        constraint = self.constraint
        row = constraint.numbers.index(self.number)
        return constraint.masked(row, input_ids.shape[1] - constraint.prompt - len(constraint.texts[row]), scores)


def constraint_of(processors: Any, prompt: int, rows: int) -> Constraint | None:
    """Return the constraint of one call of `generate`; None without a grammar, or with several of different vocabularies.

    The latter are then asked token by token.
    """
    grammars = [each for each in processors if isinstance(each, Grammar)]
    if not grammars or any(each.vocabulary is not grammars[0].vocabulary for each in grammars):
        return None
    return Constraint(grammars, prompt, rows)


def matchers_of(grammars: list[Grammar], rows: int) -> list[Matcher | Together]:
    """Return new parsers for the rows of a batch, for which all ``grammars`` hold."""
    if len(grammars) == 1:
        return [*grammars[0].matchers(rows)]
    return [Together(each) for each in zip(*(grammar.matchers(rows) for grammar in grammars), strict=True)]
