"""Count the launches of one forward and backward pass of the Triton loss, without a GPU.

    TRITON_INTERPRET=1 python -m bench.loss_launches          rows as JSON, for `bench/loss_kernel.py --static`

The interpreter runs the launchers that a GPU runs. Kernels count, and torch operations outside of kernels.
"""

import json

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from loss.triton import grad_matmul, lse_forward, lse_triangle, ops, rows

KERNELS = (
    rows.scale_rows_kernel,
    lse_forward.lse_forward_kernel,
    lse_triangle.lse_triangle_kernel,
    rows.row_losses_kernel,
    grad_matmul.grad_matmul_kernel,
    rows.gradient_rows_kernel,
)
# Allocation and views launch nothing; `set_` and `copy_` are the interpreter's own copies of a kernel's arguments.
WITHOUT_LAUNCH = {"empty", "new_empty", "empty_like", "detach", "item", "set_", "copy_"}


def launches(z: Tensor, temperature: Tensor) -> list[str]:
    """Names of the kernels and torch operations that a pass over z (2n, D) with temperature () launches, sorted."""
    names = []
    hooks = [lambda *_, name=kernel.__name__, **__: names.append(name) for kernel in KERNELS]
    for kernel, hook in zip(KERNELS, hooks, strict=True):
        kernel.add_pre_run_hook(hook)
    grad_loss = torch.ones(())
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            ops.nt_xent_triton(z.detach().requires_grad_(), temperature).backward(grad_loss)
    finally:
        for kernel, hook in zip(KERNELS, hooks, strict=True):
            kernel.pre_run_hooks.remove(hook)
    for event in profiler.events():
        outermost = event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")
        name = event.name.removeprefix("aten::")
        converts = name != "to" or any(child.name == "aten::_to_copy" for child in event.cpu_children)
        if event.name.startswith("aten::") and outermost and converts and name not in WITHOUT_LAUNCH:
            names.append(name)
    return sorted(names)


def launch_rows() -> list[dict]:
    """One row per kind of input: number and names of the launches."""
    generator = torch.Generator().manual_seed(0)
    counted = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for learnable in (False, True):
            z = torch.randn(8, 128, generator=generator).to(dtype)
            names = launches(z, torch.tensor(0.1, requires_grad=learnable))
            counted.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "learnable_temperature": learnable,
                    "launches": len(names),
                    "names": " ".join(names),
                }
            )
    return counted


if __name__ == "__main__":
    print(json.dumps(launch_rows()))
