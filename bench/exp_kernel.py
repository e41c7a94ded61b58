"""Triton kernel that computes exponentials in registers, to measure the rate of the special-function units.

`torch.exp` on a large tensor measures memory, and on a small one the launch.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def exp2_kernel(out_ptr, repeats, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(out_ptr + at)
    for _ in range(repeats):
        x = tl.exp2(-x)  # from [0, 1] to [1/2, 1]
    tl.store(out_ptr + at, x)


def exponentials(x: Tensor, repeats: int) -> None:
    """Replace every number in x, (n,) float32 from 0 to 1 with n a multiple of 1024, by 2^-x, `repeats` times."""
    exp2_kernel[(len(x) // 1024,)](x, repeats, BLOCK=1024)
