"""Encoder, heads and loss on CUDA tensors that hold no numbers: a tensor left on the CPU fails, without a GPU."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from loss import nt_xent
from model import SimCLR, create_encoder, encoder_spec, projection_head, representation_width


def forward_on_cuda(module: nn.Module, views: tuple[int, ...]):
    """What the module makes of views of that shape, to be called under a FakeTensorMode."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weights = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in tensors.items()}
    x = torch.empty(views, device="cuda").to(memory_format=torch.channels_last)
    return torch.func.functional_call(module, weights, (x,))


@pytest.mark.parametrize("head", ["v1", "v2"])
@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("resnet50", 224), ("vit_tiny_patch16_224", 224), ("convnext_atto", 224)]
)
def test_everything_follows_the_views_device(name, size, head):
    encoder = create_encoder(encoder_spec(name, size, "auto", 1.0))
    width = representation_width(encoder, size)
    simclr = SimCLR(encoder, projection_head(head, width, 64, 16), width, classes=10)
    with FakeTensorMode(allow_non_fake_inputs=False):
        z, scores = forward_on_cuda(simclr, (8, 3, size, size))
        loss = nt_xent(z, 0.1, impl="reference")
    assert z.shape == (8, 16) and scores.shape == (8, 10) and z.device == scores.device == torch.device("cuda:0")
    assert loss.shape == () and loss.device == z.device


class Stray(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.shift = nn.Linear(4, 4), torch.ones(4)  # neither parameter nor buffer

    def forward(self, x):
        return self.linear(x[:, :, 0, 0]) + self.shift


def test_a_tensor_left_on_the_cpu_fails():
    with (
        FakeTensorMode(allow_non_fake_inputs=False),
        pytest.raises((AssertionError, RuntimeError), match=r"device|convert all Tensors"),
    ):
        forward_on_cuda(Stray(), (2, 4, 1, 1))
