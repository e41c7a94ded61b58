"""Rates of a device that bound the loss: matrix products, exponentials and memory.

Each work is large enough that its launch does not count, and is timed in turn with what it is compared to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Work(NamedTuple):
    """A function to time, and the number of operations or bytes of one call."""

    call: Callable[[], object]
    amount: float


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Context in which torch multiplies float32 matrices on a GPU in "tf32" or "ieee"."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def matrix_product(dtype: torch.dtype, device: torch.device) -> Work:
    """Square matrix product, in flop."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Work(lambda: torch.mm(a, b, out=out), 2 * side**3)


def exponentials(device: torch.device) -> Work:
    """Exponentials of cached blocks (of registers on a GPU), in exponentials."""
    if device.type == "cuda":
        from bench.exp_kernel import exponentials as in_registers

        x = torch.rand(torch.cuda.get_device_properties(device).multi_processor_count * 16 * 1024, device=device)
        return Work(lambda: in_registers(x, 1024), 1024 * len(x))
    block = torch.randn(512, 1024, device=device)
    powers = torch.empty_like(block)

    def call() -> None:
        for _ in range(4):
            torch.exp(block, out=powers)

    return Work(call, 4 * block.numel())


def copy(device: torch.device) -> Work:
    """Copy within the memory of the device, in bytes read and written."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), 2 * source.numel())
