"""Intervals over pairs: what a pair shares cancels, and the interval covers what it says."""

import math

import numpy as np
import pytest

from patchkit.measure.paired import mean_difference, median_ratio


def test_drift_that_both_share_cancels():
    drift = np.random.default_rng(0).uniform(1, 10, 40)
    found = median_ratio((drift * 1.2).tolist(), drift.tolist())
    assert found.low == pytest.approx(1.2) and found.high == pytest.approx(1.2)


def test_intervals_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(1)
    ratios = [median_ratio(random.lognormal(0, 0.1, 40).tolist(), [1.0] * 40) for _ in range(200)]
    means = [mean_difference(random.normal(0.5, 1, 40).tolist(), [0.5] * 40) for _ in range(200)]
    for found, truth in ((ratios, 1.0), (means, 0.0)):
        covered = sum(interval.low <= truth <= interval.high for interval in found)
        assert 180 <= covered <= 199


def test_weights_count_as_repetitions():
    weighted = mean_difference([1.0, 4.0], [0.0, 0.0], weights=[3, 1])
    assert weighted.value == mean_difference([1.0, 1.0, 1.0, 4.0], [0.0] * 4).value == 1.75


def test_one_pair_allows_no_interval():
    assert median_ratio([2.0], [1.0]).low == -math.inf and mean_difference([2.0], [1.0]).high == math.inf


@pytest.mark.parametrize("pair", [([], []), ([1.0], [1.0, 2.0])])
def test_what_is_no_pair_is_refused(pair):
    with pytest.raises(ValueError, match="cannot be paired"):
        median_ratio(*pair)
    with pytest.raises(ValueError, match="cannot be paired"):
        mean_difference(*pair)
