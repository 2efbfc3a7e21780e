"""The parser of one text, which can be brought to any tokens: `Matcher`."""

from __future__ import annotations

from typing import Any

import numpy as np

from patchkit.errors import GrammarError
from patchkit.grammar.library import llguidance, short
from patchkit.grammar.masks import mask_of
from patchkit.grammar.vocabulary import Vocabulary


class Matcher:
    """A parser at the end of some tokens.

    End tokens are not given to the parser: what may follow one is known without it.

    Args:
        grammar: in llguidance's form.
        vocabulary: the tokens.
        parser: one at the start; None: a new one.
        source: the matcher that this is a copy of, and shares with; None for none.

    Attributes:
        tokens: those that the parser has consumed.
        ended: an end token follows them.
        lost: a token follows them that the grammar does not allow; then only an end is allowed.
        parser: llguidance's matcher; an error of it is final.
        failed: it or a copy of it has met an error, which may hold for what they share.
    """

    def __init__(self, grammar: str, vocabulary: Vocabulary, parser: Any = None, source: Matcher | None = None) -> None:
        self.grammar, self.vocabulary = grammar, vocabulary
        self.tokens: list[int] = []
        self.ended = self.lost = self.failed = False
        self._source = source or self
        self.parser = parser or llguidance().LLMatcher(vocabulary.tokens, grammar, log_level=0)
        self._end_mask = mask_of(vocabulary.ends, vocabulary.words)
        # The last forced run, and the number of tokens before it: runs may be long, and are used a few tokens at a time.
        self._forced: list[int] = []
        self._forced_from = 0
        self._can_force = True

    @property
    def over(self) -> bool:
        """Whether only an end token may follow."""
        return self.ended or self.lost or bool(self.parser.is_stopped())

    def fresh(self) -> Matcher:
        """Return a copy of a matcher at the start; the two share what the parser has learned of the grammar's words."""
        return Matcher(self.grammar, self.vocabulary, self.parser.deep_copy(), self)

    def bring(self, tokens: list[int]) -> None:
        """Go to the end of ``tokens``: roll back what differs, consume the rest."""
        self.left_shared()
        known = self.tokens
        if tokens[: len(known)] != known:
            common = next((i for i, (old, new) in enumerate(zip(known, tokens, strict=False)) if old != new), min(len(known), len(tokens)))
            if not self.parser.rollback(len(known) - common):
                raise GrammarError(f"llguidance cannot roll back: {short(self.parser.get_error())}. Give a simpler grammar")
            del known[common:]
            if common < self._forced_from:
                self._forced = []
        self.ended = self.lost = False
        rest = tokens[len(known) :]
        if not rest:
            return
        end = next((i for i, token in enumerate(rest) if token in self.vocabulary.ends), len(rest))
        consumed = self.parser.try_consume_tokens(rest[:end]) if end else 0
        if self.left_shared():
            consumed = self.parser.try_consume_tokens(rest[:end])
        self.check()
        known += rest[:consumed]
        self.lost = consumed < end
        self.ended = not self.lost and end < len(rest)

    def fill(self, mask: np.ndarray) -> None:
        """Write the mask [W] int32, contiguous, of what may follow.

        Raises:
            GrammarError: nothing may follow, or a limit of the parser is exceeded.
        """
        self.left_shared()
        if self.over and not self.parser.is_error():
            mask[:] = self._end_mask
            return
        self.parser.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self.left_shared():
            self.parser.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self.check()
        if not (mask & ~self._end_mask).any() and not self.parser.is_accepting():
            raise GrammarError(
                f"after {len(self.tokens)} tokens nothing may follow, and no text of the grammar ends there: see that every rule can end"
            )

    def forced(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that the parser expects without a choice; after the end of the grammar, end tokens."""
        ends = self.vocabulary.ends
        if self.over:
            return [ends[0]] * most if len(ends) == 1 else []
        return self._run()[:most]

    def _run(self) -> list[int]:
        done = len(self.tokens) - self._forced_from
        if self._forced and 0 <= done < len(self._forced) and self.tokens[self._forced_from :] == self._forced[:done]:
            return self._forced[done:]
        self._forced, self._forced_from = [], len(self.tokens)
        if self._can_force:
            self.left_shared()
            found = self.parser.compute_ff_tokens()
            if self.parser.is_error():  # a limit was met, by a run without an end, for example; this parser is lost
                self._can_force = False
                self._begin_again()
                self.check()
            else:
                self._forced = found
        return self._forced

    def left_shared(self) -> bool:
        """Go on with a parser of one's own if one of those that share with this one has met an error: after that, they refuse all tokens.

        Returns:
            Whether it is so; what was asked since the last call is to be asked again.
        """
        self.note_error()
        if self._source is self or not self._source.failed:
            return False
        self._begin_again()
        return True

    def note_error(self) -> None:
        """Tell those that share with this parser if it has met an error."""
        if self.parser.is_error():
            self._source.failed = True

    def _begin_again(self) -> None:
        """Bring a new parser, which shares with none, to the end of the tokens."""
        self._source.failed = True
        self._source = self
        self.parser = llguidance().LLMatcher(self.vocabulary.tokens, self.grammar, log_level=0)
        self.parser.consume_tokens(self.tokens)

    def check(self) -> None:
        """Raise a `GrammarError` if the parser has met an error."""
        self.note_error()
        if self.parser.is_error():
            raise GrammarError(
                f"llguidance stopped after {len(self.tokens)} tokens: {short(self.parser.get_error())}. Give a simpler grammar"
            )
