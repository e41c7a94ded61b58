"""Batch norm over gloo ranks against one process on the whole batch."""

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct
from timm.layers.evo_norm import EvoNorm2dB0, EvoNorm2dS0
from torch import nn

from common import UserError
from model.batchnorm import CpuSyncBatchNorm, synchronize_batchnorm
from tests.ranks import run_ranks


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 7))
    net.append(nn.BatchNorm1d(7))
    net[-1].bias.requires_grad_(False)
    return net.double()


def step(net, x, share):
    """Gradients and statistics after one pass; the loss is not symmetric in the rows."""
    out = net(x)
    (out.pow(3).sum() / share).backward()
    return {
        "out": out.detach(),
        **{f"grad {name}": p.grad for name, p in net.named_parameters() if p.grad is not None},
        **{f"buffer {name}": b.clone() for name, b in net.named_buffers()},
    }


def fused_network():
    """timm's fused layers, each keeping its own activation; the last one is used in two places."""
    torch.manual_seed(0)
    norm = BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout(0.0))
    other = BatchNormAct2d(4, act_layer=nn.PReLU)
    norm.weight.requires_grad_(False)
    convolutions = [nn.Conv2d(3 if place == 0 else 4, 4, 3, bias=False) for place in range(3)]
    pairs = zip(convolutions, (norm, other, other), strict=True)
    return nn.Sequential(*(layer for pair in pairs for layer in pair), nn.Flatten()).double()


def on_rank(rank, world_size, x):
    net = synchronize_batchnorm(network(), torch.device("cpu"))
    assert isinstance(net[1], CpuSyncBatchNorm) and not net[-1].bias.requires_grad
    fused = synchronize_batchnorm(fused_network(), torch.device("cpu"))
    assert fused[3] is fused[5] and fused.state_dict().keys() == fused_network().state_dict().keys()
    assert not fused[1].weight.requires_grad and isinstance(fused[1].drop, nn.Dropout)
    results = [step(each, x.chunk(world_size)[rank], share=1) for each in (net, fused)]
    for result in results:
        for name in result:
            if name.startswith("grad"):
                dist.all_reduce(result[name])
    results[1]["evaluated"] = fused.eval()(x).detach()
    return results


def test_ranks_equal_one_process(tmp_path):
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64) * 3 + 1
    ranks = run_ranks(2, tmp_path, on_rank, x)
    for number, net in enumerate((network(), fused_network())):
        alone, outs = step(net, x, share=1), [rank[number].pop("out") for rank in ranks]
        torch.testing.assert_close(torch.cat(outs), alone.pop("out"), rtol=1e-12, atol=1e-12)
        if number:
            alone["evaluated"] = net.eval()(x).detach()
        for rank in ranks:
            assert rank[number].keys() == alone.keys()
            for name, value in alone.items():
                torch.testing.assert_close(rank[number][name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("norm", [EvoNorm2dB0(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_statistics_that_would_stay_local_are_refused(norm, device):
    with pytest.raises(UserError, match=rf"{type(norm).__name__} can't take .*use one process"):
        synchronize_batchnorm(nn.Sequential(norm), torch.device(device))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_has_no_statistics_of_the_batch_stays_as_it_is(device):
    layers = [EvoNorm2dS0(32), GroupNormAct(4, 2), FrozenBatchNormAct2d(4), nn.InstanceNorm2d(4), nn.LayerNorm(4)]
    assert list(synchronize_batchnorm(nn.Sequential(*layers), torch.device(device))) == layers


def test_evaluation_needs_no_other_rank():
    net = network()
    net(torch.randn(8, 3, 8, 8, dtype=torch.float64))
    synchronized = synchronize_batchnorm(network(), torch.device("cpu"))
    synchronized.load_state_dict(net.state_dict())
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(synchronized.eval()(x), net.eval()(x))


def test_a_norm_that_cannot_span_ranks_is_refused():
    with pytest.raises(UserError, match="use one process"):
        synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), torch.device("cpu"))


@pytest.mark.parametrize("name", ["resnet18", "regnety_002"])  # the second has activations inside its norms
def test_on_a_gpu_the_network_stays_the_same(name):
    encoder = timm.create_model(name, num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = encoder(x)
        synchronized = synchronize_batchnorm(encoder, torch.device("cuda"))
        torch.testing.assert_close(synchronized(x), before)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronized.modules())
