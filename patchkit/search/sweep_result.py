"""Results of a sweep, and the Pareto front of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from patchkit.measure.paired import Interval, mean_difference
from patchkit.measure.perplexity import perplexity_of
from patchkit.patches.streaming import StreamingLLM

UNPATCHED = "unpatched"

BLOCKS = "unpatched in blocks"


@dataclass(frozen=True)
class SweepPoint:
    """Measurements of one configuration; None where it was not measured.

    Attributes:
        name: its spec, `UNPATCHED` or `BLOCKS`.
        refused: why the model cannot run it.
        nll: mean nats per token of each document.
        perplexity: over all tokens of all documents.
        refreshes: how often the cache was refreshed while scoring.
        ms_per_token: median over rounds; a round is one step, or the mean of R steps where every R-th refreshes.
        over_unpatched: its time / the time of unpatched steps in the same rounds, median.
        cache_bytes: after C + 1 tokens and the timed ones; of the unpatched model, after the longest document.
    """

    name: str
    sinks: int | None = None
    window: int | None = None
    refresh: str | None = None
    refused: str | None = None
    nll: list[float] = field(default_factory=list)
    perplexity: float | None = None
    refreshes: int = 0
    ms_per_token: float | None = None
    over_unpatched: float | None = None
    cache_bytes: int | None = None

    @property
    def label(self) -> str:
        """Sinks + window and the refresh, for tables and plots."""
        return self.name if self.window is None else " ".join([f"{self.sinks}+{self.window}", *([self.refresh] if self.refresh else [])])


@dataclass(frozen=True)
class Sweep:
    """The result of `run_sweep`.

    Attributes:
        settings: model, documents and options; a sweep is only resumed if they are the same.
        weights: number of scored tokens of each document.
    """

    settings: dict[str, Any]
    weights: list[int]
    rows: list[SweepPoint]

    def row(self, name: str) -> SweepPoint | None:
        """The configuration of this name, if it was scored."""
        return next((row for row in self.rows if row.name == name and row.nll), None)

    def ratio(self, row: SweepPoint, other: str) -> Interval | None:
        """Perplexity of ``row`` / that of the one named ``other``, with the interval over documents; None if either was not scored."""
        against = self.row(other)
        if against is None or not row.nll or row.name == other:
            return None
        difference = mean_difference(row.nll, against.nll, self.weights)
        return Interval(*(perplexity_of(x) for x in (difference.value, difference.low, difference.high)))

    def over_plain(self, row: SweepPoint) -> Interval | None:
        """Perplexity of ``row`` / that of the same window and sinks without refresh; None for a row without refresh."""
        return None if row.refresh is None else self.ratio(row, StreamingLLM(sinks=row.sinks or 0, window=row.window or 1).spec)

    def front(self) -> list[SweepPoint]:
        """Pareto front in perplexity, time and bytes: rows that no other row dominates.

        Time is relative to unpatched steps in the same rounds, because the machine drifts between rows. Times that differ by less than
        3 % count as equal.
        """
        figures = {
            row.name: (row.perplexity, _in_steps(row.over_unpatched), row.cache_bytes)
            for row in self.rows
            if row.perplexity is not None and row.over_unpatched is not None and row.cache_bytes is not None
        }
        return [row for row in self.rows if row.name in figures and not any(_dominates(f, figures[row.name]) for f in figures.values())]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        front = {row.name for row in self.front()}
        rows = []
        for row in self.rows:
            ratios = {"over_blocks": self.ratio(row, BLOCKS), "over_plain": self.over_plain(row)}
            intervals = {name: ratio and dataclasses.asdict(ratio) for name, ratio in ratios.items()}
            rows.append({**dataclasses.asdict(row), **intervals, "on_front": row.name in front})
        return {"settings": self.settings, "weights": self.weights, "rows": rows}


def _in_steps(ratio: float) -> int:
    """Round a ratio of times to a logarithmic scale with steps of 3 %."""
    return round(math.log(ratio) / math.log(1.03))


def _dominates(left: tuple[float, ...], right: tuple[float, ...]) -> bool:
    return left != right and all(a <= b for a, b in zip(left, right, strict=True))
