"""Optimizers: LARS in its official form, parameter groups, and resuming."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.muon import Muon, orthogonalize
from engine.optim import LARS, OptimConfig, create_optimizer, parameter_groups


def lars_in_loops(w, gradients, rates, *, momentum, decay, trust, adapt):
    """The official form in NumPy: decay, then the trust ratio, the rate inside the momentum buffer."""
    m = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        g = g + decay * w
        ratio = 1.0
        if adapt and np.linalg.norm(w) > 0 and np.linalg.norm(g) > 0:
            ratio = trust * np.linalg.norm(w) / np.linalg.norm(g)
        m = momentum * m + lr * ratio * g
        w = w - m
    return w


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("adapt", [True, False])
def test_lars_has_the_official_form(decay, adapt, momentum):
    random = np.random.default_rng(0)
    w, gradients = random.normal(size=(5, 4)), random.normal(size=(6, 5, 4))
    rates = [0.0, 0.5, 1.0, 4.8, 2.0, 0.1]  # different rates, so that their place in the momentum matters
    parameter = nn.Parameter(torch.tensor(w))
    optimizer = LARS([{"params": [parameter], "adapt": adapt}], lr=0.0, momentum=momentum, weight_decay=decay)
    for gradient, lr in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    expected = lars_in_loops(w, gradients, rates, momentum=momentum, decay=decay, trust=0.001, adapt=adapt)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


def test_lars_adapts_without_decay():
    """Scaling a gradient by a thousand changes nothing; skipping the ratio when the decay is 0 is a common mistake."""
    ends = []
    for scale in (1.0, 1000.0):
        parameter = nn.Parameter(torch.arange(1.0, 5.0, dtype=torch.float64).view(2, 2))
        parameter.grad = scale * torch.ones_like(parameter)
        LARS([parameter], lr=1.0).step()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends)


def test_zero_norms_have_a_ratio_of_one():
    zero_weight, zero_gradient = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zero_weight.grad, zero_gradient.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero_weight, zero_gradient], lr=0.1).step()
    torch.testing.assert_close(zero_weight.detach(), torch.full((2, 2), -0.1))
    torch.testing.assert_close(zero_gradient.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (3, 5)])
def test_lars_pairs_gradients_and_weights_of_different_strides(shape):
    start, gradient = torch.randn(2, *shape, dtype=torch.float64).unbind()
    weight = nn.Parameter(start.clone().transpose(0, 1).contiguous().transpose(0, 1))
    weight.grad = gradient.clone()
    assert weight.stride() != gradient.stride()
    LARS([{"params": [weight], "adapt": False}], lr=1.0).step()
    torch.testing.assert_close(weight.detach(), start - gradient)


class MultiTensorCalls(TorchDispatchMode):
    """Counts operators and checks that CUDA's multi-tensor kernels accept the lists, or they launch once per layer."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        lists = [each for each in arguments if isinstance(each, list | tuple) and each]
        if "_foreach" in str(function) or "_fused" in str(function):
            for tensors in zip(*lists, strict=True):
                assert len({(t.shape, t.stride(), t.dtype) for t in tensors}) == 1, function
        return function(*arguments, **(keywords or {}))


def test_number_of_launches_does_not_depend_on_the_number_of_layers():
    counts = []
    for layers in (2, 30):
        net = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(layers))).to(memory_format=torch.channels_last)
        optimizer = LARS(parameter_groups([net], 1e-4), lr=0.1)
        for _ in range(2):  # the first step creates the buffers
            for w in net.parameters():
                w.grad = torch.randn_like(w)
            with MultiTensorCalls() as calls:
                optimizer.step()
        counts.append(calls.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_passes_the_buffers_that_cuda_demands(momentum, monkeypatch):
    """The CUDA kernel refuses buffers without momentum, and momentum without buffers; the CPU's accepts both."""

    def fused_sgd(weights, gradients, buffers, *, momentum, **_):
        assert len(buffers) == (len(weights) if momentum > 0 else 0)
        calls.append(momentum)

    calls = []
    monkeypatch.setattr(torch, "_fused_sgd_", fused_sgd)
    net = nn.Linear(3, 2)
    net(torch.ones(1, 3)).sum().backward()
    LARS(parameter_groups([net], 1e-4), lr=0.1, momentum=momentum).step()
    assert calls == [momentum, momentum]


def orthogonalized(u):
    """Five Newton-Schulz iterations as what they do to each singular value, in float64."""
    left, values, right = np.linalg.svd(u, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 2, 3, 3)])
def test_muon_moves_weights_along_orthogonalized_momentum(shape):
    random = np.random.default_rng(0)
    w, gradients, rates = random.normal(size=shape), random.normal(size=(4, *shape)), [0.0, 0.5, 0.1, 0.2]
    parameter = nn.Parameter(torch.tensor(w))
    twin = nn.Parameter(torch.tensor(2 * w))  # of the same shape: both are updated by one multiplication
    optimizer = Muon([parameter, twin], lr=0.0, momentum=0.9, weight_decay=0.1, dtype=torch.float64)
    m = np.zeros_like(w)
    for gradient, lr in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad, twin.grad = torch.tensor(gradient), -torch.tensor(gradient)
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient
        update = orthogonalized((0.9 * m + 0.1 * gradient).reshape(shape[0], -1))
        update *= max(1, update.shape[0] / update.shape[1]) ** 0.5
        w = (1 - 0.1 * lr) * w - lr * update.reshape(shape)
    np.testing.assert_allclose(parameter.detach().numpy(), w, atol=1e-6)  # the norm is increased by 1e-7
    assert not torch.allclose(twin, 2 * parameter)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_muon_brings_singular_values_near_1(dtype, tolerance):
    random = np.random.default_rng(0)
    left, _ = np.linalg.qr(random.normal(size=(8, 8)))
    right, _ = np.linalg.qr(random.normal(size=(20, 8)))
    matrix = (left * np.geomspace(0.02, 1, 8)) @ right.T
    result = orthogonalize(torch.tensor(matrix[None], dtype=torch.float32), dtype)[0].double().numpy()
    values = np.linalg.svd(result)[1]
    assert values.min() > 0.67 - tolerance and values.max() < 1.21 + tolerance
    assert orthogonalize(torch.zeros(1, 3, 4)).count_nonzero() == 0


def test_muon_treats_vectors_as_adamw():
    """So it does with a new classifier, which does not adapt."""
    torch.manual_seed(0)
    start, gradients, ends = torch.randn(3), torch.randn(4, 3), []
    for optimizer in (
        lambda w: Muon([{"params": [w], "adapt": False}], lr=0.1),
        lambda w: torch.optim.AdamW([w], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ):
        parameter = nn.Parameter(start.clone())
        created = optimizer(parameter)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            created.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_muon_resumes_on_the_device_of_the_weights():
    w = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = Muon([{"params": [w], "adapt": False}], lr=0.1)
    state = optimizer.state_dict()
    state["state"] = {0: {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3), "step": torch.zeros(())}}
    optimizer.load_state_dict(state)
    assert {value.device.type for value in optimizer.state[w].values()} == {"meta"}


def test_norms_and_biases_neither_decay_nor_adapt():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    net[2].weight.requires_grad_(False)
    decayed, plain = parameter_groups([net], weight_decay=0.5)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 3, 3)] and decayed["weight_decay"] == 0.5
    assert all(p.ndim == 1 for p in plain["params"]) and len(plain["params"]) == 4
    assert plain["weight_decay"] == 0 and plain["adapt"] is False


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_every_optimizer_reduces_the_loss_and_resumes(name, momentum):
    def run(steps, state=None):
        torch.manual_seed(0)
        net = nn.Linear(6, 3)
        optimizer = create_optimizer(OptimConfig(name, momentum=momentum), parameter_groups([net], 1e-4), lr=0.05)
        if state:
            net.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        losses = []
        for _ in range(steps):
            loss = (net(torch.ones(4, 6)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, (net.state_dict(), optimizer.state_dict())

    whole, _ = run(6)
    first, state = run(3)
    rest, _ = run(3, state)
    assert whole[-1] < whole[0]
    assert first + rest == whole


@pytest.mark.parametrize(
    "values", [{"lr": -0.1}, {"lr": np.nan}, {"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1}]
)
def test_lars_refuses_the_values_that_torch_refuses(values):
    with pytest.raises(ValueError, match="out of range"):
        LARS([nn.Parameter(torch.ones(2, 2))], **{"lr": 0.1, **values})


def test_a_new_layer_decays_but_does_not_adapt():
    network, layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 3)
    groups = parameter_groups([network], 0.1, layer)
    assert [(group["weight_decay"], group.get("adapt", True)) for group in groups] == [
        (0.1, True),
        (0.0, False),
        (0.1, False),
        (0.0, False),
    ]
    assert groups[2]["params"] == [layer.weight] and groups[3]["params"] == [layer.bias]


def test_options_reach_the_optimizer():
    groups = parameter_groups([nn.Linear(2, 2)], 0.1)
    assert create_optimizer(OptimConfig("nesterov"), groups, 1.0).defaults["nesterov"]
    assert not create_optimizer(OptimConfig("sgd"), groups, 1.0).defaults["nesterov"]
    assert create_optimizer(OptimConfig("adamw", momentum=0.8), groups, 1.0).defaults["betas"] == (0.8, 0.95)
    assert create_optimizer(OptimConfig("muon", momentum=0.8), groups, 1.0).defaults["momentum"] == 0.8


@pytest.mark.parametrize("name", ["lars", "sgd", "nesterov", "adamw", "muon"])
def test_copies_of_an_optimizer_and_added_parameters_are_trained(name):
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = create_optimizer(OptimConfig(name), parameter_groups([network[0]], 0.1), 0.1)
    optimizer = copy.deepcopy(optimizer)
    optimizer.add_param_group({"params": [*network[1].parameters()][:1], "weight_decay": 0.1})
    weights = [w for group in optimizer.param_groups for w in group["params"]]
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    assert len(weights) == 3 and not any(map(torch.equal, before, weights))
