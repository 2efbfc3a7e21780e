"""`Retokenized`: a growing sequence of the target's tokens as tokens of the draft's tokenizer."""

from __future__ import annotations

from patchkit.speculation.tokenizer_pair import INCOMPLETE, TokenizerPair

# Tokens at the end that are tokenized again whenever some are added; the part before them is settled where that changes no token.
_TAIL = 64
_TRIES = 16


class Retokenized:
    """One row's text in both vocabularies.

    Attributes:
        tokens: of the target, so far.
        ids: of the draft, for the text up to the last whole character.
        complete: the tokens end in a whole character.
    """

    def __init__(self, pair: TokenizerPair) -> None:
        self.pair = pair
        self.tokens: list[int] = []
        self.ids: list[int] = []
        self.complete = True
        self._settled, self._before = 0, list(pair.prefix)  # target tokens that are settled, and the draft's tokens for them
        self._next_try = 2 * _TAIL

    @property
    def ratio(self) -> float:
        """Tokens of the draft per token of the target, so far."""
        return len(self.ids) / max(len(self.tokens), 1)

    def extend(self, tokens: list[int]) -> None:
        """Append tokens of the target."""
        self.tokens += tokens
        tail = self.tokens[self._settled :]
        text = self.pair.text(tail)
        self.complete = not text.endswith(INCOMPLETE)
        self.ids = self._before + self.pair.read(text.rstrip(INCOMPLETE))
        if len(tail) > self._next_try and self.complete:
            self._settle(tail, text)

    def continuation(self, drafted: list[int]) -> list[int]:
        """The target's tokens of what the draft would append; none where the text ends within a character."""
        return self.pair.continuation(self.tokens, self.ids, drafted) if self.complete else []

    def _settle(self, tail: list[int], text: str) -> None:
        """Find a place near the end of the tail at which it can be split without a change of the draft's tokens."""
        whole = self.ids[len(self._before) :]
        for place in range(len(tail) - _TAIL, max(len(tail) - _TAIL - _TRIES, 0), -1):
            first, last = self.pair.text(tail[:place]), self.pair.text(tail[place:])
            ids = self.pair.read(first)
            if first + last == text and ids + self.pair.read(last) == whole:
                self._settled, self._before, self._next_try = self._settled + place, self._before + ids, 2 * _TAIL
                return
        self._next_try = len(tail) + _TAIL
