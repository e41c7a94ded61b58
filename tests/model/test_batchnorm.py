"""Batch norm over gloo ranks, compared with one process on the whole batch."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct
from timm.layers.evo_norm import EvoNorm2dB0, EvoNorm2dS0
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from common import UserError
from model import batchnorm
from model.batchnorm import FusedNormalize, SyncBatchNorm, synchronize_batchnorm
from tests import fused_batchnorm
from tests.ranks import run_ranks


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 7))
    net.append(nn.BatchNorm1d(7))
    net[-1].bias.requires_grad_(False)
    return net.double()


def fused_network():
    """timm's fused norm layers with different activations; the last one is used in two places."""
    torch.manual_seed(0)
    norm = BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout(0.0))
    other = BatchNormAct2d(4, act_layer=nn.PReLU)
    norm.weight.requires_grad_(False)
    convolutions = [nn.Conv2d(channels, 4, 3, bias=False) for channels in (3, 4, 4)]
    pairs = zip(convolutions, (norm, other, other), strict=True)
    return nn.Sequential(*(layer for pair in pairs for layer in pair), nn.Flatten()).double()


def bare_network():
    """One layer without scale and shift, whose input has a mean that a difference of squares would not survive."""
    return nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten()).double()


NETWORKS = network, fused_network, bare_network


def forward_backward(net, x):
    """Output, gradients and statistics after one step; the loss is not symmetric in the rows."""
    x = x.clone().requires_grad_()
    out = net(x)
    out.pow(3).sum().backward()
    return {
        "out": out.detach(),
        "grad x": x.grad,
        **{f"grad {name}": p.grad for name, p in net.named_parameters() if p.grad is not None},
        **{f"buffer {name}": b.clone() for name, b in net.named_buffers()},
    }


def half_precision(inputs, rank):
    """A bfloat16 input normalized with float32 weights, as under autocast."""
    net = synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    result = forward_backward(net, inputs.chunk(2)[rank].bfloat16())
    dist.all_reduce(result["grad 0.bias"])
    return result


def on_rank(rank, world_size, inputs, sizes):
    net = synchronize_batchnorm(network())
    assert isinstance(net[1], SyncBatchNorm) and not net[-1].bias.requires_grad
    fused = synchronize_batchnorm(fused_network())
    assert fused[3] is fused[5] and fused.state_dict().keys() == fused_network().state_dict().keys()
    assert not fused[1].weight.requires_grad and isinstance(fused[1].drop, nn.Dropout)
    results = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for path in ("tensor operations", "fused kernels"):
            if path == "fused kernels":
                fused_batchnorm.substitute(monkeypatch)
                monkeypatch.setattr(batchnorm, "normalize_in_tensor_operations", FusedNormalize.apply)
            for create in NETWORKS:
                net = synchronize_batchnorm(create())
                result = forward_backward(net, inputs.split(sizes)[rank])
                for name in result:
                    if name.startswith("grad") and name != "grad x":
                        dist.all_reduce(result[name])
                result["evaluated"] = net.eval()(inputs).detach()
                results[path, create.__name__] = result
            results[path, "bfloat16"] = half_precision(inputs, rank)
    return results


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64) * 3 + 100
    return x.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def ranks(images, tmp_path_factory):
    """Results of two ranks with batches of different sizes."""
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), on_rank, images, [5, 3])


@pytest.mark.parametrize("create", NETWORKS)
@pytest.mark.parametrize("path", ["tensor operations", "fused kernels"])
def test_two_ranks_match_one_process(images, ranks, path, create):
    net = create()
    expected = forward_backward(net, images)
    expected["evaluated"] = net.eval()(images).detach()
    results = [rank[path, create.__name__] for rank in ranks]
    for name in ("out", "grad x"):
        joined = torch.cat([result.pop(name) for result in results])
        torch.testing.assert_close(joined, expected.pop(name), rtol=1e-10, atol=1e-10)
    for result in results:
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("path", ["tensor operations", "fused kernels"])
def test_statistics_of_bfloat16_are_float32(images, ranks, path):
    """Compared with float64 on the same rounded input: only output and input gradient are rounded to bfloat16."""
    expected = forward_backward(nn.Sequential(nn.BatchNorm2d(3)).double(), images.bfloat16().double())
    results = [rank[path, "bfloat16"] for rank in ranks]
    out = torch.cat([result["out"] for result in results])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected["out"], rtol=2**-8, atol=1e-5)
    for result in results:
        for name in ("buffer 0.running_mean", "buffer 0.running_var"):
            assert result[name].dtype == torch.float32
            torch.testing.assert_close(result[name].double(), expected[name], rtol=1e-6, atol=0)
        # sum of 3 y^2, where y and then dy are rounded
        torch.testing.assert_close(result["grad 0.bias"].double(), expected["grad 0.bias"], rtol=2**-7, atol=0)


@pytest.fixture
def fake_ranks():
    """A process group of two ranks whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_host_does_not_wait_for_a_gpu(fake_ranks, monkeypatch, dtype):
    """A fake tensor has no values, so reading one on the host, or indexing by a mask, would raise."""
    fused_batchnorm.substitute(monkeypatch)
    monkeypatch.delattr(batchnorm, "normalize_in_tensor_operations")  # for other devices
    with FakeTensorMode(), torch.device("cuda"):
        out, x = normalized(dtype)
        # autograd of a torch without a GPU has no streams, so the backward pass is called directly
        grad_x, grad_weight, grad_bias, *_ = FusedNormalize.backward(out.grad_fn, torch.empty_like(out))
        assert grad_x.dtype == dtype and grad_x.stride() == x.stride()
        assert grad_weight.shape == grad_bias.shape == (6,) and grad_weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_host_does_not_wait_for_a_gpu_when_compiled(fake_ranks, monkeypatch, dtype):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.delattr(batchnorm, "FusedNormalize")  # has no graph
    with FakeTensorMode(), torch.device("cuda"):
        normalized(dtype)


def normalized(dtype):
    """Output and input of a layer on fake CUDA tensors."""
    norm = synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(6)))
    x = torch.empty(8, 6, 5, 5, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    out = norm(x)
    assert out.dtype == dtype and out.device == x.device == norm[0].running_var.device
    assert out.stride() == x.stride()
    return out, x


def test_torch_waits_for_a_gpu(fake_ranks, monkeypatch):
    """The comparison can fail: torch's layer indexes by a mask. The day it does not, `SyncBatchNorm` can be removed."""
    fused_batchnorm.substitute(monkeypatch)
    with FakeTensorMode(), torch.device("cuda"), pytest.raises(DynamicOutputShapeException):
        nn.SyncBatchNorm(6)(torch.empty(8, 6, 5, 5))


def test_one_process_needs_no_conversion():
    net = network()
    layers = list(net)
    assert synchronize_batchnorm(net) is net and list(net) == layers


@pytest.mark.parametrize("norm", [EvoNorm2dB0(4), nn.InstanceNorm2d(4, track_running_stats=True), nn.SyncBatchNorm(4)])
def test_unsupported_norm_layers(two_ranks, norm):
    with pytest.raises(UserError, match=rf"{type(norm).__name__} can't synchronize .*use one process"):
        synchronize_batchnorm(nn.Sequential(norm))


def test_layers_without_batch_statistics_are_left_alone(two_ranks):
    layers = [EvoNorm2dS0(32), GroupNormAct(4, 2), FrozenBatchNormAct2d(4), nn.InstanceNorm2d(4), nn.LayerNorm(4)]
    assert list(synchronize_batchnorm(nn.Sequential(*layers))) == layers


def test_batch_norm_without_running_statistics(two_ranks):
    with pytest.raises(UserError, match="use one process"):
        synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


def test_empty_batch(two_ranks):
    with pytest.raises(ValueError, match=r"got \(0, 3, 8, 8\)"):
        synchronize_batchnorm(nn.BatchNorm2d(3))(torch.empty(0, 3, 8, 8))


@pytest.mark.parametrize("name", ["resnet18", "regnety_002"])  # the second has activations inside its norm layers
def test_conversion_keeps_the_output(two_ranks, name):
    encoder = timm.create_model(name, num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        synchronized = synchronize_batchnorm(copy.deepcopy(encoder))
        torch.testing.assert_close(synchronized(x), encoder(x))
    assert any(isinstance(module, SyncBatchNorm) for module in synchronized.modules())
