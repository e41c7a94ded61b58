import math
import threading
from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy

from evaluation.sgd_probe import linear_top1, probe_correct, probe_layer, train_on_views
from tests.evaluation.clusters import clusters

CPU = torch.device("cpu")


class Epochs(list):
    """A loader with the same batches in every epoch."""


def loader_of(features, label, size, rank=0, world_size=1):
    return Epochs(
        SimpleNamespace(views=x, label=y)
        for x, y in zip(
            (part.chunk(world_size)[rank] for part in features.split(size)),
            (part.chunk(world_size)[rank] for part in label.split(size)),
            strict=True,
        )
    )


def test_steps_are_nesterov_with_a_cosine():
    """Against the update written out: v <- 0.9 v + g, w <- w - lr (g + 0.9 v)."""
    features, label = clusters(64, 0, 1.0)
    probe = probe_layer(16, 4, 0, CPU)
    weight, velocity = probe.weight.detach().clone(), torch.zeros(4, 16)
    bias, bias_velocity = torch.zeros(4), torch.zeros(4)
    losses = list(train_on_views(probe, lambda x: 2 * x, loader_of(features, label, 16), batch_size=16, epochs=3))
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
    epochs = torch.tensor(expected).view(3, 4).mean(1)
    torch.testing.assert_close(torch.stack(losses), epochs)


def test_two_ranks_take_the_same_steps_as_one():
    """Played in lockstep: each rank's gradients wait for the other's."""
    features, label = clusters(64, 0, 1.0)
    alone = probe_layer(16, 4, 0, CPU)
    list(train_on_views(alone, lambda x: x, loader_of(features, label, 16), batch_size=16, epochs=2))
    slots, meet = [None, None], threading.Barrier(2, timeout=30)

    def mean_of(rank):
        def mean(part):
            slots[rank] = part
            meet.wait()
            total = (slots[0] + slots[1]) / 2
            meet.wait()
            return total

        return mean

    probes = [probe_layer(16, 4, 0, CPU) for _ in range(2)]

    def run(rank):
        part = loader_of(features, label, 16, rank, 2)
        list(train_on_views(probes[rank], lambda x: x, part, batch_size=16, epochs=2, mean_over_ranks=mean_of(rank)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.equal(probes[0].weight, probes[1].weight)
    torch.testing.assert_close(probes[0].weight, alone.weight)


def test_a_probe_begins_by_its_seed_and_learns():
    assert torch.equal(probe_layer(16, 4, 3, CPU).weight, probe_layer(16, 4, 3, CPU).weight)
    assert not torch.equal(probe_layer(16, 4, 3, CPU).weight, probe_layer(16, 4, 4, CPU).weight)
    train, test = clusters(512, 0, 0.3, classes=8), clusters(200, 1, 0.3, classes=8)
    probe = probe_layer(16, 8, 0, CPU)
    untrained = probe_correct(probe, *test, CPU)
    list(train_on_views(probe, lambda x: x, loader_of(*train, 64), batch_size=64, epochs=20))
    top1, top5 = probe_correct(probe, *test, CPU)
    assert untrained[0] < untrained[1] < 195 < top1 <= top5 <= 200


def test_linear_separates_what_is_separable_and_guesses_noise():
    train, test = clusters(512, 0, 0.3), clusters(200, 1, 0.3)
    assert linear_top1(*train, *test) > 0.97
    noise = torch.randn(512, 16, generator=torch.Generator().manual_seed(3))
    assert linear_top1(noise, train[1], torch.randn(400, 16), torch.arange(400) % 4) < 0.4
    assert linear_top1(*train, *test, seed=1) == linear_top1(*train, *test, seed=1)


def test_a_single_training_sample_makes_a_classifier_of_its_class():
    train, test = clusters(4, 0, 0.3), clusters(42, 1, 0.3)
    for place, label in enumerate(train[1].tolist()):
        one = (train[0][place : place + 1], train[1][place : place + 1])
        expected = (test[1] == label).float().mean().item()
        assert linear_top1(*one, *test) == expected
