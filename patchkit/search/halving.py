"""The search of `patchkit tune`: successive halving over combinations of patches, under a bound on perplexity.

Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification", https://arxiv.org/abs/1502.07943: measure all a little, keep the
faster half, measure that twice as long. Arms here are combinations of patches, too many to measure all, so the search has three parts:

1. every patch alone, with the options that it declares (`Patch.candidates`);
2. combinations of the best options, the most promising first, then hill climbing from the best of these;
3. successive halving of all that are left.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

from patchkit.errors import PatchError
from patchkit.patch import Patch
from patchkit.search.budget import OutOfTime
from patchkit.search.candidate import Candidate, Measurer, specs_of
from patchkit.search.choice import choose
from patchkit.search.trials import Trials, ordered

# Shares of the time after which parts 1 and 2 end.
_SINGLES, _COMBINATIONS = 0.35, 0.7

# A patch that is slower alone may pay in a combination, but not one that leaves less than this share of the speed.
_HOPELESS = 0.9

# Neighbours of this many leaders are tried, this many at a time, if they promise at least this share of the best leader's speed.
_LEADERS, _PROMISING = 3, 0.9

_MOST_FINALISTS = 8


class Search:
    """The search itself; arguments as for `Trials`.

    Attributes:
        trials: all candidates and their measurements.
        stopped: Ctrl-C ended the search before its time was over.
    """

    def __init__(
        self,
        measurer: Measurer,
        bound: float,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        advance: Callable[[str], object] = lambda spec: None,
    ) -> None:
        self.trials = Trials(measurer, bound, seconds, clock, advance)
        self.rounds = measurer.rounds
        self.stopped = False

    @property
    def candidates(self) -> list[Candidate]:
        """All candidates; the first is no patch."""
        return self.trials.candidates

    def run(self, singles: Sequence[Patch]) -> Candidate:
        """Search, and return the chosen candidate. Ctrl-C ends the search early: the choice is then made from what is known.

        Raises:
            KeyboardInterrupt: nothing was known yet.
            PatchError: the time is not enough for the unpatched model, or it cannot be measured.
        """
        trials = self.trials
        try:
            trials.score_plain()
        except OutOfTime as reason:
            message = "the time is not enough to score the unpatched model: give more --minutes, or a smaller --context"
            raise PatchError(message) from reason
        try:
            self._measure([trials.add((patch,)) for patch in singles], _SINGLES)
            self._measure(self._combinations(self._parts()), _COMBINATIONS)
            # Options for which there was no time at first, and what they lead to.
            left = [each for each in trials.candidates if each.patches and not each.patched_ms and each.lost is None]
            self._measure(left, _COMBINATIONS)
            self._climb()
            self._halve()
        except KeyboardInterrupt:
            if not any(each.patched_ms for each in trials.candidates):
                raise
            self.stopped = True
        return choose(trials)

    def _measure(self, candidates: Sequence[Candidate], share: float) -> None:
        """Measure candidates briefly, until a share of the time is over."""
        self.trials.measure_all(candidates, self.rounds, self.trials.few, self.trials.until(share))

    # -- single patches ------------------------------------------------------------------------------------------------------

    def _parts(self) -> list[Candidate]:
        """Of each patch the fastest option that does not lower quality beyond the bound on all documents, if it is worth combining."""
        parts = []
        for name in self._patch_names():
            for option in self._options(name):
                if self.trials.spent < self.trials.seconds:
                    self.trials.score(option)
                if self._is_part(option):
                    parts.append(option)
                    break
        return parts

    def _patch_names(self) -> list[str]:
        return list(dict.fromkeys(each.patches[0].name for each in self.candidates if each.patches))

    def _options(self, name: str) -> list[Candidate]:
        """The single candidates of one patch that could be parts, the fastest first."""
        options = [each for each in self.candidates if len(each.patches) == 1 and each.patches[0].name == name and self._is_part(each)]
        return sorted(options, key=lambda each: each.speed, reverse=True)

    def _is_part(self, single: Candidate) -> bool:
        """Whether it may pay in a combination: hardly slower alone, and perplexity within the bound relative to no patch."""
        if single.lost is not None and single.lost.kind not in ("slower", "beyond the bound"):
            return False
        plain = self.trials.plain
        if single.increase is None or plain.increase is None:
            return False
        added = (1 + single.increase.value) / (1 + plain.increase.value) - 1 if math.isfinite(plain.increase.value) else 0.0
        return single.speedup is not None and single.speedup.high >= _HOPELESS and added <= self.trials.bound

    # -- combinations --------------------------------------------------------------------------------------------------------

    def _combinations(self, parts: Sequence[Candidate]) -> list[Candidate]:
        """Every combination of two parts or more, by the product of their speeds, the fastest first."""
        chosen = [group for size in range(2, len(parts) + 1) for group in itertools.combinations(parts, size)]
        chosen.sort(key=lambda group: math.prod(part.speed for part in group), reverse=True)
        return [self.trials.add(tuple(part.patches[0] for part in group)) for group in chosen]

    def _climb(self) -> None:
        """Hill climbing: measure neighbours of the best, a few at a time, until none is promising or the time is over."""
        while self.trials.spent < self.trials.until(_COMBINATIONS):
            neighbours = [self.trials.add(patches) for patches in self._neighbours()[:_LEADERS]]
            if not neighbours:
                return
            self._measure(neighbours, _COMBINATIONS)

    def _neighbours(self) -> list[tuple[Patch, ...]]:
        """Untried combinations: a leader with one patch more, or with another option of one patch; the most promising first."""
        leaders = self._leaders()
        alone = {each.patches[0].spec: each.speed for each in self.candidates if len(each.patches) == 1}
        options = [option for name in self._patch_names() for option in self._options(name)]
        tried = {each.spec for each in self.candidates}
        found: dict[str, tuple[float, tuple[Patch, ...]]] = {}
        for leader, option in itertools.product(leaders, options):
            kept = [patch for patch in leader.patches if patch.name != option.patches[0].name]
            given_up = [alone[patch.spec] for patch in leader.patches if patch not in kept]
            promise = leader.speed * option.speed / math.prod(given_up)
            candidate = Candidate(ordered([*kept, *option.patches]))
            if candidate.spec not in tried and promise >= _PROMISING * leaders[0].speed:
                known = found.get(candidate.spec, (0.0, candidate.patches))
                found[candidate.spec] = max(known, (promise, candidate.patches), key=lambda entry: entry[0])
        return [patches for _, patches in sorted(found.values(), key=lambda entry: entry[0], reverse=True)]

    def _leaders(self) -> list[Candidate]:
        """The fastest few that are within the bound on all documents."""
        leaders: list[Candidate] = []
        for candidate in sorted(self.trials.alive, key=lambda each: each.speed, reverse=True):
            if len(leaders) < _LEADERS and self.trials.spent < self.trials.until(_COMBINATIONS):
                self.trials.score(candidate)
                leaders += [candidate] if candidate.lost is None else []
        return leaders

    # -- halving -------------------------------------------------------------------------------------------------------------

    def _halve(self) -> None:
        """Successive halving: measure the faster half on all documents, twice as long each time, until one is left or time is over."""
        trials, rounds, pool = self.trials, self.rounds, self.trials.alive
        while pool and trials.spent < trials.seconds:
            rounds *= 2
            pool = sorted(pool, key=lambda each: each.speed, reverse=True)[: min(math.ceil(len(pool) / 2), _MOST_FINALISTS)]
            stages = math.ceil(math.log2(len(pool))) + 1
            trials.measure_all(pool, rounds, trials.documents, trials.spent + (trials.seconds - trials.spent) / stages)
            if len(pool) == 1 and pool[0].lost is None:
                break
            # If all finalists have lost by now, those that were dropped before are measured after all.
            pool = [each for each in pool if each.lost is None] or trials.alive
        if pool:
            # As long as the winner: the winner without each of its patches, and whatever seemed faster in fewer rounds.
            last = pool[0]
            parts = set(specs_of(last.patches))
            rivals = [
                each for each in trials.alive if each is not last and (set(specs_of(each.patches)) < parts or each.speed > last.speed)
            ]
            trials.measure_all(rivals, rounds, trials.documents, trials.seconds)
