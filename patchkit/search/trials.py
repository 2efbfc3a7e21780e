"""Candidates of a search, and what has been measured of them within a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from patchkit.errors import PatchConflict, PatchError
from patchkit.patch import Patch
from patchkit.search.budget import OutOfTime
from patchkit.search.candidate import LEAST_DOCUMENTS, Candidate, Kind, Lost, Measurer, percent, specs_of

# A candidate that failed in one of these ways fails in every combination too.
_FAILED: tuple[Kind, ...] = ("refused", "conflict", "error", "no time")

# Share of the time for scoring the unpatched model, which bounds the number of documents.
_SCORING = 0.05


class Trials:
    """All candidates of a search. It sees models only through a `Measurer`, and time only through a clock.

    Args:
        bound: how much perplexity may increase: 0.01 is 1 %.
        seconds: after which nothing new is begun.
        clock: seconds.
        advance: called with a spec before it is measured.

    Attributes:
        candidates: the first is no patch.
        few: documents on which a candidate is first scored.
        documents: documents on which a candidate has to be within the bound.
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
        self.candidates = [self.plain]
        self.few = min(LEAST_DOCUMENTS, measurer.documents)
        self.documents = measurer.documents
        self.begun = 0.0

    def add(self, patches: Sequence[Patch]) -> Candidate:
        """Add a candidate that is not measured yet."""
        candidate = Candidate(ordered(patches))
        self.candidates.append(candidate)
        return candidate

    @property
    def alive(self) -> list[Candidate]:
        """Timed candidates that have not lost."""
        return [each for each in self.candidates if each.patches and each.patched_ms and each.lost is None]

    # -- time ----------------------------------------------------------------------------------------------------------------

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    def until(self, share: float) -> float:
        """Seconds after which a share of the search's time is over; scoring the unpatched model is not counted."""
        return self.begun + share * (self.seconds - self.begun)

    # -- the bound -----------------------------------------------------------------------------------------------------------

    def is_within(self, candidate: Candidate) -> bool:
        """Whether the upper end of the perplexity increase's interval is within the bound."""
        return candidate.increase is not None and candidate.increase.high <= self.bound

    @property
    def plain_is_within(self) -> bool:
        """Whether no patch keeps the bound: beyond the positions that a model was made for it may not."""
        return self.is_within(self.plain)

    # -- measuring -----------------------------------------------------------------------------------------------------------

    def score_plain(self) -> None:
        """Score the unpatched model on as many documents as `_SCORING` allows; later candidates get the same number."""
        before = self.spent
        self.measurer.increase((), self.few)
        affordable = _SCORING * self.seconds * self.few / max(self.spent - before, 1e-6)
        self.documents = int(max(self.few, min(self.documents, affordable)))
        self.plain.increase, self.plain.documents = self.measurer.increase((), self.documents), self.documents
        self.begun = self.spent

    def measure_all(self, candidates: Sequence[Candidate], rounds: int, documents: int, until: float) -> None:
        """Measure candidates, each with its share of the remaining time; those that are not reached stay as they are."""
        for index, candidate in enumerate(candidates):
            left = until - self.spent
            if left <= 0:
                return
            self._measure(candidate, rounds, documents, left / (len(candidates) - index))

    def score(self, candidate: Candidate) -> None:
        """Score a candidate on all documents."""
        self._attempt(candidate, lambda: self._score(candidate, self.documents))

    def _measure(self, candidate: Candidate, rounds: int, documents: int, seconds: float) -> None:
        """Score and time a candidate. A single patch beyond the bound is timed too: its speed tells its worth in a combination."""
        self.advance(candidate.spec)
        own = set(specs_of(candidate.patches))
        for other in self.candidates:
            if other.lost is not None and other.lost.kind in _FAILED and set(specs_of(other.patches)) < own:
                candidate.lost = Lost(other.lost.kind, f"holds {other.spec}: {other.lost.why}")
                return
        self._attempt(candidate, lambda: self._score(candidate, documents))
        if candidate.lost is None or (candidate.lost.kind == "beyond the bound" and len(candidate.patches) == 1):
            self._attempt(candidate, lambda: self._time(candidate, rounds, seconds))

    def _attempt(self, candidate: Candidate, measure: Callable[[], None]) -> None:
        """Run one measurement; an exception is recorded as the reason why the candidate lost."""
        try:
            measure()
        except OutOfTime as reason:
            if not candidate.patched_ms:
                candidate.lost = Lost("no time", str(reason))
        except PatchConflict as reason:
            candidate.lost = Lost("conflict", str(reason))
        except PatchError as reason:
            candidate.lost = Lost("refused", str(reason))
        except Exception as error:  # a candidate may fail in any way, and the others are still worth measuring
            candidate.lost = Lost("error", f"{type(error).__name__}: {error}")
        if candidate.lost:
            self.measurer.drop(candidate.patches)

    def _score(self, candidate: Candidate, documents: int) -> None:
        if candidate.documents < documents:
            candidate.increase, candidate.documents = self.measurer.increase(candidate.patches, documents), documents
        assert candidate.increase is not None
        certain = candidate.documents == self.documents
        if not candidate.increase.low <= self.bound or (certain and not self.is_within(candidate)):
            why = f"perplexity increase {percent(candidate.increase)} on {candidate.documents} documents"
            candidate.lost = Lost("beyond the bound", why)

    def _time(self, candidate: Candidate, rounds: int, seconds: float) -> None:
        unpatched, patched = self.measurer.time(candidate.patches, rounds, seconds)
        candidate.unpatched_ms += unpatched
        candidate.patched_ms += patched
        candidate.idle = self.measurer.idle(candidate.patches)
        assert candidate.speedup is not None
        if candidate.speedup.high < 1 and self.plain_is_within and candidate.lost is None:
            candidate.lost = Lost("slower", f"{candidate.speedup} times the unpatched speed")


def ordered(patches: Sequence[Patch]) -> tuple[Patch, ...]:
    """Patches by stage and name, so that one combination has one spec."""
    return tuple(sorted(patches, key=lambda patch: (patch.stage, patch.name)))
