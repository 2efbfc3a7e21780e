"""Samples of a benchmark, their summary, and the CSV file that they are written to."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FIGURES = ("ttft_ms", "latency_ms", "tokens_per_s")


@dataclass(frozen=True)
class Sample:
    """One answer or one failure.

    Attributes:
        prompt, iteration: index of the prompt, and of the iteration.
        ttft_ms: milliseconds from the request to the first text.
        latency_ms: milliseconds from the request to the end of the answer.
        tokens: new tokens as the server counts them, else events with text; None in a failure, and so are the times.
        error: reason of the failure; None for an answer.
    """

    prompt: int
    iteration: int
    ttft_ms: float | None = None
    latency_ms: float | None = None
    tokens: int | None = None
    error: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens over latency; None in a failure."""
        return None if self.tokens is None or not self.latency_ms else 1000 * self.tokens / self.latency_ms


def summary(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Mean, median, standard deviation, smallest, largest and 95th percentile of each figure, over the answers; empty without one."""
    found = {}
    for figure in FIGURES:
        values = [getattr(sample, figure) for sample in samples if sample.error is None]
        if values:
            found[figure] = {
                "mean": statistics.fmean(values),
                "median": statistics.median(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "min": min(values),
                "max": max(values),
                "p95": float(np.percentile(values, 95)),
            }
    return found


class SampleFile:
    """A CSV file with one line per sample, written as samples arrive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = [*(each.name for each in dataclasses.fields(Sample)), "tokens_per_s"]
        self._append(self.columns, "w")

    def add(self, sample: Sample) -> None:
        """Append one line."""
        self._append([getattr(sample, column) for column in self.columns], "a")

    def _append(self, row: Sequence[Any], mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)
