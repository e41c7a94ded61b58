"""CUDA graphs on the CPU: a replay repeats the recorded operations on the same tensors, and nothing else.

As on a GPU, Python does not run again, new inputs are not read, numbers of the host keep their values, and the results
of the previous replay are overwritten. Random numbers are drawn again, from the generator's current state.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class RecordedGraph(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.replays = [], 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def pool(self) -> None:
        pass

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in HOST_READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(results)))
        return results

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, recorded in self.calls:
                for old, new in zip(recorded, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                        old.copy_(new)


@contextmanager
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    """Context in which CUDA graphs are recorded on the CPU; the list receives them."""
    graphs: list[RecordedGraph] = []

    def create() -> RecordedGraph:
        graphs.append(RecordedGraph())
        return graphs[-1]

    @contextmanager
    def capture(graph, pool=None, stream=None, capture_error_mode="global"):
        with graph:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    with monkeypatch.context() as patch:
        for name in ("Stream", "current_stream"):
            patch.setattr(torch.cuda, name, lambda device: stream)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "CUDAGraph", create)
        patch.setattr(torch.cuda, "graph", capture)
        yield graphs
