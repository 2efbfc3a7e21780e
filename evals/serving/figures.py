"""Arithmetic of the sections: percentiles, ratios of rounds, and bars."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from patchkit.measure.paired import median_ratio


@dataclass(frozen=True)
class Bar:
    """A figure with the value that it has to reach, or not to exceed."""

    name: str
    value: float
    bar: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether the figure meets the bar."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def row(self) -> dict[str, Any]:
        """Return it as data."""
        return {**asdict(self), "holds": self.holds}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value below or at which lies at least ``share`` of all (nearest rank).

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True)
class Burst:
    """What one way has done in one round.

    Attributes:
        seconds: from the first request to the end of the last answer.
        tokens: new tokens of all answers.
        firsts: [clients], seconds to the first text of each.
        texts: [clients].
    """

    seconds: float
    tokens: int
    firsts: tuple[float, ...]
    texts: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Tokens per second of all clients together."""
        return self.tokens / self.seconds


def compared(bursts: dict[str, list[Burst]], ours: str) -> dict[str, dict[str, Any]]:
    """Return the figures of each way, with the ratios of ``ours`` to it, round by round."""
    found = {}
    reference = bursts[ours]
    for name, rounds in bursts.items():
        firsts = [first for burst in rounds for first in burst.firsts]
        rate = median_ratio([burst.rate for burst in reference], [burst.rate for burst in rounds])
        slowest = [percentile(burst.firsts, 0.95) for burst in rounds]
        first = median_ratio([percentile(burst.firsts, 0.95) for burst in reference], slowest)
        pairs = [pair for mine, theirs in zip(reference, rounds, strict=True) for pair in zip(mine.texts, theirs.texts, strict=True)]
        found[name] = {
            "tokens_per_second": statistics.median(burst.rate for burst in rounds),
            "tokens": [burst.tokens for burst in rounds],
            "first_token_p50_ms": 1000 * percentile(firsts, 0.5),
            "first_token_p95_ms": 1000 * percentile(firsts, 0.95),
            "ours_over_this": asdict(rate),
            "first_token_p95_ours_over_this": asdict(first),
            "texts_equal_to_ours": f"{sum(a == b for a, b in pairs)} of {len(pairs)}",
        }
    return found


def gap_ratio(gaps: Sequence[float]) -> float:
    """Return the largest gap over the median gap.

    Raises:
        ValueError: fewer than two gaps.
    """
    if len(gaps) < 2:
        raise ValueError(f"{len(gaps)} gaps: at least 2 are needed")
    return max(gaps) / statistics.median(gaps)


def growth(samples: Sequence[int], warm_up: float = 0.25, window: float = 0.1) -> float:
    """Return how much larger the last samples are than those after the warm-up, as a share: 0.02 is 2 %.

    Args:
        warm_up: share of the samples that is left out at the beginning.
        window: share of the samples of which medians are compared.
    """
    width = max(1, int(window * len(samples)))
    begin = min(int(warm_up * len(samples)), len(samples) - width)
    return statistics.median(samples[-width:]) / statistics.median(samples[begin : begin + width]) - 1
