"""The search of `patchkit tune`: the fastest of combinations that keep within a bound, by successive halving.

Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification", https://arxiv.org/abs/1502.07943: measure all a little, keep the
faster half, measure that twice as long. What is searched are not single arms but combinations, so the search has three parts: every
patch alone, with the options that it declares (`Patch.candidates`); combinations of the best options, the most promising first, and the
best of these with other options; then the halving.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

from patchkit.errors import PatchConflict, PatchError
from patchkit.patch import Patch
from patchkit.search.rows import LEAST_DOCUMENTS, Candidate, Kind, Lost, Measurer, OutOfTime, percent, specs_of

# What failed in these ways fails in every combination too.
_FAILED: tuple[Kind, ...] = ("refused", "conflict", "error", "no time")

# Shares of the time after which singles, and then combinations, end.
_SINGLES, _COMBINATIONS = 0.35, 0.7

# Share of the time in which the unpatched model is scored, which bounds the number of documents.
_SCORING = 0.05

# A patch that is slower alone may pay in company, but not one that leaves less than this of the speed.
_HOPELESS = 0.9

# Neighbours of so many of the best are tried, so many at a time, if their parts promise at least this much of the best one's speed.
_LEADERS, _PROMISING = 3, 0.9

# Among specs within this of the fastest, the one with the fewest patches is chosen.
_EQUAL = 0.99

_MOST_FINALISTS = 8


class Search:
    """The search itself. It sees models only through a `Measurer`, and time only through a clock.

    Args:
        bound: how much perplexity may increase: 0.01 is 1 %.
        seconds: after which nothing new is begun.
        clock: seconds.
        advance: called with a spec before it is measured.

    Attributes:
        rows: all candidates; the first is no patch.
    """

    def __init__(
        self,
        measurer: Measurer,
        bound: float,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        advance: Callable[[str], object] = lambda spec: None,
    ) -> None:
        self.measurer, self.bound, self.seconds, self.clock, self.advance = measurer, bound, seconds, clock, advance
        self.started = clock()
        self.plain = Candidate(())
        self.rows = [self.plain]
        self.stopped = False
        self.few = min(LEAST_DOCUMENTS, measurer.documents)
        self.documents = measurer.documents
        self.begun = 0.0

    def run(self, singles: Sequence[Patch]) -> Candidate:
        """Search; the chosen row. Ctrl-C ends the search early: the choice is then made from what is known.

        Raises:
            KeyboardInterrupt: nothing was known yet.
            PatchError: the time is not enough for the unpatched model, or it cannot be measured.
        """
        try:
            self._score_plain()
        except OutOfTime as reason:
            message = "the time is not enough to score the unpatched model: give more --minutes, or a smaller --context"
            raise PatchError(message) from reason
        try:
            self._measure_all([self._row((patch,)) for patch in singles], self.measurer.rounds, self.few, self._until(_SINGLES))
            parts = self._parts()
            self._measure_all(self._combinations(parts), self.measurer.rounds, self.few, self._until(_COMBINATIONS))
            # Options for which there was no time at first, and what they lead to.
            left = [row for row in self.rows if row.patches and not row.patched_ms and row.lost is None]
            self._measure_all(left, self.measurer.rounds, self.few, self._until(_COMBINATIONS))
            self._climb()
            self._halve()
        except KeyboardInterrupt:
            if not any(row.patched_ms for row in self.rows):
                raise
            self.stopped = True
        return self._choose()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    @property
    def plain_is_within(self) -> bool:
        """Whether no patch keeps the bound: beyond the positions that it was made for a model may not."""
        return self._within(self.plain)

    def _within(self, row: Candidate) -> bool:
        return row.increase is not None and row.increase.high <= self.bound

    def _until(self, share: float) -> float:
        """After how many seconds a share of the search's time is over, not counting what scoring the unpatched model took."""
        return self.begun + share * (self.seconds - self.begun)

    def _score_plain(self) -> None:
        """Score the unpatched model, on as many documents as scoring may take time for."""
        before = self.spent
        self.measurer.increase((), self.few)
        affordable = _SCORING * self.seconds * self.few / max(self.spent - before, 1e-6)
        self.documents = int(max(self.few, min(self.documents, affordable)))
        self.plain.increase, self.plain.documents = self.measurer.increase((), self.documents), self.documents
        self.begun = self.spent

    def _row(self, patches: tuple[Patch, ...]) -> Candidate:
        row = Candidate(_ordered(patches))
        self.rows.append(row)
        return row

    # -- measuring -----------------------------------------------------------------------------------------------------------

    def _measure_all(self, rows: Sequence[Candidate], rounds: int, documents: int, until: float) -> None:
        """Measure rows, each with its share of what is left of the time; those that it does not reach stay as they are."""
        for index, row in enumerate(rows):
            left = until - self.spent
            if left <= 0:
                return
            self._measure(row, rounds, documents, left / (len(rows) - index))

    def _measure(self, row: Candidate, rounds: int, documents: int, seconds: float) -> None:
        """Score and time a row. What is beyond the bound is only timed alone, where its speed says what it may be worth in company."""
        self.advance(row.spec)
        for other in self.rows:
            if other.lost is not None and other.lost.kind in _FAILED and set(specs_of(other.patches)) < set(specs_of(row.patches)):
                row.lost = Lost(other.lost.kind, f"holds {other.spec}: {other.lost.why}")
                return
        self._ask(row, lambda: self._score(row, documents))
        if row.lost is None or (row.lost.kind == "beyond the bound" and len(row.patches) == 1):
            self._ask(row, lambda: self._time(row, rounds, seconds))

    def _ask(self, row: Candidate, measure: Callable[[], None]) -> None:
        """``measure`` a row; whatever it raises is a fact about the row."""
        try:
            measure()
        except OutOfTime as reason:
            if not row.patched_ms:
                row.lost = Lost("no time", str(reason))
        except PatchConflict as reason:
            row.lost = Lost("conflict", str(reason))
        except PatchError as reason:
            row.lost = Lost("refused", str(reason))
        except Exception as error:  # a candidate may fail in any way, and the others are still worth measuring
            row.lost = Lost("error", f"{type(error).__name__}: {error}")
        if row.lost:
            self.measurer.drop(row.patches)

    def _score_all(self, row: Candidate) -> None:
        self._ask(row, lambda: self._score(row, self.documents))

    def _score(self, row: Candidate, documents: int) -> None:
        if row.documents < documents:
            row.increase, row.documents = self.measurer.increase(row.patches, documents), documents
        assert row.increase is not None
        certain = row.documents == self.documents
        if not row.increase.low <= self.bound or (certain and not self._within(row)):
            row.lost = Lost("beyond the bound", f"perplexity increase {percent(row.increase)} on {row.documents} documents")

    def _time(self, row: Candidate, rounds: int, seconds: float) -> None:
        unpatched, patched = self.measurer.time(row.patches, rounds, seconds)
        row.unpatched_ms += unpatched
        row.patched_ms += patched
        row.idle = self.measurer.idle(row.patches)
        assert row.speedup is not None
        if row.speedup.high < 1 and self.plain_is_within and row.lost is None:
            row.lost = Lost("slower", f"{row.speedup} times the unpatched speed")

    # -- what is measured ----------------------------------------------------------------------------------------------------

    def _parts(self) -> list[Candidate]:
        """Of each patch the fastest option that does not lower quality beyond the bound on all documents, if it is worth combining."""
        parts = []
        for name in dict.fromkeys(row.patches[0].name for row in self.rows if row.patches):
            for row in self._options(name):
                if self.spent < self.seconds:
                    self._score_all(row)
                if self._is_part(row):
                    parts.append(row)
                    break
        return parts

    def _options(self, name: str) -> list[Candidate]:
        """The single candidates of one patch that could be parts, the fastest first."""
        options = [row for row in self.rows if len(row.patches) == 1 and row.patches[0].name == name and self._is_part(row)]
        return sorted(options, key=lambda row: row.speed, reverse=True)

    def _is_part(self, row: Candidate) -> bool:
        """Whether it may pay in company: not much slower alone, and worse by no more than the bound than no patch is at this length."""
        if row.lost is not None and row.lost.kind not in ("slower", "beyond the bound"):
            return False
        if row.increase is None or self.plain.increase is None:
            return False
        added = (1 + row.increase.value) / (1 + self.plain.increase.value) - 1 if math.isfinite(self.plain.increase.value) else 0.0
        return row.speedup is not None and row.speedup.high >= _HOPELESS and added <= self.bound

    def _combinations(self, parts: Sequence[Candidate]) -> list[Candidate]:
        """Every combination of two parts or more, the one whose parts promise most first."""
        chosen = [group for size in range(2, len(parts) + 1) for group in itertools.combinations(parts, size)]
        chosen.sort(key=lambda group: math.prod(row.speed for row in group), reverse=True)
        return [self._row(tuple(row.patches[0] for row in group)) for group in chosen]

    def _climb(self) -> None:
        """Measure neighbours of the best, a few at a time, until none are left that promise anything or the time is over."""
        while self.spent < self._until(_COMBINATIONS):
            neighbours = [self._row(patches) for patches in self._neighbours()[:_LEADERS]]
            if not neighbours:
                return
            self._measure_all(neighbours, self.measurer.rounds, self.few, self._until(_COMBINATIONS))

    def _neighbours(self) -> list[tuple[Patch, ...]]:
        """The best few with one patch more, or with another option of one patch, the most promising first; without what was tried."""
        leaders = self._leaders()
        alone = {row.patches[0].spec: row.speed for row in self.rows if len(row.patches) == 1}
        options = [row for name in dict.fromkeys(row.patches[0].name for row in self.rows if row.patches) for row in self._options(name)]
        tried = {row.spec for row in self.rows}
        found: dict[str, tuple[float, tuple[Patch, ...]]] = {}
        for leader, option in itertools.product(leaders, options):
            kept = [patch for patch in leader.patches if patch.name != option.patches[0].name]
            given_up = [alone[patch.spec] for patch in leader.patches if patch not in kept]
            promise = leader.speed * option.speed / math.prod(given_up)
            row = Candidate(_ordered([*kept, *option.patches]))
            if row.spec not in tried and promise >= _PROMISING * leaders[0].speed:
                found[row.spec] = max(found.get(row.spec, (0.0, row.patches)), (promise, row.patches), key=lambda entry: entry[0])
        return [patches for _, patches in sorted(found.values(), key=lambda entry: entry[0], reverse=True)]

    def _leaders(self) -> list[Candidate]:
        """The fastest few, shown on all documents to be within the bound."""
        leaders: list[Candidate] = []
        for row in sorted(self._alive(), key=lambda row: row.speed, reverse=True):
            if len(leaders) < _LEADERS and self.spent < self._until(_COMBINATIONS):
                self._score_all(row)
                leaders += [row] if row.lost is None else []
        return leaders

    def _alive(self) -> list[Candidate]:
        return [row for row in self.rows if row.patches and row.patched_ms and row.lost is None]

    def _halve(self) -> None:
        """Measure the faster half, with all documents and twice as long each time, until one is left or the time is over."""
        rounds, pool = self.measurer.rounds, self._alive()
        while pool and self.spent < self.seconds:
            rounds *= 2
            pool = sorted(pool, key=lambda row: row.speed, reverse=True)[: min(math.ceil(len(pool) / 2), _MOST_FINALISTS)]
            stages = math.ceil(math.log2(len(pool))) + 1
            self._measure_all(pool, rounds, self.documents, self.spent + (self.seconds - self.spent) / stages)
            if len(pool) == 1 and pool[0].lost is None:
                break
            # Where all that were kept are lost now, those that were passed over are measured after all.
            pool = [row for row in pool if row.lost is None] or self._alive()
        if pool:
            # As long as the one that is left: what it would be without each of its patches, and what seemed faster in fewer rounds.
            last = pool[0]
            rivals = [
                row
                for row in self._alive()
                if row is not last and (set(specs_of(row.patches)) < set(specs_of(last.patches)) or row.speed > last.speed)
            ]
            self._measure_all(rivals, rounds, self.documents, self.seconds)

    # -- the choice ----------------------------------------------------------------------------------------------------------

    def _choose(self) -> Candidate:
        """The fastest within the bound, no patch among them; and what all others lost by."""
        paying = [row for row in self._alive() if self._within(row) and not (self.plain_is_within and self._gain(row) <= 1)]
        best = self.plain
        if paying:
            # More rounds are more certain: what reached the last halving goes before what was only seen once.
            longest = max(len(row.patched_ms) for row in paying)
            finalists = [row for row in paying if len(row.patched_ms) >= longest / 2]
            fastest = max(row.speed for row in finalists)
            equal = [row for row in finalists if row.speed >= _EQUAL * fastest]
            best = min(equal, key=lambda row: (len(row.patches), -row.speed))
        for row in self.rows:
            if row is not best and row.lost is None:
                row.lost = self._lost_to(best, row)
        return best

    def _gain(self, row: Candidate) -> float:
        """The lower end of its speed-up."""
        return row.speedup.low if row.speedup else 0.0

    def _lost_to(self, best: Candidate, row: Candidate) -> Lost:
        if row.patches and not row.patched_ms:
            return Lost("no time", "not tried")
        if not self._within(row):
            shown = "not measured" if row.increase is None else f"{percent(row.increase)} on {row.documents} documents"
            return Lost("beyond the bound", f"perplexity increase {shown}")
        if best is self.plain:
            return Lost("slower", f"{row.speedup} times the unpatched speed: not shown to be faster")
        own, other = (f"{each.speed:.3g} times the unpatched speed in {len(each.patched_ms)} rounds" for each in (row, best))
        return Lost("beaten", f"{own}, the chosen one {other}" if row.patches else f"the chosen one has {other}")


def _ordered(patches: Sequence[Patch]) -> tuple[Patch, ...]:
    return tuple(sorted(patches, key=lambda patch: (patch.stage, patch.name)))
