"""NT-Xent in fused Triton kernels: memory O(M D), on NVIDIA GPUs of compute capability 8.0 or later.

    rows.py          norms and positives, row losses, gradient rows: kernels over rows, O(M D)
    lse_forward.py   log-sum-exp over the negatives of every row: one product of all pairs
    lse_triangle.py  the same among this rank's rows from half of the product, where the temperature allows
    grad_matmul.py   gradient with respect to the rows: two products of all pairs
    blocks.py        device functions of these three
    tiles.py         tile sizes per GPU; temperature.py: a temperature that stays on the device
    ops.py           custom operators for autograd and torch.compile, on one rank or several

Derivation. x (M, D) are the projections of all ranks, the 2n rows of this rank first; rows k and n + k are the views of
sample k. With z_i = x_i / |x_i|, s_ij = z_i . z_j / tau and p(i) the other view of i, equation 1 of SimCLR (arXiv
2002.05709) is

    l_i   = softplus(L_i - s_ip(i)),           L_i = log of the sum over j not in {i, p(i)} of exp(s_ij)
    lse_i = logaddexp(L_i, s_ip(i)),           q_i = sigmoid(L_i - s_ip(i))
    dL/dz_i = [ sum_j (P_ij + P_ji) z_j - (q_i + q_p(i)) z_p(i) ] / (M tau),       P_ij = exp(s_ij - lse_i)
    dL/dx_i = (dL/dz_i - <z_i, dL/dz_i> z_i) / |x_i|
    dL/dtau = -1/(2 tau) sum_i <z_i, dL/dz_i>

The decoupled loss (arXiv 2110.06848) has l_i = L_i - s_ip(i), lse_i = L_i and q_i = 1: only `rows.row_losses` differs.

Positives are excluded from the sum over j in both passes: subtracting them afterwards would cancel all other terms once
the model is trained. A rank visits all j for its own i and has lse_j of all ranks, so its gradient is complete.

The kernels work in base 2 and on unnormalized rows. With g_i = sqrt(log2(e) / tau) / |x_i|

    t_ij = s_ij log2(e) = g_i g_j (x_i . x_j)

so the GEMM reads the rows without rounding them a second time, and one float32 vector carries norm and temperature. S
is symmetric: P_ij + P_ji = 2^t_ij (a_i + a_j) with a_i = 2^-lse_i needs one exponential. Because |s| <= 1 / tau,
neither 2^t nor a sum of a million of them leaves the normal float32 numbers down to MIN_TEMPERATURE, nor does the
inverse of a sum of 300,000, and no maximum has to be subtracted. Below it, ONLINE keeps a running maximum in the
forward pass and computes two exponentials in the backward pass, 2^(t_ij - lse_i) + 2^(t_ij - lse_j) with lse in base 2.

Half of S is enough for the forward pass, which saves half of one GEMM of three. But then every tile also sums its
columns, for rows of other programs. `lse_triangle` adds these as integers, whose sum does not depend on the order of
programs. It runs where 64 bits hold all possible sums to float32's precision, from tau of about 0.08 on.

float16 cannot represent (a_i + a_j) g_j for every row. There, rows are scaled by the power of two that brings g_i into
[1/2, 1), which is exact, and a by 2^14.

Rows are copied for that scaling, and where D does not fill whole blocks of the GEMM: the copy is padded with zeros, and
D in the kernels is the copy's. Masks over D would cost every tile registers, and rows at odd addresses lose wide loads.
"""

import torch

from ..common import has_c_compiler

NO_C_COMPILER = (
    "impl='triton' needs a C compiler and Python's header files; install gcc or clang (or set CC to a compiler) and "
    "python3-dev, or use impl='blockwise'."
)


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why impl="triton" cannot run on such a z, as one sentence; None if it can. Imports Triton."""
    try:
        import triton
    except ImportError:
        return "impl='triton' needs the triton package, which is not installed; use impl='auto' or 'blockwise'."
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"impl='triton' needs float32, bfloat16 or float16, but z is {dtype}; use impl='auto' or 'blockwise'."
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0):
        return None if has_c_compiler() else NO_C_COMPILER
    return (
        f"impl='triton' is not available for z on {device}: it needs an NVIDIA GPU of compute capability 8.0 or later, "
        "or TRITON_INTERPRET=1 set before Python starts; use impl='auto' or 'blockwise'."
    )


# As torch.compiler.assume_constant_result does, which imports torch._dynamo and with it Triton.
unsupported_reason._dynamo_marked_constant = True
