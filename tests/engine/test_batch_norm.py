"""Batch norm with addition and ReLU, compared with torch in float64, and where it is used."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import batch_norm

from engine.batch_norm import BatchNorm2d, BatchNormReLU2d, FusedBasicBlock, FusedBottleneck, fuse_batch_norm
from engine.session import Session
from model import create_encoder, encoder_spec
from model.encoder import EncoderConfig

SHAPES = [(8, 16, 12, 12), (5, 3, 7, 9), (4, 100, 3, 3), (6, 256, 2, 2), (3, 1, 5, 5), (64, 32, 24, 24)]
"""Several pixels in a row of the table, one, a number of pixels that no row divides, and several parts."""


def tensors(shape, dtype, added, seed=0):
    """x, shortcut or None, weight, bias, gradient of y: off center, so that sums of squares would lose digits."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator)

    x = (2 * random(*shape) + 30 * random(shape[1], 1, 1)).to(dtype)
    shortcut = random(*shape).to(dtype) if added else None
    return x, shortcut, 1 + 0.3 * random(shape[1]), 0.3 * random(shape[1]), random(*shape).to(dtype)


def differentiate(norm, x, shortcut, weight, bias, grad):
    """y and the gradients of x, weight, bias and the shortcut."""
    norm.weight.data, norm.bias.data = weight.clone(), bias.clone()
    inputs = [x.clone().requires_grad_(), norm.weight, norm.bias]
    inputs += [] if shortcut is None else [shortcut.clone().requires_grad_()]
    y = norm(inputs[0], *inputs[3:])
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


class Separate(nn.BatchNorm2d):
    """The same by torch's operations."""

    relu = True

    def forward(self, x, shortcut=None):
        y = super().forward(x)
        y = y if shortcut is None else y + shortcut
        return y.relu() if self.relu else y


def errors(norm, shape, dtype, added, relu):
    """Largest error of every result and running statistic, relative to the largest value in float64."""
    *arguments, grad = tensors(shape, dtype, added)
    doubles = [t if t is None else t.double() for t in arguments]
    exact, norm = Separate(shape[1]).double(), norm(shape[1])
    exact.relu = False
    before, *_ = differentiate(copy.deepcopy(exact), *doubles, grad.double())
    grad[before.abs() < 1e-4] = 0  # rounding decides whether these are clipped
    exact.relu = relu
    expected = differentiate(exact, *doubles, grad.double())
    actual = differentiate(norm, *arguments, grad)
    pairs = [*zip(actual, expected, strict=True)]
    pairs += [(norm.running_mean, exact.running_mean), (norm.running_var, exact.running_var)]
    for a, b in pairs:
        assert a.shape == b.shape
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", [BatchNorm2d, BatchNormReLU2d])
@pytest.mark.parametrize("added", [False, True])
def test_values_and_gradients_are_those_of_float64(shape, norm, added):
    assert max(errors(norm, shape, torch.float32, added, norm.relu)) < 2e-5


@pytest.mark.parametrize("added", [False, True])
def test_bfloat16_is_as_accurate_as_torch(added):
    shape = (64, 32, 24, 24)
    for ours, torchs in zip(
        errors(BatchNormReLU2d, shape, torch.bfloat16, added, True),
        errors(Separate, shape, torch.bfloat16, added, True),
        strict=True,
    ):
        assert ours <= 1.1 * torchs + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_threads_and_layout(dtype):
    x, shortcut, *rest = tensors((64, 32, 24, 24), dtype, added=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count, layout in ((1, torch.contiguous_format), (2, torch.channels_last)):
            torch.set_num_threads(count)
            laid_out = (t.contiguous(memory_format=layout) for t in (x, shortcut))
            results.append(differentiate(BatchNormReLU2d(32), *laid_out, *rest))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def test_nan_is_not_clipped():
    x = torch.randn(4, 8, 3, 3)
    x[2, 5, 1, 1] = torch.nan
    y = BatchNormReLU2d(8)(x)
    assert y[:, 5].isnan().all() and not y[:, :5].isnan().any()


def test_one_pixel_is_refused_as_by_torch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNormReLU2d(8)(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize("norm", [BatchNorm2d(8), BatchNormReLU2d(8)])
def test_evaluation_and_other_dtypes_are_torchs(norm):
    norm.running_mean.normal_()
    for module, dtype in ((copy.deepcopy(norm).eval(), torch.float32), (copy.deepcopy(norm).double(), torch.float64)):
        x = torch.randn(4, 8, 3, 3, dtype=dtype)
        statistics = module.running_mean.clone(), module.running_var.clone()
        y = batch_norm(x, *statistics, module.weight, module.bias, module.training)
        assert torch.equal(module(x), y.relu() if norm.relu else y)


@pytest.mark.parametrize(
    ("name", "block"), [("resnet18", FusedBasicBlock), ("resnet50", FusedBottleneck), ("resnet50d", FusedBottleneck)]
)
def test_networks_keep_names_and_values(name, block):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0, channels=(8, 16, 24, 32)).double()
    if name == "resnet18":  # timm's plain stem has 64 channels at any width
        plain = create_encoder(encoder_spec(EncoderConfig("resnet18", width=0.25), 32)).double()
    fused = copy.deepcopy(plain).float()
    fuse_batch_norm(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert sum(type(m) is block for m in fused.modules()) == (8 if name == "resnet18" else 16)
    assert not any(type(m) is nn.BatchNorm2d for m in fused.modules())
    x = torch.randn(16, 3, 32, 32)
    losses = []
    for network in (plain, fused):
        h = network(x.to(next(network.parameters()).dtype))
        (h * torch.linspace(-1, 1, h.shape[1], dtype=h.dtype)).mean().backward()
        losses.append(h.detach().double())
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=2e-4)
    exact = {n: p.grad for n, p in plain.named_parameters()}
    for parameter_name, parameter in fused.named_parameters():
        expected = exact[parameter_name]
        assert (parameter.grad.double() - expected).norm() < 5e-3 * expected.norm() + 1e-9, parameter_name
    for buffer_name, buffer in fused.named_buffers():
        torch.testing.assert_close(buffer.double(), plain.get_buffer(buffer_name).double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"drop_path_rate": 0.1}, {"drop_block_rate": 0.1}, {"act_layer": "silu"}])
def test_blocks_with_something_in_between_stay(options):
    network = timm.create_model("resnet18", num_classes=0, **options)
    fuse_batch_norm(network)
    assert type(network.layer4[1]).__name__ == "BasicBlock"
    assert type(network.layer4[1].bn1) is BatchNorm2d


@pytest.mark.parametrize("compile", [False, True])
def test_sessions_on_a_cpu_fuse_what_is_not_compiled(compile, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    monkeypatch.setattr("shutil.which", lambda name: name)
    encoder = create_encoder(encoder_spec(EncoderConfig("resnet18", width=0.25), 16))
    Session("fp32", compile=compile).to_device(encoder)
    assert isinstance(encoder.bn1, BatchNormReLU2d) != compile
