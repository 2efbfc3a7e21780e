"""Intervals for paired measurements: the same round timed twice, the same document scored twice.

Drift of the machine or the difficulty of a document affects both measurements of a pair, and cancels in their ratio or difference;
so intervals are over pairs. Percentile bootstrap: Efron & Tibshirani, "An Introduction to the Bootstrap", chapter 13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A figure with its confidence interval: `low` <= `value` <= `high`. Both bounds are infinite if there is a single pair."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def median_ratio(numerators: Sequence[float], denominators: Sequence[float], confidence: float = 0.95, seed: int = 0) -> Interval:
    """Median over pairs of numerator / denominator, with its bootstrap interval. For times, which have outliers.

    Raises:
        ValueError: no pairs, or sequences of unequal length.
    """
    _check_paired(numerators, denominators)
    ratios = np.asarray(numerators, dtype=float) / np.asarray(denominators, dtype=float)
    resampled = np.median(ratios[_resamples(len(ratios), seed)], axis=1)
    return _interval(float(np.median(ratios)), resampled, len(ratios), confidence)


def mean_difference(
    left: Sequence[float], right: Sequence[float], weights: Sequence[float] | None = None, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over pairs of left - right, with its bootstrap interval; `weights` (tokens of a document) weigh the pairs.

    Raises:
        ValueError: no pairs, or sequences of unequal length.
    """
    _check_paired(left, right)
    differences = np.asarray(left, dtype=float) - np.asarray(right, dtype=float)
    weight = np.ones_like(differences) if weights is None else np.asarray(weights, dtype=float)
    _check_paired(left, weight.tolist())
    picks = _resamples(len(differences), seed)
    resampled = (differences[picks] * weight[picks]).sum(1) / weight[picks].sum(1)
    return _interval(float((differences * weight).sum() / weight.sum()), resampled, len(differences), confidence)


def _check_paired(left: Sequence[float], right: Sequence[float]) -> None:
    if not len(left) or len(left) != len(right):
        raise ValueError(f"{len(left)} and {len(right)} measurements cannot be paired: give equal numbers of both, at least one")


def _resamples(pairs: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(pairs, size=(_RESAMPLES, pairs))


def _interval(value: float, resampled: np.ndarray, pairs: int, confidence: float) -> Interval:
    if pairs == 1:
        return Interval(value, -math.inf, math.inf)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(min(low, value)), float(max(high, value)))
