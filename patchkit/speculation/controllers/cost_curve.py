"""Decaying estimates: acceptance by position, and the cost of a round as an isotonic function of the number of its drafts."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable

from patchkit.speculation.statistics import StepRecord

# Share of the linear rise between two measured K that an unmeasured K between them is assumed to cost. Below 1 is optimistic, so that a
# promising K gets tried.
_INTERPOLATION = 0.5

# Weight, in outcomes, of the position before as a prior of a position's acceptance.
_NEIGHBOUR_WEIGHT = 6.0

# Factor by which an outcome's weight decays with each later outcome at its position: about 50 outcomes count.
_DECAY = 0.98

# Last rounds of each K from which its typical cost is computed.
_WINDOW = 15

# A first measurement of a K above this multiple of the expected time may be a warm-up (a compilation, say). Until a second measurement,
# the expected time is used.
_WARM_UP = 1.3

# Relative change of a typical time below which the curve is not computed again, which saves most of the controller's own time.
_NO_CHANGE = 0.01


class Rate:
    """Exponentially decaying share of hits."""

    def __init__(self, hits: float = 0.0, total: float = 0.0) -> None:
        self.hits, self.total = hits, total

    def add(self, hit: bool) -> None:
        self.hits = _DECAY * self.hits + hit
        self.total = _DECAY * self.total + 1

    @property
    def share(self) -> float:
        return self.hits / self.total

    def share_given(self, prior: float) -> float:
        return (self.hits + _NEIGHBOUR_WEIGHT * prior) / (self.total + _NEIGHBOUR_WEIGHT)

    def forget(self, remembered: float) -> None:
        """Reduce the weight of past outcomes to at most that of ``remembered`` outcomes."""
        if self.total > remembered:
            self.hits, self.total = self.hits * remembered / self.total, remembered


class Curve:
    """Milliseconds as a non-decreasing function of K (isotonic regression), from running measurements at some K.

    A larger K's time bounds that of a smaller K, so that one slow round cannot distort the others.

    Attributes:
        grows: cost(0) = 0, and linear extrapolation beyond the largest measured K; otherwise constant beyond it.
        times: the last milliseconds of each measured K.
        typical: typical milliseconds of each measured K.
        at: estimated milliseconds, by K.
    """

    def __init__(self, grows: bool, largest: int) -> None:
        self.grows = grows
        self.times: dict[int, deque[float]] = {}
        self.typical: dict[int, float] = {}
        self.at = [0.0] * (largest + 1)

    def add(self, k: int, ms: float) -> None:
        self.times.setdefault(k, deque(maxlen=_WINDOW)).append(ms)
        typical = _typical(self.times[k])
        if len(self.times[k]) > 2 and abs(typical - self.typical[k]) < _NO_CHANGE * typical:
            return
        self.typical[k] = typical
        points = self._points()
        self.at = [self._between(points, k) for k in range(len(self.at))]

    def _points(self) -> list[tuple[int, float]]:
        points = [(0, 0.0)] if self.grows else []
        for k in sorted(self.typical):
            ms = self.typical[k]
            if len(self.times[k]) == 1 and len(points) > self.grows and ms > _WARM_UP * self._beyond(points, k):
                ms = self._beyond(points, k)
            while points and points[-1][1] > ms:
                points.pop()
            points.append((k, ms))
        return points

    def _between(self, points: list[tuple[int, float]], k: int) -> float:
        index = bisect.bisect_right(points, (k, math.inf))
        if index == 0:
            return points[0][1]
        if index == len(points):
            return self._beyond(points, k)
        (left, low), (right, high) = points[index - 1], points[index]
        return low + _INTERPOLATION * (high - low) * (k - left) / (right - left)

    def _beyond(self, points: list[tuple[int, float]], k: int) -> float:
        last, ms = points[-1]
        if not self.grows or len(points) == 1:
            return ms
        before, less = points[-2]
        return ms + (ms - less) * (k - last) / (last - before)


class Costs:
    """Cost curves for one number of rows: of the target, and of the drafter in use and after a gap."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.target = Curve(grows=False, largest=largest)
        self.draft = Curve(grows=True, largest=largest)
        self.draft_after_gap = Curve(grows=True, largest=largest)

    def add(self, record: StepRecord, gap: bool) -> None:
        self.target.add(record.k if record.longest else 0, record.target_ms)
        if record.k:
            (self.draft_after_gap if gap else self.draft).add(record.k, record.draft_ms)

    def once(self) -> Costs:
        """Return a copy in which each typical time counts as one measurement."""
        result = Costs(self.largest)
        for name in ("target", "draft", "draft_after_gap"):
            for k, ms in getattr(self, name).typical.items():
                getattr(result, name).add(k, ms)
        return result


def _typical(times: Iterable[float]) -> float:
    """Winsorised mean: times over 1.5 x the upper quartile count as that bound. The smaller one of two times."""
    ordered = sorted(times)
    if len(ordered) < 3:
        return ordered[0]
    most = 1.5 * ordered[3 * (len(ordered) - 1) // 4]
    return sum(min(ms, most) for ms in ordered) / len(ordered)
