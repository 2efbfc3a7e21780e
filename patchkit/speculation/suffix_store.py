"""`SuffixStore`: token sequences of this and earlier calls, searched for places where the end of a sequence came before.

Hu et al. 2024, "SuffixDecoding", https://arxiv.org/abs/2411.04975. Differs from it in that sequences are kept as they are, 4 bytes per
token, and scanned, instead of in a suffix tree, which takes hundreds of bytes per token: a scan of 100,000 tokens takes 0.05 ms.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

# What no token is: it ends a sequence, and the text before its first token.
_END = -1
# The longest suffix that is compared, and how many of the latest places are compared at all.
LONGEST_SUFFIX = 32
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


@dataclass
class Places:
    """Places that a continuation is read from.

    Attributes:
        kept, here: indices of the next token, in the store and in the sequence itself.
        matched: length of the suffix that came before in all of them, tokens that were found since included.
        found: these tokens.
    """

    kept: list[int]
    here: list[int]
    matched: int
    found: tuple[int, ...] = ()

    def after(self, token: int, nexts: list[int]) -> Places:
        """The places that have ``token`` next, one further; ``nexts`` are the tokens of all places."""
        kept = [place + 1 for place, each in zip(self.kept, nexts, strict=False) if each == token]
        here = [place + 1 for place, each in zip(self.here, nexts[len(self.kept) :], strict=True) if each == token]
        return Places(kept, here, self.matched + 1, (*self.found, token))


class SuffixStore:
    """Finished sequences, the least recently used of which are dropped beyond a bound.

    Args:
        max_tokens: the most tokens that are kept, at 4 bytes each.

    Attributes:
        unwritten: number of sequences that were added since the store was read from a file or written to one.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.unwritten = max_tokens, 0
        self._buffer: Tokens = np.full(256, _END, np.int32)
        self._length = 1
        self._ends: list[int] = []  # of each sequence, where its closing `_END` is
        self._used: list[int] = []  # of each sequence, when it was used last
        self._digests: list[bytes] = []  # of each sequence, by which it is found
        self._clock = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the tokens kept, and of the room for more."""
        return self._buffer.nbytes

    @property
    def largest(self) -> int:
        """The largest token kept; -1 if there is none."""
        return int(self._tokens.max())

    def sequences(self) -> list[Tokens]:
        """The sequences kept, the oldest first."""
        return [self._tokens[start + 1 : end] for start, end in itertools.pairwise([0, *self._ends])]

    def by_use(self) -> list[Tokens]:
        """The sequences kept, the one that was not used for longest first."""
        sequences = self.sequences()
        return [sequences[number] for number in np.argsort(self._used, kind="stable")]

    def add(self, sequence: Tokens) -> None:
        """Keep a finished sequence [n] int32; of one that is longer than the store, the last tokens."""
        sequence = sequence[-(self.max_tokens - 2) :]
        self._clock += 1
        self.unwritten += 1
        digest = hashlib.blake2b(sequence.tobytes(), digest_size=16).digest()
        if digest in self._digests:
            self._used[self._digests.index(digest)] = self._clock
            return
        self._make_room(len(sequence) + 1)
        end = self._length + len(sequence)
        if end >= len(self._buffer):
            grown = np.full(min(2 * (end + 1), self.max_tokens), _END, np.int32)
            grown[: self._length] = self._tokens
            self._buffer = grown
        self._buffer[self._length : end], self._buffer[end] = sequence, _END
        self._length = end + 1
        self._ends.append(end)
        self._used.append(self._clock)
        self._digests.append(digest)

    @property
    def _tokens(self) -> Tokens:
        return self._buffer[: self._length]

    def _make_room(self, tokens: int) -> None:
        """Drop the least recently used sequences, so that there is room for so many more ``tokens``."""
        excess = self._length + tokens - self.max_tokens
        if excess <= 0 or not self._ends:
            return
        lengths = np.diff([0, *self._ends])  # with the closing `_END`
        order = np.argsort(self._used, kind="stable")
        dropped = order[: 1 + int(np.searchsorted(np.cumsum(lengths[order]), excess))]
        kept = np.ones(len(lengths), bool)
        kept[dropped] = False
        left = self._tokens[1:][np.repeat(kept, lengths)]
        self._length = 1 + len(left)
        self._buffer[1 : self._length] = left
        self._ends = np.cumsum(lengths[kept]).tolist()
        self._used = [used for used, keep in zip(self._used, kept, strict=True) if keep]
        self._digests = [digest for digest, keep in zip(self._digests, kept, strict=True) if keep]

    def places(self, sequence: GrowingSequence, shortest: int = 1) -> Places | None:
        """Places where the longest suffix of ``sequence`` came before, in the store or in the sequence itself; None if there are none.

        Args:
            shortest: the fewest tokens that a suffix must have.
        """
        own = sequence.tokens
        suffix = own[1:][-LONGEST_SUFFIX:]
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
            self._used[bisect.bisect_left(self._ends, int(kept[-1]))] = self._clock
        return Places(kept.tolist(), here.tolist(), matched)

    def following(self, sequence: GrowingSequence, places: Places) -> list[tuple[int, float, Places]]:
        """Tokens at these places, each with its share of the places and the places after it.

        The token with the most votes comes first; of tokens with as many votes the one of the latest place.
        """
        own = sequence.tokens
        tokens = self._tokens
        nexts = [int(tokens[place]) for place in places.kept]
        # A repetition shorter than what is asked for goes on into what was found.
        nexts += [int(own[place]) if place < len(own) else places.found[place - len(own)] for place in places.here]
        votes = Counter(token for token in reversed(nexts) if token != _END)
        return [(token, count / len(nexts), places.after(token, nexts)) for token, count in votes.most_common()]

    def continuation(self, sequence: GrowingSequence, most: int, shortest: int = 1) -> Continuation | None:
        """Tokens that followed the longest suffix of ``sequence``, each the one with the most votes.

        Args:
            most: the largest number of tokens to return.
            shortest: the fewest tokens that a suffix must have.
        """
        places = self.places(sequence, shortest)
        if places is None:
            return None
        result = Continuation([], [], places.matched)
        while len(result.tokens) < most and (following := self.following(sequence, places)):
            token, share, places = following[0]
            result.tokens.append(token)
            result.shares.append(share)
        return result


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
