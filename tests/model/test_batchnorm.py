"""Batch norm over gloo ranks, compared with one process on the whole batch."""

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


def forward_backward(net, x):
    """Output, gradients and statistics after one step; the loss is not symmetric in the rows."""
    out = net(x)
    out.pow(3).sum().backward()
    return {
        "out": out.detach(),
        **{f"grad {name}": p.grad for name, p in net.named_parameters() if p.grad is not None},
        **{f"buffer {name}": b.clone() for name, b in net.named_buffers()},
    }


def fused_network():
    """timm's fused norm layers with different activations; the last one is used in two places."""
    torch.manual_seed(0)
    norm = BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout(0.0))
    other = BatchNormAct2d(4, act_layer=nn.PReLU)
    norm.weight.requires_grad_(False)
    convolutions = [nn.Conv2d(channels, 4, 3, bias=False) for channels in (3, 4, 4)]
    pairs = zip(convolutions, (norm, other, other), strict=True)
    return nn.Sequential(*(layer for pair in pairs for layer in pair), nn.Flatten()).double()


def on_rank(rank, world_size, x):
    net = synchronize_batchnorm(network(), torch.device("cpu"))
    assert isinstance(net[1], CpuSyncBatchNorm) and not net[-1].bias.requires_grad
    fused = synchronize_batchnorm(fused_network(), torch.device("cpu"))
    assert fused[3] is fused[5] and fused.state_dict().keys() == fused_network().state_dict().keys()
    assert not fused[1].weight.requires_grad and isinstance(fused[1].drop, nn.Dropout)
    results = [forward_backward(each, x.chunk(world_size)[rank]) for each in (net, fused)]
    for result in results:
        for name in result:
            if name.startswith("grad"):
                dist.all_reduce(result[name])
    results[1]["evaluated"] = fused.eval()(x).detach()
    return results


def test_two_ranks_match_one_process(tmp_path):
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64) * 3 + 1
    ranks = run_ranks(2, tmp_path, on_rank, x)
    for number, net in enumerate((network(), fused_network())):
        expected, outs = forward_backward(net, x), [rank[number].pop("out") for rank in ranks]
        torch.testing.assert_close(torch.cat(outs), expected.pop("out"), rtol=1e-12, atol=1e-12)
        if number:
            expected["evaluated"] = net.eval()(x).detach()
        for rank in ranks:
            assert rank[number].keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(rank[number][name], value, rtol=1e-11, atol=1e-11, msg=name)


def test_one_process_needs_no_conversion():
    net = network()
    layers = list(net)
    assert synchronize_batchnorm(net, torch.device("cpu")) is net and list(net) == layers


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("norm", [EvoNorm2dB0(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_unsupported_norm_layers(two_ranks, norm, device):
    with pytest.raises(UserError, match=rf"{type(norm).__name__} can't synchronize .*use one process"):
        synchronize_batchnorm(nn.Sequential(norm), torch.device(device))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_layers_without_batch_statistics_are_left_alone(two_ranks, device):
    layers = [EvoNorm2dS0(32), GroupNormAct(4, 2), FrozenBatchNormAct2d(4), nn.InstanceNorm2d(4), nn.LayerNorm(4)]
    assert list(synchronize_batchnorm(nn.Sequential(*layers), torch.device(device))) == layers


def test_evaluation_matches_plain_batch_norm(two_ranks):
    net = network()
    net(torch.randn(8, 3, 8, 8, dtype=torch.float64))
    synchronized = synchronize_batchnorm(network(), torch.device("cpu"))
    assert isinstance(synchronized[1], CpuSyncBatchNorm)
    synchronized.load_state_dict(net.state_dict())
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(synchronized.eval()(x), net.eval()(x))


def test_batch_norm_without_running_statistics(two_ranks):
    with pytest.raises(UserError, match="use one process"):
        synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), torch.device("cpu"))


@pytest.mark.parametrize("name", ["resnet18", "regnety_002"])  # the second has activations inside its norm layers
def test_gpu_conversion_keeps_the_output(two_ranks, name):
    encoder = timm.create_model(name, num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = encoder(x)
        synchronized = synchronize_batchnorm(encoder, torch.device("cuda"))
        torch.testing.assert_close(synchronized(x), before)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronized.modules())
