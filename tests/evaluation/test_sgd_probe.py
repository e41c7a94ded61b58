import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from common import UserError
from evaluation.sgd_probe import (
    global_batch_size,
    linear_top1,
    probe_correct,
    probe_layer,
    sgd_steps,
    simclr_protocol,
)
from tests.evaluation.clusters import clusters
from tests.evaluation.sessions import FakeSession, on_ranks

CPU = torch.device("cpu")


class Epochs(list):
    """Loader with the same batches in every epoch."""

    def __init__(self, batches, bad_samples=None):
        super().__init__(SimpleNamespace(views=x, label=y) for x, y in batches)
        self.bad_samples = bad_samples or SimpleNamespace(replaced=0, check=lambda replaced, epoch: None)

    def close(self):
        pass


def identity(x):
    return x


def batches_of(features, label, size, epochs, rank=0, world_size=1):
    """Features and labels of this rank, in the same batches in every epoch."""
    for _ in range(epochs):
        for x, y in zip(features.split(size), label.split(size), strict=True):
            yield x.chunk(world_size)[rank], y.chunk(world_size)[rank]


def test_steps_are_nesterov_momentum_with_a_cosine_schedule():
    """Compared with the update v <- 0.9 v + g, w <- w - lr (g + 0.9 v)."""
    features, label = clusters(64, 0, 1.0)
    probe = probe_layer(16, 4, 0, CPU)
    weight, velocity = probe.weight.detach().clone(), torch.zeros(4, 16)
    bias, bias_velocity = torch.zeros(4), torch.zeros(4)
    losses = list(sgd_steps(probe, batches_of(2 * features, label, 16, epochs=3), 16, 12, identity))
    expected = []
    for step in range(12):
        rows = slice(step % 4 * 16, step % 4 * 16 + 16)
        weight.requires_grad_(), bias.requires_grad_()
        loss = cross_entropy(2 * features[rows] @ weight.T + bias, label[rows])
        g, h = torch.autograd.grad(loss, (weight, bias))
        lr = 0.1 * 16 / 256 * 0.5 * (1 + math.cos(math.pi * step / 12))
        velocity, bias_velocity = 0.9 * velocity + g, 0.9 * bias_velocity + h
        weight, bias = weight.detach() - lr * (g + 0.9 * velocity), bias.detach() - lr * (h + 0.9 * bias_velocity)
        expected.append(loss.item())
    torch.testing.assert_close(probe.weight.detach(), weight)
    torch.testing.assert_close(probe.bias.detach(), bias)
    torch.testing.assert_close(torch.stack(losses), torch.tensor(expected))


def test_two_ranks_take_the_same_steps_as_one():
    features, label = clusters(64, 0, 1.0)

    def run(session):
        probe = probe_layer(16, 4, 0, CPU)
        batches = batches_of(features, label, 16, 2, session.rank, session.world_size)
        list(sgd_steps(probe, batches, 16, 8, session.mean))
        return probe.weight

    (alone,), together = on_ranks(1, run), on_ranks(2, run)
    assert torch.equal(*together)
    torch.testing.assert_close(together[0], alone)


def test_protocol_scores_every_seed_on_rank_0():
    train, test = clusters(64, 0, 0.5), clusters(20, 1, 0.5)
    closed = []

    def create_loader(seed):
        loader = Epochs(batches_of(*train, 16, epochs=1))
        loader.close = lambda: closed.append(seed)
        return loader

    sizes = {"feature_dim": 16, "classes": 4, "batch_size": 16, "epochs": 5, "seeds": 2}
    results = simclr_protocol(identity, create_loader, test, FakeSession(), **sizes)
    assert [(row["seed"], row["steps"]) for row in results] == [(0, 20), (1, 20)] and closed == [0, 1]
    losses = torch.stack(
        list(sgd_steps(probe_layer(16, 4, 1, CPU), batches_of(*train, 16, epochs=5), 16, 20, identity))
    )
    assert results[1]["train_loss"] == pytest.approx(losses[-4:].mean().item())
    assert results[0]["train_loss"] != results[1]["train_loss"] and results[0]["top1"] > 0.5
    assert "top1" not in simclr_protocol(identity, create_loader, None, FakeSession(), **sizes)[0]


def test_unreadable_images_of_all_ranks_are_limited_after_each_epoch():
    train, checked = clusters(32, 0, 0.5), []

    def run(session):
        def create_loader(seed):
            replaced = SimpleNamespace(replaced=1 + session.rank, check=lambda *counts: checked.append(counts))
            return Epochs(batches_of(*train, 16, 1, session.rank, session.world_size), replaced)

        sizes = {"feature_dim": 16, "classes": 4, "batch_size": 16, "epochs": 2, "seeds": 1}
        simclr_protocol(identity, create_loader, None, session, **sizes)

    on_ranks(2, run)
    assert sorted(checked) == [(3, 0), (3, 0), (3, 1), (3, 1)]


def test_global_batch_size_divides_by_the_ranks():
    assert global_batch_size(4096, 65, 1) == 65 and global_batch_size(32, 65, 3) == 30
    with pytest.raises(UserError, match="3 labeled training images does not divide among 4 processes"):
        global_batch_size(4096, 3, 4)


def test_probe_depends_on_its_seed_and_learns():
    assert torch.equal(probe_layer(16, 4, 3, CPU).weight, probe_layer(16, 4, 3, CPU).weight)
    assert not torch.equal(probe_layer(16, 4, 3, CPU).weight, probe_layer(16, 4, 4, CPU).weight)
    train, test = clusters(512, 0, 0.3, classes=8), clusters(200, 1, 0.3, classes=8)
    probe = probe_layer(16, 8, 0, CPU)
    untrained = probe_correct(probe, *test, CPU)
    list(sgd_steps(probe, batches_of(*train, 64, epochs=20), 64, 160, identity))
    top1, top5 = probe_correct(probe, *test, CPU)
    assert untrained[0] < untrained[1] < 195 < top1 <= top5 <= 200


def test_linear_classifier_separates_clusters_and_guesses_on_noise():
    train, test = clusters(512, 0, 0.3), clusters(200, 1, 0.3)
    assert linear_top1(*train, *test) > 0.97
    noise = torch.randn(512, 16, generator=torch.Generator().manual_seed(3))
    assert linear_top1(noise, train[1], torch.randn(400, 16), torch.arange(400) % 4) < 0.4
    assert linear_top1(*train, *test, seed=1) == linear_top1(*train, *test, seed=1)


def test_single_training_sample_predicts_its_class():
    train, test = clusters(4, 0, 0.3), clusters(42, 1, 0.3)
    for place, label in enumerate(train[1].tolist()):
        one = (train[0][place : place + 1], train[1][place : place + 1])
        expected = (test[1] == label).float().mean().item()
        assert linear_top1(*one, *test) == expected
