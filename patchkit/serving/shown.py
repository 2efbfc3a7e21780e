"""Text from tokens as they come: whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patchkit.speculation.stop_texts import beginning_of_a_stop

# The first bytes of a character that is not complete are decoded as this.
_INCOMPLETE = "\ufffd"
# A character has up to four bytes, and so up to four tokens; an end that stays incomplete longer is no beginning of one.
_LONGEST_CHARACTER = 4


class Detokenizer:
    """Turns tokens into text one by one, at constant cost. The pieces add up to the decoded text.

    What a token is as text may depend on those before it, so a piece is the difference of two decoded ends of the text.

    Args:
        tokenizer: of the model. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start, self._read = 0, 0  # the decoded end begins at _start; the text of the tokens before _read was given out

    def push(self, token: int) -> str:
        """Return the text that a token completes."""
        self._tokens.append(token)
        before, after = self._ends()
        if not after.endswith(_INCOMPLETE):
            return self._given_out(before, after, len(self._tokens))
        if len(self._tokens) - self._read < _LONGEST_CHARACTER:
            return ""
        # Bytes that complete nothing. The last tokens may yet begin a character: hold as many as can stand alone.
        for held in range(_LONGEST_CHARACTER - 1, 0, -1):
            settled = self._decoded(self._tokens[self._start : -held])
            if settled + self._decoded(self._tokens[-held:]) == after:
                return self._given_out(before, settled, len(self._tokens) - held)
        return self._given_out(before, after, len(self._tokens))

    def finish(self) -> str:
        """Return what is left when no more tokens come: characters that have remained incomplete."""
        return self._given_out(*self._ends(), len(self._tokens))

    def _ends(self) -> tuple[str, str]:
        return self._decoded(self._tokens[self._start : self._read]), self._decoded(self._tokens[self._start :])

    def _given_out(self, before: str, after: str, end: int) -> str:
        self._start, self._read = self._read, end
        if self._start > 64:
            del self._tokens[: self._start]
            self._start, self._read = 0, self._read - self._start
        return after[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class ShownText:
    """The part of a growing text that can be shown: up to the stop text that is complete first, without an end that may become one.

    Attributes:
        length: number of characters shown so far.
        stopped: a stop text has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = list(stops)
        self.length, self.stopped = 0, False
        self._held = ""

    def push(self, piece: str) -> str:
        """Return what can be shown after another piece of text."""
        if self.stopped:
            return ""
        text = self._held + piece
        # The one that is complete first, so that it does not matter where pieces end.
        found = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            text, self.stopped = text[: min(found)[1]], True
        kept = 0 if self.stopped else beginning_of_a_stop(text, self.stops)
        self._held = text[len(text) - kept :]
        return self._show(text[: len(text) - kept])

    def finish(self) -> str:
        """Return what was held back, when no more text comes."""
        text, self._held = self._held, ""
        return self._show(text)

    def _show(self, text: str) -> str:
        self.length += len(text)
        return text
