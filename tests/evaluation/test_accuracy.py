import math

import pytest
import torch
from scipy import stats

from evaluation.accuracy import classes_ahead, count_correct, mean_and_half_width, over_seeds, scores, wilson


def test_lower_class_ranks_first_among_equal_scores():
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).repeat(4, 1)
    ahead = classes_ahead(scores, torch.arange(4))
    assert ahead.tolist() == [2, 0, 1, 3]
    assert count_correct(ahead, 4).tolist() == [1, 4] and count_correct(ahead + 3, 9).tolist() == [0, 2]


def test_nan_scores_are_never_correct():
    nan = float("nan")
    scores = torch.tensor([[nan, nan, nan], [1.0, nan, 0.0], [1.0, nan, 2.0], [2.0, nan, 1.0]])
    assert classes_ahead(scores, torch.tensor([0, 1, 2, 0])).tolist() == [3, 3, 1, 1]


def test_student_t_interval_over_seeds():
    mean, half_width = mean_and_half_width([0.71, 0.74, 0.70])
    # 4.302652729749462 is the 0.975 quantile of Student's t with 2 degrees of freedom
    deviation = math.sqrt(((0.71 - mean) ** 2 + (0.74 - mean) ** 2 + (0.70 - mean) ** 2) / 2)
    assert mean == pytest.approx(2.15 / 3) and half_width == pytest.approx(4.302652729749462 * deviation / math.sqrt(3))
    assert mean_and_half_width([0.7]) == (0.7, None)
    assert mean_and_half_width([0.7, 0.7])[1] == 0


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 10), (10, 10), (691, 1000)])
def test_wilson_interval_satisfies_its_definition(correct, total):
    low, high = wilson(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert (correct > 0 or low == 0) and (correct < total or high == 1)
    # its ends are the shares from which correct / total is exactly z standard deviations away
    for end in {low, high} - {0.0, 1.0}:
        z = (correct / total - end) / math.sqrt(end * (1 - end) / total)
        assert abs(z) == pytest.approx(stats.norm.ppf(0.975))


def test_intervals_of_version_1():
    """Numbers of the formulas that version 1 spelled out."""
    assert wilson(5, 40) == pytest.approx((0.05459500250945403, 0.26112119838851094), abs=1e-9)
    assert wilson(6, 40) == pytest.approx((0.07061187717320361, 0.29072324366489705), abs=1e-9)
    assert mean_and_half_width([0.4, 0.575])[1] == pytest.approx(1.1117929144152838, abs=1e-9)
    assert mean_and_half_width([0.625, 0.625, 0.6])[1] == pytest.approx(0.035855439414578874, abs=1e-9)


def test_mean_score_over_seeds():
    results = [scores((6 + seed, 9), 10) for seed in range(3)]
    assert results[0] == {"top1": 0.6, "top5": 0.9, "top1_wilson_95": wilson(6, 10)}
    summary = over_seeds(results)
    assert summary["top1"]["mean"] == pytest.approx(0.7) and summary["top5"]["half_width_95"] == 0
