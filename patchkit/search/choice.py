"""The choice among measured candidates: the fastest within the bound, and why each other one lost."""

from __future__ import annotations

from patchkit.search.candidate import Candidate, Lost, percent
from patchkit.search.trials import Trials

# Among candidates within this factor of the fastest, the one with the fewest patches is chosen.
_EQUAL = 0.99


def choose(trials: Trials) -> Candidate:
    """Return the fastest candidate within the bound, no patch among them, and give every other one its `Lost`."""
    paying = [each for each in trials.alive if trials.is_within(each) and not (trials.plain_is_within and _least_speedup(each) <= 1)]
    best = trials.plain
    if paying:
        # More rounds are more certain: candidates of the last halving go before those that were measured only once.
        longest = max(len(each.patched_ms) for each in paying)
        finalists = [each for each in paying if len(each.patched_ms) >= longest / 2]
        fastest = max(each.speed for each in finalists)
        equal = [each for each in finalists if each.speed >= _EQUAL * fastest]
        best = min(equal, key=lambda each: (len(each.patches), -each.speed))
    for candidate in trials.candidates:
        if candidate is not best and candidate.lost is None:
            candidate.lost = _lost_to(best, candidate, trials)
    return best


def _least_speedup(candidate: Candidate) -> float:
    """The lower end of its speed-up."""
    return candidate.speedup.low if candidate.speedup else 0.0


def _lost_to(best: Candidate, candidate: Candidate, trials: Trials) -> Lost:
    if candidate.patches and not candidate.patched_ms:
        return Lost("no time", "not tried")
    if not trials.is_within(candidate):
        shown = "not measured" if candidate.increase is None else f"{percent(candidate.increase)} on {candidate.documents} documents"
        return Lost("beyond the bound", f"perplexity increase {shown}")
    if best is trials.plain:
        return Lost("slower", f"{candidate.speedup} times the unpatched speed: not shown to be faster")
    own, other = (f"{each.speed:.3g} times the unpatched speed in {len(each.patched_ms)} rounds" for each in (candidate, best))
    return Lost("beaten", f"{own}, the chosen one {other}" if candidate.patches else f"the chosen one has {other}")
