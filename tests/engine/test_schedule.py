"""Learning rate scaling and the warm-up cosine schedule."""

import math

import pytest

from engine.optim import OptimConfig
from engine.schedule import create_schedule, peak_learning_rate, warmup_cosine


def test_scaling_rules_match_the_papers():
    assert peak_learning_rate(0.3, 4096, "linear") == pytest.approx(4.8)
    assert peak_learning_rate(0.075, 4096, "sqrt") == pytest.approx(4.8)
    assert peak_learning_rate(0.075, 256, "sqrt") == pytest.approx(1.2)
    assert peak_learning_rate(2e-3, 256, "none") == 2e-3


def test_linear_warmup_then_cosine():
    rates = [warmup_cosine(step, warmup_steps=10, total_steps=110, peak=4.8) for step in range(111)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(2.4)
    assert rates[10] == pytest.approx(4.8) == max(rates)
    assert rates[60] == pytest.approx(2.4)
    assert rates[35] == pytest.approx(4.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[110] == pytest.approx(0, abs=1e-12)


def test_no_warmup_and_runs_shorter_than_warmup():
    assert warmup_cosine(0, 0, 5, 1.0) == 1.0
    assert warmup_cosine(3, 10, 5, 1.0) == pytest.approx(0.3)  # a run shorter than its warm-up


def test_the_warm_up_takes_a_tenth_of_the_run_at_most():
    config = OptimConfig("sgd", lr=1.0, scaling="none", warmup_epochs=10)
    schedule = create_schedule(config, 256, 10, 10)
    assert schedule(10) == 1 and schedule(5) == pytest.approx(0.5)
