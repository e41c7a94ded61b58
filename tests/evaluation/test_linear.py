from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from common import UserError
from evaluation import linear
from evaluation.linear import (
    L2_PATH,
    Split,
    fast_protocol,
    fit_correct,
    logistic_regression,
    standardization,
    stratified_split,
)
from tests.evaluation.clusters import clusters

CPU = torch.device("cpu")


def split_of(features, label, rows=None):
    return Split(features, label, *standardization(features, CPU), CPU, rows)


def objective(theta, x, label, l2):
    """Mean cross-entropy + l2 / 2 |weights|^2 of (C, D + 1) parameters."""
    logits = x @ theta[:, :-1].T + theta[:, -1]
    own = logits[torch.arange(len(x)), label]
    return (logits.logsumexp(1) - own).mean() + l2 / 2 * theta[:, :-1].square().sum()


@pytest.mark.parametrize("l2", [1e-3, 1e-2, 1.0])
def test_solution_matches_scikit_learn(l2):
    """Two points with gradients g and h differ by at most (|g| + |h|) / m, where m is the curvature between them.

    The curvature is measured at our solution, without the one direction that changes nothing (the same number added to
    every bias), and halved, because it may be lower nearby.
    """
    features, label = clusters(240, 0, 1.0, classes=4, width=6)
    features = features * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    train = split_of(features, label)
    fit = logistic_regression(train, 4, l2, tolerance=1e-8)
    assert fit.converged and fit.gradient <= 1e-8
    ((x, _),) = train.blocks()
    peer = LogisticRegression(C=1 / (l2 * len(x)), solver="newton-cholesky", tol=1e-10).fit(x.numpy(), label.numpy())
    theirs = torch.from_numpy(np.column_stack([peer.coef_, peer.intercept_]))

    def centered(theta):
        return torch.cat([theta[:, :-1], theta[:, -1:] - theta[:, -1:].mean()], 1)

    def gradient(theta):
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(objective(theta, x, label, l2), theta)[0].norm()

    hessian = torch.autograd.functional.hessian(lambda theta: objective(theta, x, label, l2), fit.theta)
    hessian = hessian.reshape(28, 28)
    shift = torch.zeros(4, 7, dtype=torch.float64)
    shift[:, -1] = 0.5
    curvature = torch.linalg.eigvalsh(hessian + shift.flatten()[:, None] * shift.flatten()).min()
    tolerance = 2 * (gradient(fit.theta) + gradient(theirs)) / curvature
    difference = (centered(fit.theta) - centered(theirs)).norm()
    assert difference <= tolerance < 1e-4 * theirs.norm()
    # a probability changes by at most half of the change of its logits
    ours = (x @ fit.theta[:, :-1].T + fit.theta[:, -1]).softmax(1)
    reach = tolerance * (x.norm(dim=1).max() + 1)
    assert (ours - torch.from_numpy(peer.predict_proba(x.numpy()))).abs().max() <= reach
    assert fit_correct(fit, train)[0] == (peer.predict(x.numpy()) == label.numpy()).sum()


def test_solution_does_not_depend_on_blocks_and_rows(monkeypatch):
    features, label = clusters(200, 0, 1.0)
    rows = torch.arange(0, 200, 3)
    whole = logistic_regression(split_of(features, label, rows), 4, 0.01, tolerance=1e-8)
    monkeypatch.setattr(linear, "BLOCK_ROWS", 7)
    blocks = logistic_regression(split_of(features, label, rows), 4, 0.01, tolerance=1e-8)
    mean, scale = standardization(features, CPU)
    copied = logistic_regression(Split(features[rows], label[rows], mean, scale, CPU), 4, 0.01, tolerance=1e-8)
    for other in (blocks, copied):  # 2 |g| / m: the curvature is at least l2 for weights and larger for biases
        assert other.converged and whole.converged
        torch.testing.assert_close(other.theta, whole.theta, rtol=0, atol=2 * 1e-8 * 68**0.5 / 0.01)


def test_standardized_features_have_mean_0_and_deviation_1_and_constant_ones_become_0():
    features = clusters(500, 0, 1.0)[0] * 1e-3 + 100
    features[:, 3] = 0.1
    ((x, _),) = split_of(features, torch.zeros(500, dtype=torch.int64)).blocks()
    others = torch.arange(16) != 3
    assert (x[:, 3] == 0).all()
    torch.testing.assert_close(x[:, others].mean(0), torch.zeros(15, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(x[:, others].std(0, correction=0), torch.ones(15, dtype=torch.float64))


def test_fit_stopped_early_is_not_converged():
    features, label = clusters(200, 0, 1.0)
    fit = logistic_regression(split_of(features, label), 4, 1e-4, max_iterations=2)
    assert not fit.converged and fit.iterations == 2 and fit.gradient > 1e-6


def test_held_out_part_has_its_share_of_every_class():
    label = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3])
    fitted, held_out = stratified_split(label, 0.2, seed=0)
    assert torch.equal(torch.cat([fitted, held_out]).sort().values, torch.arange(113))
    assert label[held_out].bincount(minlength=4).tolist() == [20, 2, 1, 0]
    assert torch.equal(held_out, stratified_split(label, 0.2, seed=0)[1])
    assert not torch.equal(held_out, stratified_split(label, 0.2, seed=1)[1])
    assert label[stratified_split(label, 0.99, seed=0)[0]].unique().tolist() == [0, 1, 2, 3]


def protocol(train, test, **options):
    options = {"classes": 4, "seeds": 2, "held_out": 0.2, "max_iterations": 1000, "device": CPU} | options
    return fast_protocol(train, test, **options)


def test_penalty_does_not_depend_on_the_test_set():
    train, test = clusters(160, 0, 2.0, width=40), clusters(100, 1, 2.0, width=40)
    outcomes = protocol(train, test)
    others = protocol(train, (test[0].flip(0), test[1]))
    for outcome, other in zip(outcomes, others, strict=True):
        best = max(each["top1"] for each in outcome["l2_path"])
        assert outcome["l2"] == next(each["l2"] for each in outcome["l2_path"] if each["top1"] == best)
        assert outcome["l2"] == other["l2"] and outcome["l2_path"] == other["l2_path"]
        assert outcome["converged"] and outcome["gradient"] <= 1e-6
    assert [outcome["seed"] for outcome in outcomes] == [0, 1] and outcomes[0]["top1"] != others[0]["top1"]


def test_penalty_adapts_to_the_noise():
    """Few samples in many dimensions need a stronger penalty than many samples of separable classes."""
    few = protocol(clusters(64, 0, 4.0, width=100), clusters(100, 1, 4.0, width=100), seeds=1)
    many = protocol(clusters(800, 0, 0.8), clusters(100, 1, 0.8), seeds=1)
    assert few[0]["l2"] > many[0]["l2"] and many[0]["top1"] > 0.85
    noise = torch.randn(400, 16, generator=torch.Generator().manual_seed(3))
    guessed = protocol((noise[:200], torch.arange(200) % 4), (noise[200:], torch.arange(200) % 4), seeds=1)
    assert guessed[0]["top1"] < 0.4 and guessed[0]["top5"] == 1, "all of four classes are among the top 5"


def test_progress_counts_every_fit(monkeypatch):
    totals, done = [], []

    @contextmanager
    def progress_bar(total, text):
        totals.append(total)
        yield lambda advance: done.append(advance)

    monkeypatch.setattr(linear, "progress_bar", progress_bar)
    protocol(clusters(40, 0, 1.0), clusters(8, 1, 1.0))
    assert totals == [sum(done)] == [2 * (len(L2_PATH) + 1)]


def test_one_image_per_class_is_rejected():
    with pytest.raises(UserError, match="No class has two training images"):
        protocol(clusters(4, 0, 1.0), clusters(8, 1, 1.0))
