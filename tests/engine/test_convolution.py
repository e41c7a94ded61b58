"""Weight gradients as matrix products, compared with float64, and where they are used."""

import copy

import pytest
import torch
from torch import nn

from engine import convolution, session
from engine.convolution import MultipliedGradient, SmallMapConv2d, is_small, multiply_small_maps
from engine.session import Session
from model import SimCLR, create_encoder, encoder_spec, feature_dim
from model.encoder import EncoderConfig


@pytest.mark.parametrize("size", [1, 2, 3, 4, (3, 5)])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (3, 0), ((1, 3), (0, 1)), (5, 2)])
def test_gradients_are_those_of_torch(size, stride, kernel, padding, monkeypatch):
    monkeypatch.setattr(convolution, "PATCHES", 600)  # parts of 1 to 5 views
    conv = nn.Conv2d(4, 6, kernel, stride, padding, bias=False).double()
    height, width = (size, size) if isinstance(size, int) else size
    if any(n + 2 * p < k for n, p, k in zip((height, width), conv.padding, conv.kernel_size, strict=True)):
        pytest.skip("the kernel is larger than the image")
    x = torch.randn(5, 4, height, width, dtype=torch.float64, requires_grad=True)
    y = MultipliedGradient.apply(x, conv.weight, conv.stride, conv.padding)
    assert torch.equal(y, conv(x))
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, [x, conv.weight], grad)
    expected = torch.autograd.grad(conv(x), [x, conv.weight], grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_frozen_weights_and_inputs_get_no_gradient():
    conv = nn.Conv2d(4, 6, 3, 1, 1, bias=False)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    MultipliedGradient.apply(x, conv.weight.detach(), (1, 1), (1, 1)).sum().backward()
    assert x.grad is not None
    MultipliedGradient.apply(x.detach(), conv.weight, (1, 1), (1, 1)).sum().backward()
    assert conv.weight.grad is not None


def test_bfloat16_gradients_are_as_accurate_as_those_of_torch():
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 48, 3, 1, 1, bias=False).to(memory_format=torch.channels_last)
    small, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    multiply_small_maps(small)
    x = torch.randn(32, 64, 4, 4).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(32, 48, 4, 4).to(torch.bfloat16)
    exact.weight.data = exact.weight.data.to(torch.bfloat16).double()
    exact(x.double()).backward(grad.double())
    errors = []
    for conv in (plain, small):
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        y.backward(grad)
        assert conv.weight.grad.dtype is torch.float32
        assert conv.weight.grad.stride() == conv.weight.stride()
        errors.append((conv.weight.grad - exact.weight.grad).norm() / exact.weight.grad.norm())
    assert type(small) is SmallMapConv2d and y.grad_fn.name() == "MultipliedGradientBackward"
    assert errors[1] < 2**-8 and errors[1] < 1.1 * errors[0] + 2**-12


def test_small_is_relative_to_the_channels():
    assert is_small(4 * 4, 64) and is_small(6 * 6, 128) and is_small(7 * 7, 512)
    assert not is_small(5 * 5, 64) and not is_small(13 * 13, 2048)


def test_only_small_maps_in_bfloat16_that_are_trained():
    conv = SmallMapConv2d(64, 8, 3, 1, 1, bias=False).bfloat16()

    def multiplies(size, dtype=torch.bfloat16):
        return conv.to(dtype)(torch.randn(2, 64, size, size, dtype=dtype)).grad_fn.name().startswith("Multiplied")

    assert multiplies(4) and not multiplies(5) and not multiplies(4, torch.float32)
    with torch.no_grad():
        assert conv.bfloat16()(torch.randn(2, 64, 4, 4, dtype=torch.bfloat16)).grad_fn is None


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}, {"padding": "same"}])
def test_other_convolutions_stay(options):
    for conv in (nn.Conv2d(4, 4, 3, bias=False, **options), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, bias=False)):
        multiply_small_maps(conv)
        assert type(conv) is nn.Conv2d


@pytest.mark.parametrize("amx", [True, False])
def test_networks_on_a_cpu_with_amx_multiply(amx, monkeypatch):
    monkeypatch.setattr(session, "computes_in_bf16", lambda device: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    encoder = create_encoder(encoder_spec(EncoderConfig("resnet18", width=0.25), 16))
    names = list(encoder.state_dict())
    features = feature_dim(encoder, 16)
    simclr = Session("bf16").to_device(SimCLR(encoder, nn.Identity(), features, classes=0))
    assert list(encoder.state_dict()) == names
    assert any(type(layer) is SmallMapConv2d for layer in simclr.modules()) == amx
