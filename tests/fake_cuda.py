"""A CUDA device without a GPU: the host can launch work on it, but every wait for a result raises `HostWait`.

torch's fake tensors have a shape, a dtype and a device, but no memory, so there is no value for the host to read. CPU
tensors stay real, and whole scripts run: configuration, seeds, shards and file headers work as usual. Not executed are
the kernels themselves, and what hooks into torch's autograd engine, such as DDP.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
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

from loss import queue
from loss.triton import ops, tiles

aten = torch.ops.aten
H100 = SimpleNamespace(name="fake", major=9, shared_memory_per_block_optin=232_448, multi_processor_count=132)


class HostWait(AssertionError):
    """The host would wait for the device."""


class NotCapturable(AssertionError):
    """A CUDA graph would not hold the operation, or would repeat it with stale values."""


class HostWaits(TorchDispatchMode):
    """Runs CPU operations for real and CUDA operations on fake tensors; to be entered inside a `FakeTensorMode`.

    While `watching`, an operation raises `HostWait` if the host needs a value of the device to return a number or a CPU
    tensor, or to know the shape of the result. A copy to the device raises unless it is asynchronous and its source
    pinned, because torch waits for all others. While `capturing`, `NotCapturable` is raised by waits, by every copy
    between host and device, by random numbers of the host, by collectives and by the use of another stream.

    Attributes:
        waited: number of waits by the place that `allow` names; reading twice without work in between is one.
        launches: number of operations on the device, each of which launches one kernel or a few.
        launched: for the test's own counts of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watching, self.capturing, self.waited, self.launches, self.launched = False, False, Counter(), 0, []
        self._place: str | None = None
        self._idle = False  # after a wait, until the next operation on the device
        self._pinned: set[int] = set()  # addresses

    @contextmanager
    def allow(self, place: str) -> Iterator[None]:
        """Let the host wait; every number that it reads is 0."""
        self._place = place
        try:
            yield
        finally:
            self._place = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tree_leaves((args, kwargs))
        on_device = any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in inputs)
        if self.capturing:
            self._check_capturable(func, args, kwargs, on_device)
        if func in KERNELS:
            self.launches += 1
            return KERNELS[func](*args, **kwargs)
        if func in CUSTOM_OPERATORS:
            with self:
                return CUSTOM_OPERATORS[func](*args, **kwargs)
        if func is aten._pin_memory.default:
            self._pinned.add(args[0].data_ptr())
            return args[0]
        if not on_device:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self.launches += func.namespace == "aten" and not func.is_view and "empty" not in func.name()
        waits = self._waits(func, args, kwargs)
        if waits and self.watching:
            if self._place is None:
                raise HostWait(f"{func} reads a CUDA tensor, or copies to one from memory that is not pinned")
            self.waited[self._place] += not self._idle
        self._idle = waits or (self._idle and func.namespace == "prim")  # prim: a device or dtype is asked for
        if func is aten._local_scalar_dense.default:
            return 0
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWait(f"the result of {func} depends on values") from error

    def _check_capturable(self, func: Callable, args: tuple, kwargs: dict, on_device: bool) -> None:
        random = torch.Tag.nondeterministic_seeded in func.tags and not on_device
        collective = func.namespace in ("c10d", "_c10d_functional")
        if random or collective or self._waits(func, args, kwargs) or self._crossing(func, args, kwargs):
            raise NotCapturable(f"{func} in a CUDA graph")

    def _waits(self, func: Callable, args: tuple, kwargs: dict) -> bool:
        crossing = self._crossing(func, args, kwargs)
        non_blocking = crossing and (kwargs.get("non_blocking") or args[2:] == (True,))
        waits = [source.is_cuda or not (non_blocking and source.data_ptr() in self._pinned) for source in crossing]
        return func is aten._local_scalar_dense.default or any(waits)

    @staticmethod
    def _crossing(func: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
        """Tensors that the operation copies from host to device or back."""
        pairs = []
        if func is aten._to_copy.default:
            pairs = [(args[0], kwargs.get("device") or args[0].device)]
        elif func is aten.copy_.default:
            pairs = [(args[1], args[0].device)]
        elif func is aten._foreach_copy_.default:
            pairs = [(source, target.device) for target, source in zip(*args[:2], strict=True)]
        return [source for source, target in pairs if torch.device(target).type != source.device.type]


def _per_channel(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(count))


def _fused_sgd(*inputs: Any, **options: Any) -> None:
    assert {x.device.type for x in tree_leaves((inputs, options)) if isinstance(x, Tensor)} == {"cuda"}


KERNELS = {
    aten._fused_sgd_.default: _fused_sgd,
    aten.batch_norm_stats.default: lambda x, eps: _per_channel(x, 2),
    aten.batch_norm_gather_stats_with_counts.default: lambda x, *_: _per_channel(x, 2),
    aten.batch_norm_elemt.default: lambda x, *_: torch.empty_like(x),
    aten.batch_norm_backward_reduce.default: lambda grad, x, *_: _per_channel(x, 4),
    aten.batch_norm_backward_elemt.default: lambda grad, x, *_: torch.empty_like(x),
}
"""CUDA kernels that have no fake implementation in torch."""

CUSTOM_OPERATORS = {
    op._opoverload: op._init_fn for op in [*vars(ops).values(), *vars(queue).values()] if isinstance(op, CustomOpDef)
}
"""Custom operators of the loss that run on GPUs, and their bodies, which launch kernels."""


def backward(tensors, grad_tensors=None, *_, **__) -> None:
    """`torch.autograd.backward` in Python, because torch's engine asks the CUDA driver even about fake tensors.

    It calls the nodes of the graph that autograd recorded, but no hooks.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gradients = grad_tensors if isinstance(grad_tensors, (list, tuple)) else [grad_tensors] * len(tensors)
    received = defaultdict(dict)  # node -> index of its output in the forward pass -> gradient
    missing = {}  # node -> number of edges over which it has yet to receive a gradient

    def edges(node):
        return [(index, *edge) for index, edge in enumerate(node.next_functions) if edge[0] is not None]

    def send(node, index, gradient):
        expected = node._input_metadata[index]
        if (gradient.shape, gradient.dtype) != (expected.shape, expected.dtype):
            gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
        received[node][index] = received[node][index] + gradient if index in received[node] else gradient

    def call(node):
        """Gradients of the node's inputs, by index; none if no gradient reached it."""
        got = received.pop(node, None)
        if got is None:
            return {}
        if hasattr(node, "variable"):  # it keeps the first gradient without a copy, as in torch's engine
            x, gradient = node.variable, got[0].detach()
            x.grad = gradient if x.grad is None else x.grad + gradient
            return {}
        function = node.apply if isinstance(node, BackwardCFunction) else node
        results = function(*(got.get(index) for index in range(len(node._input_metadata))))
        return dict(enumerate(results if isinstance(results, tuple) else (results,)))

    found = [x.grad_fn for x in tensors]
    while found:
        node = found.pop()
        if node not in missing:
            missing[node] = 0
            found += [after for _, after, _ in edges(node)]
    for node in list(missing):
        for _, after, _ in edges(node):
            missing[after] += 1
    with torch.no_grad():
        for x, gradient in zip(tensors, gradients, strict=True):
            send(x.grad_fn, x.output_nr, torch.ones_like(x) if gradient is None else gradient)
        ready = [node for node, count in missing.items() if count == 0]
        while ready:
            node = ready.pop()
            results = call(node)
            for index, after, number in edges(node):
                if results.get(index) is not None:
                    send(after, number, results[index])
                missing[after] -= 1
                if missing[after] == 0:
                    ready.append(after)


def grad(outputs, inputs, grad_outputs, allow_unused=False) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` by `backward`."""
    kept = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    backward(outputs, grad_outputs)
    gradients = tuple(x.grad for x in inputs)
    for x, before in zip(inputs, kept, strict=True):
        x.grad = before
    assert allow_unused or None not in gradients
    return gradients


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostWaits]:
    """Context in which tensors on "cuda" are fake and questions to the driver are answered as by an H100."""
    waits = HostWaits()

    def synchronize(*_: object) -> None:
        raise HostWait("torch.cuda.synchronize")

    @contextmanager
    def capture(graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        assert capture_error_mode == "thread_local", "the loader's threads work meanwhile"
        waits.capturing = True
        try:
            yield
        finally:
            waits.capturing = False

    def use_stream(stream: Any) -> nullcontext:
        if waits.capturing:
            raise NotCapturable("another stream in a CUDA graph")
        return nullcontext()

    def launch(*_: object, **__: object) -> None:
        waits.launches += 1

    graph = SimpleNamespace(pool=lambda: None, replay=launch)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    answers = {"is_bf16_supported": True, "get_device_capability": (9, 0), "get_device_properties": H100}
    for name, answer in (answers | {"Stream": stream, "current_stream": stream, "CUDAGraph": graph}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "stream", use_stream)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    monkeypatch.setattr(triton.JITFunction, "run", launch)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), waits:
            yield waits
    finally:
        tiles.chip.cache_clear()
        ops._side_stream.cache_clear()
