"""A CUDA device without a GPU: the host can launch work on it, but every wait for it raises `HostWait`.

torch's fake tensors have a shape, a dtype and a device, but no memory, so a value that the host reads does not exist.
Tensors on the CPU stay real, and whole scripts run: seeds, configuration, shards and file headers work as usual.

Bodies of custom operators are not executed, only their registered fake implementations.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loss.triton import ops, tiles

aten = torch.ops.aten
H100 = SimpleNamespace(
    name="fake", major=9, minor=0, shared_memory_per_block_optin=232_448, multi_processor_count=132
)


class HostWait(AssertionError):
    """The host would wait for the device."""


class HostWaits(TorchDispatchMode):
    """Executes CPU operations for real and CUDA operations on fake tensors; enter it inside a `FakeTensorMode`.

    While `watching`, an operation raises `HostWait` if it needs a value of the device: to return a number or a tensor on
    the CPU, or to know the shape of its result. A copy to the device raises unless it is asynchronous and its source
    pinned, because torch waits for all others.

    Attributes:
        allowed: how often the host waited in each of the places named by `allow`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watching, self.allowed, self.pinned = False, Counter(), set()
        self._place: str | None = None

    @contextmanager
    def allow(self, place: str) -> Iterator[None]:
        """Let the host wait; numbers that it reads are 0."""
        self._place, waits = place, self.allowed[place]
        yield
        self._place = None
        self.allowed[place] = min(self.allowed[place], waits + 1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tree_leaves((args, kwargs))
        on_device = any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in inputs)
        if func in KERNELS:
            return KERNELS[func](*args, **kwargs)
        if func is aten._pin_memory.default:
            self.pinned.add(args[0].data_ptr())
            return args[0]
        if not on_device:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if self.watching and self._waits(func, args, kwargs):
            if self._place is None:
                raise HostWait(f"{func} on {[x.device for x in inputs if isinstance(x, Tensor)]}")
            self.allowed[self._place] += 1
        if func is aten._local_scalar_dense.default:
            return 0
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWait(f"{func} depends on values") from error

    def _waits(self, func: Callable, args: tuple, kwargs: dict) -> bool:
        if func is aten._local_scalar_dense.default:
            return True
        if func is aten.copy_.default:
            target, source, non_blocking = args[0].device, args[1], (*args[2:], kwargs.get("non_blocking"), False)[0]
        elif func is aten._to_copy.default:
            target, source, non_blocking = kwargs.get("device"), args[0], kwargs.get("non_blocking")
        else:
            return False
        if target is None or torch.device(target).type == source.device.type:
            return False
        return source.is_cuda or not (non_blocking and source.data_ptr() in self.pinned)


def _like_channels(x: Tensor, count: int) -> list[Tensor]:
    return [x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(count)]


def _fused_sgd(*inputs: Any, **options: Any) -> None:
    assert {x.device.type for x in tree_leaves((inputs, options)) if isinstance(x, Tensor)} == {"cuda"}


KERNELS = {
    aten._fused_sgd_.default: _fused_sgd,
    aten.batch_norm_stats.default: lambda x, eps: _like_channels(x, 2),
    aten.batch_norm_gather_stats_with_counts.default: lambda x, *_: _like_channels(x, 2),
    aten.batch_norm_elemt.default: lambda x, *_: torch.empty_like(x),
    aten.batch_norm_backward_reduce.default: lambda grad, x, *_: _like_channels(x, 4),
    aten.batch_norm_backward_elemt.default: lambda grad, x, *_: torch.empty_like(x),
}
"""CUDA kernels for which torch has no fake implementation."""


def backward(tensors, grad_tensors=None, *_, **__) -> None:
    """`torch.autograd.backward` in Python: the C++ engine asks the CUDA driver for a context, even for fake tensors.

    The nodes are those that autograd recorded; only the order in which they are called is decided here.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gradients = grad_tensors if isinstance(grad_tensors, (list, tuple)) else [grad_tensors] * len(tensors)
    received = defaultdict(dict)  # node -> number of its output in the forward pass -> gradient
    missing = {}  # node -> number of nodes that have yet to send it their gradients

    def send(node, number, gradient):
        expected = node._input_metadata[number]
        if (gradient.shape, gradient.dtype) != (expected.shape, expected.dtype):
            gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
        before = received[node].get(number)
        received[node][number] = gradient if before is None else before + gradient

    def call(node):
        inputs = received.pop(node, None)
        if not inputs:
            return [None] * len(node.next_functions)
        function = node.apply if isinstance(node, BackwardCFunction) else node
        outputs = function(*(inputs.get(number) for number in range(len(node._input_metadata))))
        return outputs if isinstance(outputs, tuple) else [outputs]

    found = [x.grad_fn for x in tensors]
    while found:
        node = found.pop()
        if node not in missing:
            missing[node] = 0
            found += [after for after, _ in node.next_functions if after is not None]
    for node in missing:
        for after, _ in node.next_functions:
            if after is not None:
                missing[after] += 1
    with torch.no_grad():
        for x, gradient in zip(tensors, gradients, strict=True):
            send(x.grad_fn, x.output_nr, torch.ones_like(x) if gradient is None else gradient)
        ready = [node for node, count in missing.items() if not count]
        while ready:
            node = ready.pop()
            for gradient, (after, number) in zip(call(node), node.next_functions, strict=False):
                if after is not None:
                    if gradient is not None:
                        send(after, number, gradient)
                    missing[after] -= 1
                    if not missing[after]:
                        ready.append(after)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostWaits]:
    """Context in which tensors on "cuda" are fake, with everything that torch asks the driver about answered."""

    def synchronize(*_: object) -> None:
        raise HostWait("torch.cuda.synchronize")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for name, value in {"is_bf16_supported": True, "get_device_capability": (9, 0), "get_device_properties": H100}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    waits = HostWaits()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), waits:
            yield waits
    finally:
        tiles.chip.cache_clear()
        ops._side_stream.cache_clear()
