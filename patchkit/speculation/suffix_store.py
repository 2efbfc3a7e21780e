"""`SuffixStore`: token sequences of this and earlier calls, searched for places where the end of a sequence came before.

Hu et al. 2024, "SuffixDecoding", https://arxiv.org/abs/2411.04975. Differs from it in that sequences are kept as they are, 4 bytes per
token, and scanned, instead of in a suffix tree, which takes hundreds of bytes per token: a scan of 100,000 tokens takes 0.05 ms.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

# What no token is: it ends a sequence, and the text before its first token.
_END = -1
# The longest suffix that is compared, and how many of the latest places are compared at all.
_LONGEST_SUFFIX = 32
_MOST_PLACES = 1024
# Places that vote for what comes next, the latest.
_MOST_VOTES = 32


class GrowingSequence:
    """A token sequence that grows, with an `_END` in front."""

    def __init__(self) -> None:
        self._buffer = np.full(256, _END, np.int32)
        self.length = 0

    @property
    def tokens(self) -> Tokens:
        """[1 + length] int32, beginning with the `_END`."""
        return self._buffer[: 1 + self.length]

    def extend(self, tokens: list[int]) -> None:
        """Append ``tokens``."""
        needed = 1 + self.length + len(tokens)
        if needed > len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.full(needed, _END, np.int32)])
        self._buffer[1 + self.length : needed] = tokens
        self.length = needed - 1


@dataclass
class Continuation:
    """Tokens that followed the longest suffix found.

    Attributes:
        tokens: at most as many as were asked for.
        shares: of each token, its share of the places that agree with the tokens before it.
        matched: length of the suffix.
    """

    tokens: list[int]
    shares: list[float]
    matched: int


class SuffixStore:
    """Finished sequences, the least recently used of which are dropped beyond a bound.

    Args:
        max_tokens: the most tokens that are kept, at 4 bytes each.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokens: Tokens = np.full(1, _END, np.int32)
        self._ends: list[int] = []  # of each sequence, where its closing `_END` is
        self._used: list[int] = []  # of each sequence, when it was used last
        self._clock = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the tokens kept."""
        return self._tokens.nbytes

    def sequences(self) -> list[Tokens]:
        """The sequences kept, the oldest first."""
        return [self._tokens[start + 1 : end] for start, end in itertools.pairwise([0, *self._ends])]

    def add(self, sequence: Tokens) -> None:
        """Keep a finished sequence [n] int32; of one that is longer than the store, the last tokens."""
        sequence = sequence[-(self.max_tokens - 2) :]
        self._clock += 1
        for number, kept in enumerate(self.sequences()):
            if np.array_equal(kept, sequence):
                self._used[number] = self._clock
                return
        while self._ends and len(self._tokens) + len(sequence) + 1 > self.max_tokens:
            self._drop(self._used.index(min(self._used)))
        self._tokens = np.concatenate([self._tokens, sequence, np.full(1, _END, np.int32)])
        self._ends.append(len(self._tokens) - 1)
        self._used.append(self._clock)

    def _drop(self, number: int) -> None:
        start, end = 0 if number == 0 else self._ends[number - 1], self._ends[number]
        self._tokens = np.concatenate([self._tokens[: start + 1], self._tokens[end + 1 :]])
        self._ends = [each for each in self._ends if each < end] + [each - (end - start) for each in self._ends if each > end]
        del self._used[number]

    def continuation(self, sequence: GrowingSequence, most: int, shortest: int = 1) -> Continuation | None:
        """Tokens that followed the longest suffix of ``sequence`` wherever it came before, in the store or in the sequence itself.

        The places with the longest common suffix vote for each token; of tokens with as many votes the one of the latest place is taken.

        Args:
            most: the largest number of tokens to return.
            shortest: the fewest tokens that a suffix must have.
        """
        own = sequence.tokens
        suffix = own[1:][-_LONGEST_SUFFIX:]
        if not len(suffix):
            return None
        kept, kept_lengths = _places(self._tokens, suffix)
        here, here_lengths = _places(own[:-1], suffix)
        matched = int(max(kept_lengths.max(initial=0), here_lengths.max(initial=0)))
        if matched < shortest:
            return None
        kept, here = kept[kept_lengths == matched], here[here_lengths == matched]
        # Places in the sequence itself are the latest.
        here = here[-_MOST_VOTES:]
        kept = kept[len(kept) - min(len(kept), _MOST_VOTES - len(here)) :]
        if len(kept):
            self._clock += 1
            self._used[int(np.searchsorted(self._ends, kept[-1]))] = self._clock
        return self._vote(own, kept.tolist(), here.tolist(), most, matched)

    def _vote(self, own: Tokens, kept: list[int], here: list[int], most: int, matched: int) -> Continuation:
        found: list[int] = []
        shares: list[float] = []
        while len(found) < most:
            nexts = [int(self._tokens[place]) for place in kept]
            # A repetition shorter than what is asked for goes on into what was found.
            nexts += [int(own[place]) if place < len(own) else found[place - len(own)] for place in here]
            votes = Counter(token for token in nexts if token != _END)
            if not votes:
                break
            highest = max(votes.values())
            token = next(each for each in reversed(nexts) if votes.get(each) == highest)
            found.append(token)
            shares.append(highest / len(nexts))
            kept = [place + 1 for place, each in zip(kept, nexts, strict=False) if each == token]
            here = [place + 1 for place, each in zip(here, nexts[len(nexts) - len(here) :], strict=True) if each == token]
        return Continuation(found, shares, matched)


def _places(tokens: Tokens, suffix: Tokens) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices in ``tokens`` after places that end as ``suffix`` does, the latest `_MOST_PLACES`, and how many tokens agree at each."""
    ends = np.flatnonzero(tokens == suffix[-1])[-_MOST_PLACES:]
    lengths = np.ones(len(ends), np.intp)
    agreeing = np.arange(len(ends))
    for back in range(1, len(suffix)):
        # An _END is in front of every sequence, so nothing agrees beyond its beginning.
        agreeing = agreeing[tokens[ends[agreeing] - back] == suffix[-1 - back]]
        if not len(agreeing):
            break
        lengths[agreeing] += 1
    return ends + 1, lengths
