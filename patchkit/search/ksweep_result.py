"""Results of a sweep over draft lengths: of each call, and of each length."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from patchkit.measure.environment import environment
from patchkit.speculation.statistics import RunStatistics


@dataclass(frozen=True)
class TimedCall:
    """One call of generate.

    Attributes:
        k: draft length; None for plain decoding by the unpatched model.
        tokens: number of new tokens.
        identical: its new tokens are those of plain decoding.
    """

    k: int | None
    prompt: int
    iteration: int
    tokens: int
    seconds: float
    identical: bool

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, prompt included in the time."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class DraftLengthResult:
    """All calls with one draft length. A standard deviation is None where there is a single iteration.

    Attributes:
        tokens_per_s, tokens_per_s_std: mean and standard deviation over iterations, each with all prompts.
        speedup, speedup_std: plain time / own time, median over prompts; mean and standard deviation over iterations.
        identical, runs: number of calls whose tokens are those of plain decoding, and of all calls.
        statistics: statistics of the rounds of speculation; None for plain decoding.
    """

    k: int | None
    tokens_per_s: float
    tokens_per_s_std: float | None
    speedup: float
    speedup_std: float | None
    identical: int
    runs: int
    statistics: RunStatistics | None

    @property
    def name(self) -> str:
        """The K, or "plain"."""
        return "plain" if self.k is None else str(self.k)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the summary of the statistics."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return plain | {"statistics": None if self.statistics is None else self.statistics.summary()}


@dataclass(frozen=True)
class KSweep:
    """The result of `run_ksweep`; its first row is plain decoding."""

    draft: str
    new_tokens: int
    rows: list[DraftLengthResult]
    runs: list[TimedCall]

    @property
    def identical(self) -> bool:
        """Whether every call with every K gave the tokens of plain decoding."""
        return all(run.identical for run in self.runs)

    @property
    def best(self) -> DraftLengthResult:
        """The draft length with the most tokens per second, plain decoding included."""
        return max(self.rows, key=lambda row: row.tokens_per_s)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, with the machine."""
        return {
            "draft": self.draft,
            "new_tokens": self.new_tokens,
            "identical": self.identical,
            "best_k": self.best.k or 0,
            "rows": [row.to_dict() for row in self.rows],
            "environment": environment(),
        }


def table(sweep: KSweep) -> Table:
    """Table of a sweep over draft lengths for a terminal of 100 columns or more."""
    result = Table(title=f"{sweep.draft}, {sweep.new_tokens} new tokens", title_justify="left")
    for heading in ("K", "tokens/s", "speed-up", "predicted", "accepted", "tokens/step", "identical"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in sweep.rows:
        figures = row.statistics or RunStatistics()
        result.add_row(
            row.name,
            f"{row.tokens_per_s:.1f}{_figure(row.tokens_per_s_std, ' ± {:.1f}')}",
            f"{row.speedup:.2f}{_figure(row.speedup_std, ' ± {:.2f}')}",
            _figure(figures.predicted_speedup, "{:.2f}"),
            _figure(figures.acceptance_rate, "{:.0%}"),
            _figure(figures.tokens_per_target_step, "{:.2f}"),
            f"{row.identical}/{row.runs}",
        )
    return result


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
