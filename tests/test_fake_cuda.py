"""Fake CUDA tensors, which need no GPU: a tensor left on the CPU raises, and so does every wait of the host."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from loss import nt_xent
from model import EncoderConfig, HeadConfig, SimCLR, create_encoder, encoder_spec, feature_dim, projection_head
from tests.fake_cuda import HostWait, NotCapturable, backward, fake_cuda


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


WAITS = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "asynchronous cpu": lambda x: x.to("cpu", non_blocking=True),
    "copy to the cpu": lambda x: torch.empty(4).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "tensor": lambda x: torch.tensor(1.0, device="cuda"),
    "cuda": lambda x: torch.ones(4).cuda(),
    "asynchronous cuda, not pinned": lambda x: torch.ones(4).to("cuda", non_blocking=True),
    "copy to cuda": lambda x: x.copy_(torch.ones(4)),
    "copies to cuda": lambda x: torch._foreach_copy_([x], [torch.ones(4)]),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_waits_of_the_host_raise(monkeypatch, wait):
    with fake_cuda(monkeypatch) as waits:
        x = torch.zeros(4, device="cuda")
        waits.watching = True
        with pytest.raises(HostWait):
            wait(x)


def test_work_that_the_host_only_launches_does_not_raise(monkeypatch):
    with fake_cuda(monkeypatch) as waits:
        waits.watching = True
        x = torch.full((4,), 2.0, device="cuda") / torch.tensor(3.0)
        x = x.where(x > 0, 1) + torch.ones(4).pin_memory().to("cuda", non_blocking=True)
        with waits.allow("here"):
            assert x.tolist() == [0, 0, 0, 0]
    assert x.is_cuda and waits.waited == {"here": 1}


UNCAPTURABLE = {
    "item": WAITS["item"],
    "branch": WAITS["bool"],
    "pinned copy to cuda": lambda x: torch.ones(4).pin_memory().to("cuda", non_blocking=True),
    "random numbers of the host": lambda x: x * torch.rand(()),
    "collective": lambda x: torch.ops._c10d_functional.all_reduce(x, "sum", "0"),
    "stream": lambda x: torch.cuda.stream(torch.cuda.Stream()),
}


@pytest.mark.parametrize("operation", UNCAPTURABLE.values(), ids=UNCAPTURABLE)
def test_what_a_graph_cannot_hold_raises(monkeypatch, operation):
    with fake_cuda(monkeypatch):
        x = torch.zeros(4, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            (x * torch.rand_like(x) + torch.tensor(3.0)).sum()
            with pytest.raises(NotCapturable):
                operation(x)


class Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin(), 2 * x

    @staticmethod
    def backward(ctx, first, second):
        return first.cos() + 2 * second


def test_backward_in_python_equals_that_of_torch():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6).double()
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(inplace=True)).double()
    weights, gradients = [*net.parameters(), *shared.parameters()], []
    x = torch.linspace(0, 1, 20, dtype=torch.float64).reshape(4, 5).square()
    for function in (torch.autograd.backward, backward):
        first, second = Both.apply(shared(net(x)))
        function([(shared(first) * second).mean(), second.float()], [None, torch.linspace(1, 2, 24).reshape(4, 6)])
        gradients.append([w.grad for w in weights])
        for w in weights:
            w.grad = None
    for expected, got in zip(*gradients, strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-15) and expected.any()
