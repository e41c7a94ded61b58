"""Encoders of SimCLR v2, compared with its table, and their block, compared with its equations."""

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d

import model
from common import UserError
from model.selective_kernels import AvgPool2x2, SelectiveKernelBottleneck, SelectiveKernels
from tests.model.networks import spec

TABLE = {  # (depth, width, selective kernels) -> millions of parameters: arXiv 2006.10029, table 1, every row
    (50, 1, False): 24,
    (50, 1, True): 35,
    (50, 2, False): 94,
    (50, 2, True): 140,
    (101, 1, False): 43,
    (101, 1, True): 65,
    (101, 2, False): 170,
    (101, 2, True): 257,
    (152, 1, False): 58,
    (152, 1, True): 89,
    (152, 2, False): 233,
    (152, 2, True): 354,
    (152, 3, True): 795,
}
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def on_meta(depth, width, selective_kernels):
    with torch.device("meta"):
        return model.create_encoder(spec(f"resnet{depth}", 224, width=width, selective_kernels=selective_kernels))


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("row", "millions"), TABLE.items(), ids=str)
def test_parameter_counts_of_the_paper(row, millions):
    encoder = on_meta(*row)
    moving = sum(buffer.numel() for name, buffer in encoder.named_buffers() if "running" in name)
    # The table counts all variables, including the moving statistics of batch norm: two of its rows are a million more
    # than the trainable parameters.
    assert round((count_parameters(encoder) + moving) / 1e6) == millions


@pytest.mark.parametrize("depth", BLOCKS)
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("selective_kernels", [False, True])
def test_parameter_counts_layer_by_layer(depth, width, selective_kernels):
    def conv_bn(side, fan_in, fan_out):
        return side * side * fan_in * fan_out + 2 * fan_out

    stem = 64 * width
    if selective_kernels:
        count = conv_bn(3, 3, stem // 2) + conv_bn(3, stem // 2, stem // 2) + conv_bn(3, stem // 2, stem)
    else:
        count = conv_bn(7, 3, stem)
    fan_in = stem
    for stage, blocks in enumerate(BLOCKS[depth]):
        planes = 64 * width * 2**stage
        count += conv_bn(1, fan_in, 4 * planes)  # the shortcut
        for _ in range(blocks):
            count += conv_bn(1, fan_in, planes) + conv_bn(1, planes, 4 * planes)
            if selective_kernels:
                d = max(planes // 16, 32)
                count += conv_bn(3, planes, 2 * planes) + conv_bn(1, planes, d) + d * 2 * planes
            else:
                count += conv_bn(3, planes, planes)
            fan_in = 4 * planes
    assert count_parameters(on_meta(depth, width, selective_kernels)) == count


def randomize(module):
    torch.manual_seed(1)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 0.8) if tensor.ndim == 1 else nn.init.normal_(tensor, std=0.3)
    return module.double()


def reference(block, x):
    """Equations 1 to 6 of arXiv 1903.06586 in evaluation mode, by branch, image and channel."""

    def norm(y, bn, channels=slice(None)):
        tensors = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        mean, var, gamma, beta = (tensor[channels].view(-1, 1, 1) for tensor in tensors)
        return (y - mean) / (var + bn.eps).sqrt() * gamma + beta

    channels = block.select.out_channels // 2
    halves = slice(0, channels), slice(channels, 2 * channels)
    mixed = []
    for image in x:
        branches = [
            norm(conv2d(image[None], block.conv.weight[half], stride=block.conv.stride, padding=1)[0], block.bn, half)
            for half in halves
        ]
        u1, u2 = (branch.clamp(min=0) for branch in branches)
        u = u1 + u2  # eq. 1
        s = u.sum((1, 2)) / (u.shape[1] * u.shape[2])  # eq. 2
        z = norm((block.reduce.weight[:, :, 0, 0] @ s).view(-1, 1, 1), block.reduce_bn).clamp(min=0).flatten()  # eq. 3
        a, b = ((block.select.weight[half, :, 0, 0] @ z).exp() for half in halves)
        mixed.append(torch.stack([(a[c] * u1[c] + b[c] * u2[c]) / (a[c] + b[c]) for c in range(channels)]))  # eq. 5, 6
    return torch.stack(mixed)


@pytest.mark.parametrize("stride", [1, 2])
def test_selective_kernels_match_their_equations(stride):
    block = randomize(SelectiveKernels(nn.Conv2d(5, 7, 3, stride, 1))).eval()
    x = torch.randn(3, 5, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), reference(block, x), rtol=1e-12, atol=1e-12)


def test_attention_sums_to_one_over_the_branches():
    block = randomize(SelectiveKernels(nn.Conv2d(5, 7, 3, 1, 1))).train()
    attention = block.attention(torch.randn(4, 14, 6, 6, dtype=torch.float64))
    assert attention.shape == (4, 2, 7, 1, 1) and attention.min() > 0
    torch.testing.assert_close(attention.sum(1), torch.ones(4, 7, 1, 1, dtype=torch.float64), rtol=0, atol=1e-15)
    assert attention.std() > 0.01, "the attention depends on the image"


@pytest.mark.parametrize("channels", [64, 512, 1024, 1536])
def test_hidden_channels_of_the_attention(channels):
    block = SelectiveKernels(nn.Conv2d(4, channels, 3, 1, 1, device="meta"))
    assert block.reduce.out_channels == {64: 32, 512: 32, 1024: 64, 1536: 96}[channels]


def test_pooling_averages_the_pixels_inside_the_image():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = torch.empty_like(x)
    for i in range(5):
        for j in range(4):
            expected[..., i, j] = x[..., i : i + 2, j : j + 2].mean((-2, -1))
    torch.testing.assert_close(AvgPool2x2()(x), expected, rtol=1e-14, atol=1e-14)


def test_stem_shortcuts_and_blocks_of_v2():
    encoder = on_meta(50, 1, True)
    assert [layer.stride for layer in encoder.conv1 if isinstance(layer, nn.Conv2d)] == [(2, 2), (1, 1), (1, 1)]
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        assert all(isinstance(block, SelectiveKernelBottleneck) for block in stage)
        pool, conv, norm = stage[0].downsample
        assert isinstance(pool, AvgPool2x2 if stage is encoder.layer1 else nn.AvgPool2d)
        assert conv.kernel_size == conv.stride == (1, 1) and isinstance(norm, nn.BatchNorm2d)
        assert all(block.downsample is None for block in stage[1:])
    small = model.create_encoder(spec("resnet50", 32, width=0.25, selective_kernels=True))
    assert small.conv1.kernel_size == (3, 3) and small.conv1.stride == (1, 1)
    assert isinstance(small.maxpool, nn.Identity) and isinstance(small.layer1[0].downsample[0], AvgPool2x2)


@pytest.mark.parametrize("selective_kernels", [False, True])
def test_every_block_starts_as_its_shortcut(selective_kernels):
    """The scale of the last batch norm starts at 0, as in the official code."""
    encoder = model.create_encoder(spec("resnet50", 32, width=0.25, selective_kernels=selective_kernels))
    blocks = [block for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4) for block in stage]
    assert len(blocks) == 16 and not any(block.bn3.weight.any() for block in blocks)


@pytest.mark.parametrize(("size", "stem"), [(32, "auto"), (16, "small"), (64, "standard")])
def test_forward_and_backward(size, stem):
    encoder = model.create_encoder(spec("resnet50", size, stem, width=0.25, selective_kernels=True))
    assert model.feature_dim(encoder, size) == 512
    for block in encoder.modules():
        if isinstance(block, SelectiveKernelBottleneck):
            nn.init.ones_(block.bn3.weight)
    h = encoder(torch.randn(4, 3, size, size))
    assert h.shape == (4, 512)
    (h * torch.randn_like(h)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("size", [32, 96])
def test_saved_weights_load_strictly_into_timm(tmp_path, size):
    name, kwargs = sk_resnet = spec("resnet50", size, width=0.25, selective_kernels=True)
    encoder = model.create_encoder(sk_resnet).eval()
    model.save_encoder(encoder, sk_resnet, tmp_path / "encoder.safetensors")
    again = timm.create_model(name, **kwargs).eval()
    again.load_state_dict(encoder.state_dict(), strict=True)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        h = encoder(x)
        assert torch.equal(again(x), h)
        assert torch.equal(model.load_encoder(tmp_path / "encoder.safetensors")(x), h)


def test_bf16_and_channels_last_reach_the_next_convolution():
    encoder = model.create_encoder(spec("resnet50", 32, width=0.25, selective_kernels=True))
    encoder.to(memory_format=torch.channels_last)
    seen = []
    for block in encoder.modules():
        if isinstance(block, SelectiveKernelBottleneck):
            block.conv3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        h = encoder(images)
    h.float().square().sum().backward()
    assert len(seen) == 16
    for x in seen:
        assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)


def test_output_keeps_its_dtype_if_the_attention_is_fp32(monkeypatch):
    """Autocast on CUDA computes a softmax in fp32."""
    block = SelectiveKernels(nn.Conv2d(4, 8, 3, 1, 1)).bfloat16()
    in_bf16 = block.attention
    monkeypatch.setattr(block, "attention", lambda u: in_bf16(u).float())
    assert block(torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [32, 224])
def test_no_tensor_is_created_on_another_device(size):
    encoder = model.create_encoder(spec("resnet50", size, width=0.25, selective_kernels=True))
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    with FakeTensorMode(allow_non_fake_inputs=False):
        weights = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in tensors.items()}
        x = torch.empty(4, 3, size, size, device="cuda").to(memory_format=torch.channels_last)
        h = torch.func.functional_call(encoder, weights, (x,))
    assert h.shape == (4, 512) and h.device == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_encoders_without_bottlenecks(name):
    with pytest.raises(UserError, match=f"{name} does not support selective kernels; use one of resnet50"):
        spec(name, 224, selective_kernels=True)
    with pytest.raises(UserError, match="selective kernels need one of resnet50"):
        model.create_encoder(model.EncoderSpec("simclr_resnet34", {"num_classes": 0, "selective_kernels": True}))
