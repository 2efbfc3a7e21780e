"""How much of waiting prompts is fed between two rounds, so that rounds of the sequences that are generated do not come much later: `Pace`.

Agrawal et al. 2024, "Sarathi-Serve", https://arxiv.org/abs/2403.02310, feeds prompts in chunks of one size, in one forward with a round.
Differs from it in that a chunk is a forward of its own, as large as measured times allow.
"""

from __future__ import annotations

from collections import deque

# Feeding between two rounds may take this many times a round: the time between two tokens of a sequence is then up to 1 + SHARE rounds.
SHARE = 1.5

# The first chunk while nothing is known, and the least one, so that every prompt is fed in the end.
_FIRST, _LEAST = 16, 4
# A prompt of up to so many tokens is not cut: a forward of them takes little longer than one of half of them.
_WHOLE = 20
# Rounds of which the fastest counts.
_ROUNDS = 4
# Feeding may take this many times the least chunk in any case: where rounds are compiled, a forward of any chunk may take many of them.
_OF_LEAST = 1.25


class Pace:
    """Chooses chunks by the times of rounds and of earlier chunks.

        pace.begin(rows)
        while (tokens := pace.next(prompt)) > 0: ...; pace.fed(tokens, seconds)
        ...; pace.round(seconds)

    A forward takes a part of its time whatever it is fed, and that part is about a round. So the next chunk is the last one times what it
    may take over what that took: towards the right size it goes by steps that never overshoot, except from much larger chunks.

    Args:
        most: tokens that are fed between two rounds at most, and where nothing is generated.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._rounds: deque[float] = deque(maxlen=_ROUNDS)
        self._last: tuple[int, float] | None = None  # tokens and seconds of the last chunk that tells something
        self._shortest = 0.0  # seconds that the least chunk takes, or less; 0 until there was one
        self._rows, self._left, self._spent = 0, most, 0.0
        self._plan = most

    def begin(self, rows: int) -> None:
        """Begin to feed, while ``rows`` sequences are generated."""
        self._rows, self._left, self._spent = rows, self.most, 0.0
        self._plan = self._planned() if rows else self.most

    def next(self, prompt: int) -> int:
        """Return how many tokens to feed next, of a prompt of ``prompt`` tokens; 0 for none before the next round."""
        if not self._rows or not self._spent:
            return max(0, min(max(self._plan, prompt) if prompt <= _WHOLE else self._plan, self._left))
        budget, fixed = self._budget, max(self._round, self._shortest)
        rest = (budget - self._spent - fixed) / (budget - fixed) if budget > fixed else 0.0
        tokens = int(self._plan * rest)
        return max(0, min(tokens, self._left)) if tokens >= min(_FIRST, prompt) else 0

    def fed(self, tokens: int, seconds: float) -> None:
        """Take note of a chunk."""
        is_whole = not self._rows or tokens >= self._plan
        self._left -= tokens
        self._spent += seconds
        self._shortest = seconds if self._rows and self._plan <= tokens <= _LEAST else min(self._shortest, seconds)
        if is_whole or seconds > self._budget:  # a smaller one, at the end of a prompt, that took less than it may tells nothing
            self._last = tokens, seconds

    def round(self, seconds: float) -> None:
        """Take note of the time of a round of all sequences."""
        self._rounds.append(seconds)

    @property
    def _round(self) -> float:
        return min(self._rounds, default=0.0)

    @property
    def _budget(self) -> float:
        """Seconds that feeding may take."""
        return max(SHARE * self._round, _OF_LEAST * self._shortest)

    def _planned(self) -> int:
        """Tokens of a chunk that takes the budget."""
        if self._last is None or not self._rounds:
            return min(_FIRST, self.most)
        tokens, seconds = self._last
        factor = min(2.0, self._budget / max(seconds, 1e-9))
        if factor < 0.5:  # most of the time was that of the tokens, which says little of the rest
            factor /= 2
        # A factor just above 1, of a time that is hardly the tokens', would leave them as few for ever.
        more = tokens + max(1, tokens // 32) if factor > 1 else 0
        return min(self.most, max(_LEAST, int(tokens * factor), more))
