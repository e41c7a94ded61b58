"""Steps with non-finite gradients are skipped without a trace; collapse is detected."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from engine.nonfinite import CollapseWatch, NonFiniteGuard
from engine.optim import OptimConfig, create_optimizer, parameter_groups


def step_of(net, guard, optimizer, x, step):
    guard.before_forward()
    net(x).square().mean().backward()
    taken, norm = guard.after_backward(step)
    optimizer.step()
    optimizer.zero_grad()
    return bool(taken), norm.item()


def everything(net, optimizer):
    """Copies of everything that a step can change."""
    states = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    floats = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    return [tensor.clone() for tensor in [*floats, *states]]


@pytest.mark.parametrize(
    ("name", "momentum"), [*product(["lars", "sgd", "adamw", "muon"], [0.0, 0.9]), ("nesterov", 0.9)]
)
@pytest.mark.parametrize("first", [True, False], ids=["in the first step", "later"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_step_changes_nothing(name, first, bad, momentum):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    net = net.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    optimizer = create_optimizer(OptimConfig(name, momentum=momentum), parameter_groups([net], 1e-4), lr=0.05)
    guard = NonFiniteGuard(net, [optimizer], torch.device("cpu"))
    if not first:
        assert step_of(net, guard, optimizer, x, 1)[0]
    before = everything(net, optimizer)
    taken, _ = step_of(net, guard, optimizer, x * bad, 2)
    after = everything(net, optimizer)
    assert not taken
    if first and (name == "adamw" or (name == "lars" and momentum)):  # the first step creates the states: zeros
        assert all(not state.any() for state in after[len(before) :])
    else:
        assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
    assert step_of(net, guard, optimizer, x, 3)[0]
    assert not all(torch.equal(a, b) for a, b in zip(before, everything(net, optimizer), strict=False))
    assert guard.counts.tolist() == [0, 1, 1, 2]


def test_skipped_step_does_not_affect_later_steps():
    """A run with bad batches in between ends where a run without these batches ends."""

    def run(batches):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        optimizer = create_optimizer(OptimConfig("lars"), parameter_groups([net], 1e-4), lr=1.0)
        guard = NonFiniteGuard(net, [optimizer], torch.device("cpu"))
        for number, x in enumerate(batches, start=1):
            step_of(net, guard, optimizer, x, number)
        return everything(net, optimizer), guard.counts.tolist()

    good = list(torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(1)))
    bad = good[0].clone()
    bad[3, 2] = math.nan
    clean, _ = run(good)
    disturbed, counts = run([good[0], bad, bad, *good[1:2], bad, *good[2:]])
    assert all(torch.equal(a, b) for a, b in zip(clean, disturbed, strict=True))
    assert counts == [0, 2, 3, 5]


def test_gradients_get_the_strides_of_their_weights():
    """torch's fused kernels on a CPU traverse memory in order and ignore strides."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    gradient = torch.randn(4, 3, 2, 2)
    optimizer = create_optimizer(OptimConfig("sgd"), [{"params": [weight], "weight_decay": 0.0}], lr=1.0)
    expected = weight.detach() - gradient
    weight.grad = gradient.clone()
    NonFiniteGuard(nn.ParameterList([weight]), [optimizer], torch.device("cpu")).after_backward(1)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)


def test_norm_covers_all_gradients():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = create_optimizer(OptimConfig("adamw"), parameter_groups([net], 0.0), lr=0.1)
    guard = NonFiniteGuard(net, [optimizer], torch.device("cpu"))
    net(torch.ones(5, 3)).sum().backward()
    _, norm = guard.after_backward(1)
    flat = torch.cat([w.grad.double().flatten() for w in net.parameters()])
    assert norm.item() == pytest.approx(flat.norm().item(), rel=1e-6)


def test_non_finite_weights_are_detected():
    net = nn.Linear(3, 2)
    optimizer = create_optimizer(OptimConfig("sgd", momentum=0.0), parameter_groups([net], 0.0), lr=1e39)
    guard = NonFiniteGuard(net, [optimizer], torch.device("cpu"))
    assert guard.weights_are_finite()
    assert step_of(net, guard, optimizer, torch.full((2, 3), 1e3), 1)[0]
    assert not guard.weights_are_finite()


def test_collapse_needs_patience_and_is_reported_once():
    watch = CollapseWatch(math.log(255), patience_steps=30)
    reported = [watch.collapsed(step, math.log(255) * (1 + 5e-4 * (-1) ** step)) for step in range(10, 100, 10)]
    assert reported == [False, False, False, True] + 5 * [False]
    watch = CollapseWatch(math.log(255), patience_steps=30)
    assert not any(watch.collapsed(step, 3.0 if step % 20 else math.log(255)) for step in range(10, 200, 10))
    assert not any(watch.collapsed(step, math.nan) for step in range(200, 400, 10))
