import math

import numpy as np
import pytest
from scipy import stats

from evaluation.intervals import mean_and_half_width, student_t, wilson


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 29, 100])
def test_student_t_is_scipys(degrees):
    for level in (0.5, 0.95, 0.99):
        assert student_t(level, degrees) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-9)


def test_mean_and_half_width_over_seeds():
    values = [0.71, 0.74, 0.70]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    mean, half_width = mean_and_half_width(values)
    assert mean - half_width == pytest.approx(low) and mean + half_width == pytest.approx(high)
    assert mean_and_half_width([0.7]) == (0.7, None)
    assert mean_and_half_width([0.7, 0.7])[1] == 0


@pytest.mark.parametrize(("right", "total"), [(0, 10), (3, 10), (10, 10), (691, 1000)])
def test_wilson_is_scipys_and_its_definition(right, total):
    low, high = wilson(right, total)
    theirs = stats.binomtest(right, total).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12) and 0 <= low <= right / total <= high <= 1
    # the shares p0 from which right / total is just z standard deviations away
    for end in {low, high} - {0.0, 1.0}:
        z = (right / total - end) / math.sqrt(end * (1 - end) / total)
        assert abs(z) == pytest.approx(stats.norm.ppf(0.975))
