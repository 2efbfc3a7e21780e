"""The grammars of the rows of one call of `generate`: which drafts they allow, and the masks of a round.

Shapes: R rows still generating, n drafts, W words of a mask. Mask i of a row is of the token after its first i drafts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from patchkit.grammar.library import llguidance
from patchkit.grammar.masks import allows, apply, check_width, mask_of, only_token
from patchkit.grammar.matcher import Matcher
from patchkit.grammar.processor import Grammar
from patchkit.grammar.together import Together
from patchkit.grammar.vocabulary import Vocabulary
from patchkit.speculation.drafter import State
from patchkit.speculation.stops import KEEP_THE_ONLY_ONE


class Constraint:
    """The parsers of the rows, and the masks of the current round. A row may have no grammar, and then anything may follow.

    Args:
        vocabulary: the tokens of all grammars.
        matchers: [R], the parser of each row; of several at once for several grammars; None for a row without.
        prompts: [R], tokens of each row's prompt, padding included.

    Attributes:
        texts: [R], the tokens of each row after the prompt.
        masks: [R, 1 + n, W] int32; zeros after a draft that is not allowed.
        only: [R, 1 + n], the token where a mask allows only one.
        applied: how often a mask was applied to all logits of a position, since somebody set it to 0.
        seconds: spent on parsing and on masks, since then.
    """

    def __init__(self, vocabulary: Vocabulary, matchers: Sequence[Matcher | Together | None], prompts: Sequence[int]) -> None:
        self.vocabulary, self.matchers, self.prompts = vocabulary, list(matchers), list(prompts)
        self.texts: list[list[int]] = [[] for _ in self.matchers]
        self._readers = [_RoundMasks(self, row) for row in range(len(self.matchers))]
        self.masks = np.zeros((len(self.matchers), 1, self.vocabulary.words), dtype=np.int32)
        self.only: list[list[int | None]] = []
        self.applied, self.seconds = 0, 0.0
        self._end_mask = mask_of(self.vocabulary.ends, self.vocabulary.words)
        # One per call: a process that is forked has none of the threads of an older one.
        self._executor = llguidance().LLExecutor(num_threads=1)

    def follow(self, state: State) -> None:
        """Bring the parser of each row to the end of the row."""
        started = time.perf_counter()
        for row, (matcher, length) in enumerate(zip(self.matchers, state.lengths, strict=True)):
            if matcher is not None:
                self.texts[row] = state.tokens[row, self.prompts[row] : length].tolist()
                matcher.bring(self.texts[row])
        self.seconds += time.perf_counter() - started

    def forced(self, row: int, most: int, after: list[int] | None = None) -> list[int]:
        """Return up to ``most`` tokens that the parser expects without a choice, end tokens included.

        Args:
            after: drafts; None: at the end of the row, where `follow` has brought the parser.
        """
        matcher, start = self.matchers[row], self.texts[row]
        if matcher is None:
            return []
        started = time.perf_counter()
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
            if matcher is None:
                self.masks[row] = -1  # all bits: anything may follow
                continue
            matcher.fill(self.masks[row, 0])  # and raises where the parser cannot go on
            end = self._end_of(tokens)
            if matcher.parser is None:
                self._fill_one_by_one(row, matcher, tokens[:end])
            elif not matcher.over and end:
                asked.append((matcher.parser, row * (1 + longest), tokens[:end]))
        if asked:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(
                asked, self.masks.ctypes.data, 4 * self.vocabulary.words, len(drafts) * (1 + longest)
            )
            for matcher in self.matchers:
                if isinstance(matcher, Matcher):
                    matcher.note_error()
            for row, (matcher, tokens) in enumerate(zip(self.matchers, drafts, strict=True)):
                if isinstance(matcher, Matcher) and matcher.left_shared():
                    self.masks[row] = 0
                    matcher.fill(self.masks[row, 0])
                    self._fill_one_by_one(row, matcher, tokens[: self._end_of(tokens)])
                if matcher is not None:
                    matcher.check()
        counts = [self._allowed(row, tokens) for row, tokens in enumerate(drafts)]
        self.only = [
            [None] * (1 + longest) if matcher is None else [only_token(mask) for mask in masks]
            for matcher, masks in zip(self.matchers, self.masks, strict=True)
        ]
        self.seconds += time.perf_counter() - started
        return counts

    def likeliest(self, drafted: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`State.likeliest`: [R] int64, by logits [R, V], after each row and its drafts [R, n]. Moves the parsers behind the drafts."""
        started = time.perf_counter()
        chosen = logits.argmax(-1)
        mask = np.empty((1, self.vocabulary.words), dtype=np.int32)
        for row, (token, tokens) in enumerate(zip(chosen.tolist(), drafted.tolist(), strict=True)):
            matcher = self.matchers[row]
            if matcher is None:
                continue
            matcher.bring(self.texts[row] + tokens)
            matcher.fill(mask[0])
            if not allows(mask[0], token):
                chosen[row] = apply(logits[row : row + 1].float(), mask, self.vocabulary.size).argmax(-1)[0]
        self.seconds += time.perf_counter() - started
        return chosen

    def allows(self, row: int, node: int, token: int) -> bool:
        """Return whether ``token`` may follow after the first ``node`` drafts of a row."""
        return self.matchers[row] is None or allows(self.masks[row, node], token)

    def masked(self, row: int, node: int, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [1, V] with minus infinity for what may not follow after the first ``node`` drafts of a row."""
        self.applied += 1
        return apply(scores, self.masks[row, node : node + 1], self.vocabulary.size)

    def check_width(self, width: int) -> None:
        """Refuse a model with fewer logits than the tokenizer has tokens, by a `GrammarError`."""
        check_width(width, self.vocabulary.size)

    def for_judging(self, row: int, own: Any, given: Any) -> Any:
        """Return a row's processors ``own`` with the masks of the current round in place of the grammar.

        Args:
            given: the processors of the call of `generate`, in the same order.
        """
        result = type(own)()
        for processor, each in zip(own, given, strict=True):
            if not isinstance(each, Grammar):
                result.append(processor)
            elif self._readers[row] not in result:  # one mask is of all grammars
                result.append(self._readers[row])
        return result

    def select_rows(self, rows: list[int]) -> None:
        """Keep these rows, in this order: the others have finished."""
        for name in ("matchers", "prompts", "texts", "_readers"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        self._number_readers()

    def join(self, other: Constraint) -> None:
        """Constrain the rows of another constraint of the same vocabulary too, after one's own."""
        for name in ("matchers", "prompts", "texts", "_readers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._number_readers()
        self.applied, self.seconds = self.applied + other.applied, self.seconds + other.seconds

    @property
    def is_free(self) -> bool:
        """Whether no row has a grammar."""
        return not any(matcher is not None for matcher in self.matchers)

    def _number_readers(self) -> None:
        for row, reader in enumerate(self._readers):
            reader.constraint, reader.row = self, row

    def _fill_one_by_one(self, row: int, matcher: Matcher | Together, tokens: list[int]) -> None:
        masks = self.masks[row]
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
        matcher = self.matchers[row]
        if matcher is None:
            return len(tokens)
        over = matcher.over
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

    def __init__(self, constraint: Constraint, row: int) -> None:
        self.constraint, self.row = constraint, row

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        """Return scores [1, V], masked for the position after input_ids [1, T]."""
        constraint, row = self.constraint, self.row
        return constraint.masked(row, input_ids.shape[1] - constraint.prompts[row] - len(constraint.texts[row]), scores)


def constraint_of(processors: Any, prompt: int, rows: int) -> Constraint | None:
    """Return the constraint of one call of `generate`; None without a grammar, or with several of different vocabularies.

    The latter are then asked token by token.
    """
    grammars = [each for each in processors if isinstance(each, Grammar)]
    if not grammars or any(each.vocabulary is not grammars[0].vocabulary for each in grammars):
        return None
    return Constraint(grammars[0].vocabulary, matchers_of(grammars, rows), [prompt] * rows)


def unconstrained(vocabulary: Vocabulary, rows: int) -> Constraint:
    """Return the constraint of ``rows`` rows without a grammar, which constrained rows can join."""
    return Constraint(vocabulary, [None] * rows, [0] * rows)


def other_than_grammars(processors: Any) -> bool:
    """Whether there are processors that are not grammars."""
    return not all(isinstance(each, Grammar) for each in processors)


def matchers_of(grammars: list[Grammar], rows: int) -> list[Matcher | Together]:
    """Return new parsers for the rows of a batch, for which all ``grammars`` hold."""
    if len(grammars) == 1:
        return [*grammars[0].matchers(rows)]
    return [Together(each) for each in zip(*(grammar.matchers(rows) for grammar in grammars), strict=True)]


def grammar_decides(processors: Any) -> bool:
    """Return whether a token that a grammar forces is chosen whatever the other processors do: none of them may forbid it."""
    return all(isinstance(each, Grammar) or type(each).__name__ in KEEP_THE_ONLY_ONE for each in processors)
