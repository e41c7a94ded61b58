"""Encoder, heads and loss on fake CUDA tensors, which need no GPU: a tensor left on the CPU raises."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from engine.metrics import RunningMeans
from engine.nonfinite import NonFiniteGuard
from engine.optim import OptimConfig, create_optimizer, parameter_groups
from loss import nt_xent
from model import EncoderConfig, HeadConfig, SimCLR, create_encoder, encoder_spec, feature_dim, projection_head


def forward_on_cuda(module: nn.Module, views: tuple[int, ...]):
    """Output of the module for views of the given shape; call it under a FakeTensorMode."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weights = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in tensors.items()}
    x = torch.empty(views, device="cuda").to(memory_format=torch.channels_last)
    return torch.func.functional_call(module, weights, (x,))


@pytest.mark.parametrize("head", ["v1", "v2"])
@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("resnet50", 224), ("vit_tiny_patch16_224", 224), ("convnext_atto", 224)]
)
def test_outputs_are_on_the_device_of_the_views(name, size, head):
    encoder = create_encoder(encoder_spec(EncoderConfig(name), size))
    features = feature_dim(encoder, size)
    simclr = SimCLR(encoder, projection_head(HeadConfig(head, 64, 16), features), features, classes=10)
    with FakeTensorMode(allow_non_fake_inputs=False):
        z, logits = forward_on_cuda(simclr, (8, 3, size, size))
        loss = nt_xent(z, 0.1, impl="reference")
    assert z.shape == (8, 16) and logits.shape == (8, 10) and z.device == logits.device == torch.device("cuda:0")
    assert loss.shape == () and loss.device == z.device


class Stray(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.shift = nn.Linear(4, 4), torch.ones(4)  # neither parameter nor buffer

    def forward(self, x):
        return self.linear(x[:, :, 0, 0]) + self.shift


def test_tensor_left_on_the_cpu_raises():
    with (
        FakeTensorMode(allow_non_fake_inputs=False),
        pytest.raises((AssertionError, RuntimeError), match=r"device|convert all Tensors"),
    ):
        forward_on_cuda(Stray(), (2, 4, 1, 1))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_step_does_not_wait_for_the_device(name, monkeypatch):
    """Guard, means and optimizer: a fake tensor has no values, so reading one on the host would raise."""

    def fused_sgd(weights, gradients, buffers, found_inf, **_):  # torch's kernel has no fake implementation
        assert {tensor.device.type for tensor in [*weights, *gradients, *buffers, found_inf]} == {"cuda"}

    monkeypatch.setattr(torch, "_fused_sgd_", fused_sgd)
    device = torch.device("cuda")
    with FakeTensorMode():
        with device:
            net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
        optimizer = create_optimizer(OptimConfig(name), parameter_groups([net], 1e-4), lr=0.1)
        guard, means = NonFiniteGuard(net, [optimizer], device), RunningMeans()
        for step in (1, 2):
            guard.before_forward()
            loss = net(torch.empty(8, 3, 5, 5, device=device)).square().mean()
            for w in net.parameters():  # a backward pass would need the real device
                w.grad = torch.empty_like(w)
            taken, norm = guard.after_backward(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            means.add(taken, loss=loss, gradient_norm=norm)
        assert {w.device.type for w in net.parameters()} == {guard.counts.device.type} == {means.sums.device.type}
        assert guard.counts.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            norm.item()
