"""Kernels over rows, O(M D), with their launchers: norms and positives, row losses, gradient rows.

The package docstring derives the equations and defines the names.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import inverse_norm, power_of_two_above
from .temperature import is_on_host, is_online, load_temperature, temperature_argument
from .tiles import row_block, tile_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def log2_headroom(dtype: torch.dtype) -> int:
    """log2(h) of the factor h of 2^-lse in the weights of `grad_matmul`.

    In float16, (P_ij + P_ji) g_j then stays below half of the largest number, and 4e-9 among the normal ones.
    """
    return 14 if dtype == torch.float16 else 0


@triton.jit
def scale_rows_kernel(
    x_ptr,  # (M, D)
    temperature,  # number or, if TAU_IS_POINTER, pointer
    g_ptr,  # (M,) float32
    positive_ptr,  # (M / 2,) float32: t_ip(i), the same for both views of a sample
    sums_ptr,  # (M,) int64: set to 0
    y_ptr,  # (M, PITCH): written if COPIED: rows, scaled if SCALED, and zeros
    n,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAU_IS_POINTER: tl.constexpr,
    COPIED: tl.constexpr,
    SCALED: tl.constexpr,
):
    # g_i = sqrt(log2(e) / tau) / |x_i|,     t_ip(i) = g_i g_p(i) (x_i . x_p(i))
    rank = tl.program_id(1)
    k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i, p = rank * 2 * n + k, (rank * 2 + 1) * n + k
    d = tl.arange(0, D_PADDED)
    inside = (k < n)[:, None] & (d < D)[None, :]
    at_i = i.to(tl.int64)[:, None] * D + d[None, :]
    at_p = p.to(tl.int64)[:, None] * D + d[None, :]
    x_i = tl.load(x_ptr + at_i, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_M, D_PADDED)
    x_p = tl.load(x_ptr + at_p, mask=inside, other=0.0).to(tl.float32)

    tau = load_temperature(temperature, TAU_IS_POINTER)
    root = tl.sqrt_rn(tl.where(tau > 0, LOG2_E / tau, float("nan")))
    g_i = root * inverse_norm(x_i)  # (BLOCK_M,)
    g_p = root * inverse_norm(x_p)
    positive = tl.sum((x_i * g_i[:, None]) * (x_p * g_p[:, None]), axis=1)
    if SCALED:
        power_i, power_p = power_of_two_above(g_i), power_of_two_above(g_p)
        g_i, g_p = g_i / power_i, g_p / power_p
        x_i, x_p = x_i * power_i[:, None], x_p * power_p[:, None]
    if COPIED:
        y_i = y_ptr + i.to(tl.int64)[:, None] * PITCH + d[None, :]
        y_p = y_ptr + p.to(tl.int64)[:, None] * PITCH + d[None, :]
        padded = (k < n)[:, None] & (d < PITCH)[None, :]
        tl.store(y_i, x_i.to(y_ptr.dtype.element_ty), mask=padded)
        tl.store(y_p, x_p.to(y_ptr.dtype.element_ty), mask=padded)
    tl.store(g_ptr + i, g_i, mask=k < n)
    tl.store(g_ptr + p, g_p, mask=k < n)
    tl.store(positive_ptr + rank * n + k, positive, mask=k < n)
    tl.store(sums_ptr + i, tl.zeros((BLOCK_M,), tl.int64), mask=k < n)
    tl.store(sums_ptr + p, tl.zeros((BLOCK_M,), tl.int64), mask=k < n)


def scale_rows(x: Tensor, temperature: Tensor, n: int, precision: str, kernel: str) -> tuple[Tensor, ...]:
    """Rows y (M, pitch), factors g (M,) float32, t_ip(i) (M / 2,) float32, and zeros (M,) int64 for `lse_triangle`.

    x (M, D) holds 2n rows of every rank, its first views before its second views. y is x or a scaled and padded copy,
    as `kernel` needs it: "lse_forward" or "grad_matmul" at `precision` "tf32" or "ieee".
    """
    m, width = x.shape
    pitch = tile_of(kernel, x, precision).pitch(width)
    copied = is_copied(x, pitch)
    y = x.new_empty(m, pitch) if copied else x
    g = x.new_empty(m, dtype=torch.float32)
    positives = x.new_empty(m // 2, dtype=torch.float32)
    sums = x.new_empty(m, dtype=torch.int64)
    padded, block_m = row_block(pitch)
    scale_rows_kernel[triton.cdiv(n, block_m), m // (2 * n)](
        *(x, temperature_argument(temperature), g, positives, sums, y, n),
        D=width,
        PITCH=pitch,
        D_PADDED=padded,
        BLOCK_M=block_m,
        TAU_IS_POINTER=not is_on_host(temperature),
        COPIED=copied,
        SCALED=x.dtype == torch.float16,
    )
    return y, g, positives, sums


def is_copied(x: Tensor, pitch: int) -> bool:
    """Whether the kernels over tiles read a copy of the rows: scaled for float16, or padded with zeros to `pitch`."""
    return x.dtype == torch.float16 or x.shape[1] != pitch


@triton.jit
def row_losses_kernel(
    partial_ptr,  # (slots, 2n)
    sums_ptr,  # (2n,) int64, in units of `unit`
    positive_ptr,  # (n,)
    g_ptr,  # (2n,)
    temperature,  # number or, if TAU_IS_POINTER, pointer
    loss_ptr,  # (2n,)
    a_ptr,  # (2n,): h 2^-lse_i, or lse_i - log2(h) at an online temperature
    b_ptr,  # (2n,): a_i g_i, or the same as a_i at an online temperature
    q_ptr,  # (2n,)
    unit,
    n,
    slots,
    LOG2_HEADROOM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAU_IS_POINTER: tl.constexpr,
    DECOUPLED: tl.constexpr,
):
    # l_i = softplus(L_i - s_ip(i)),     lse_i = s_ip(i) + l_i,     q_i = sigmoid(L_i - s_ip(i)),     computed in base 2
    # l_i = L_i - s_ip(i),               lse_i = L_i,               q_i = 1                           if DECOUPLED
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < 2 * n
    on_triangle = tl.load(sums_ptr + i, mask=inside, other=0).to(tl.float32) * unit  # 0 if `lse_forward` ran instead
    high = tl.log2(on_triangle)
    for slot in range(slots):
        high = tl.maximum(high, tl.load(partial_ptr + slot * 2 * n + i, mask=inside, other=0.0))
    high = tl.where(high == -float("inf"), 0.0, high)  # a single sample has no negatives
    total = on_triangle * tl.exp2(-high)
    for slot in range(slots):
        total += tl.exp2(tl.load(partial_ptr + slot * 2 * n + i, mask=inside, other=0.0) - high)
    positive = tl.load(positive_ptr + i % n, mask=inside, other=0.0)
    negatives = high + tl.log2(total)
    excess = negatives - positive
    if DECOUPLED:
        loss, lse, q = excess, negatives, tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        # log2(1 + small) in full precision even where 1 + small rounds to 1: losses of a trained model are that small.
        small = tl.exp2(-tl.abs(excess))
        one_more = 1 + small
        log_one_more = tl.where(one_more == 1, small / LN_2, tl.log2(one_more) * (small / (one_more - 1)))
        loss = tl.where(excess > 0, excess, 0.0) + log_one_more  # `small` propagates NaN
        lse = positive + loss
        q = 1 / (1 + tl.exp2(-excess))
    tl.store(loss_ptr + i, loss * LN_2, mask=inside)
    lse -= LOG2_HEADROOM
    online = is_online(temperature, TAU_IS_POINTER)
    a = tl.where(online, lse, tl.exp2(-lse))
    g = tl.load(g_ptr + i, mask=inside, other=0.0)
    tl.store(a_ptr + i, a, mask=inside)
    tl.store(b_ptr + i, tl.where(online, lse, a * g), mask=inside)
    tl.store(q_ptr + i, q, mask=inside)


def row_losses(
    partial: Tensor,
    sums: Tensor,
    places: int | None,
    positives: Tensor,
    g: Tensor,
    temperature: Tensor,
    dtype: torch.dtype,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """l, a, b and q of this rank's rows, each (2n,) float32; a and b as `grad_matmul` reads them for rows of `dtype`.

    partial (slots, 2n) are all partial log-sums from `lse_forward`, sums (2n,) int64 those from `lse_triangle` in units
    of 2^-places, or zeros if places is None. positives (n,) and g (M,) are from `scale_rows`.
    """
    slots, rows = partial.shape
    losses, a, b, q = (partial.new_empty(rows) for _ in range(4))
    row_losses_kernel[(triton.cdiv(rows, 128),)](
        *(partial, sums, positives, g, temperature_argument(temperature), losses, a, b, q),
        *(0.0 if places is None else 2.0**-places, rows // 2, slots),
        LOG2_HEADROOM=log2_headroom(dtype),
        BLOCK_M=128,
        TAU_IS_POINTER=not is_on_host(temperature),
        DECOUPLED=decoupled,
    )
    return losses, a, b, q


@triton.jit
def gradient_rows_kernel(
    x_ptr,  # (2n, D)
    product_ptr,  # (splits, 2n, PITCH)
    q_ptr,  # (2n,)
    temperature,
    grad_loss_ptr,  # ()
    dx_ptr,  # (2n, D)
    dtau_ptr,  # (2n,) float32: the row's share of dL/dtau
    n,
    splits,
    headroom,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAU_IS_POINTER: tl.constexpr,
):
    # dL/dz_i = W [ sum (P_ij + P_ji) z_j - (q_i + q_p(i)) z_p(i) ] / (M tau),     2n = M / W
    # dL/dx_i = (dL/dz_i - <z_i, dL/dz_i> z_i) / |x_i|,     dL/dtau = sum of -<z_i, dL/dz_i> / (2 tau)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p = tl.where(i < n, i + n, i - n)
    d = tl.arange(0, D_PADDED)
    inside = (i < 2 * n)[:, None] & (d < D)[None, :]
    at = i.to(tl.int64)[:, None] * D + d[None, :]
    x_i = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_M, D_PADDED)
    x_p = tl.load(x_ptr + p.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    r_i = inverse_norm(x_i)
    z_i = x_i * r_i[:, None]
    z_p = x_p * inverse_norm(x_p)[:, None]
    q = tl.load(q_ptr + i, mask=i < 2 * n, other=0.0) + tl.load(q_ptr + p, mask=i < 2 * n, other=0.0)

    product = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    at_split = i.to(tl.int64)[:, None] * PITCH + d[None, :]
    for _ in range(splits):
        product += tl.load(product_ptr + at_split, mask=inside, other=0.0)
        at_split += 2 * n * PITCH
    tau = load_temperature(temperature, TAU_IS_POINTER)
    product *= tl.sqrt_rn(tau / LOG2_E) / headroom
    dz = (product - q[:, None] * z_p) * (tl.load(grad_loss_ptr) / (2 * n * tau))
    along = tl.sum(z_i * dz, axis=1)
    dx = (dz - along[:, None] * z_i) * r_i[:, None]  # the component along z_i does not change its direction
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dtau_ptr + i, along / (-2 * tau), mask=i < 2 * n)


def gradient_rows(
    grad_loss: Tensor, temperature: Tensor, x: Tensor, product: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """W dL/dx_i (2n, D) in x's dtype and the rows' shares of W dL/dtau (2n,) float32, for this rank's rows.

    x (M, D) begins with them, product (splits, 2n, pitch) is from `grad_matmul`, q (2n,) from `row_losses`.
    """
    splits, rows, pitch = product.shape
    width = x.shape[1]
    dx = x.new_empty(rows, width)
    dtau = x.new_empty(rows, dtype=torch.float32)
    headroom = 2.0 ** log2_headroom(x.dtype)
    padded, block_m = row_block(width)
    gradient_rows_kernel[(triton.cdiv(rows, block_m),)](
        *(x, product, q, temperature_argument(temperature), grad_loss, dx, dtau, rows // 2, splits, headroom),
        D=width,
        PITCH=pitch,
        D_PADDED=padded,
        BLOCK_M=block_m,
        TAU_IS_POINTER=not is_on_host(temperature),
    )
    return dx, dtau
