"""NT-Xent in five Triton kernels: the rows' lengths, the sums over negatives, the losses, the products, the gradient.

x (M, D) are the rows of all ranks as the heads gave them, this rank's 2n first; views k and n + k are sample k. With
z_i = x_i / |x_i|, s_ij = z_i . z_j / tau and p(i) the other view of i, equation 1 of SimCLR (arXiv 2002.05709) is

    l_i   = softplus(L_i - s_ip(i)),           L_i = log of the sum over j not in {i, p(i)} of exp(s_ij)
    lse_i = logaddexp(L_i, s_ip(i)),           q_i = sigmoid(L_i - s_ip(i))
    dL/dz_i = [ sum_j (P_ij + P_ji) z_j - (q_i + q_p(i)) z_p(i) ] / (M tau),       P_ij = exp(s_ij - lse_i)
    dL/dx_i = (dL/dz_i - <z_i, dL/dz_i> z_i) / |x_i|
    dL/dtau = -1/(2 tau) sum_i <z_i, dL/dz_i>

The sum over j never takes in the positive, in either pass: subtracted afterwards, it would cancel all other terms once
the model is trained. A rank holds all j for its own i, and lse_j of all ranks, so its gradient is whole.

The kernels work in base 2 on unnormalized rows. With g_i = sqrt(log2(e) / tau) / |x_i|

    t_ij = s_ij log2(e) = g_i g_j (x_i . x_j)

so the GEMM takes the rows as they are, no second rounding, and one fp32 vector carries norm and temperature. S is
symmetric: P_ij + P_ji = 2^t_ij (a_i + a_j) with a_i = 2^-lse_i takes one exponential. |s| <= 1 / tau, so down to
MIN_TEMPERATURE neither 2^t, nor the sum of a million of them, nor its inverse leaves fp32's normal numbers: nothing is
subtracted, as if the maximum were known to be 0. Below, ONLINE keeps a running maximum forward and takes two
exponentials backward, 2^(t_ij - lse_i) + 2^(t_ij - lse_j), lse being in base 2.

The upper triangle of S would do for the forward: half of one GEMM of three. But then every tile sums its columns too,
into slots of its own as nothing may depend on the order of programs: M M / BLOCK_M numbers, which outgrow x itself from
M = BLOCK_M D on. It was left out.

fp16 alone cannot hold (a_i + a_j) g_j of any row: there the rows are scaled by the power of two which brings g_i into
[1/2, 1), which is exact, and a by 2^14.

The rows are copied for that, and where their D does not fill whole blocks of the GEMM: zeros stand behind them then,
and D below is the copy's. Masks over D would cost each tile registers, and rows at odd addresses its wide loads.
"""

import triton
import triton.language as tl

from .blocks import (
    add_exponentials,
    load_rows,
    load_vector,
    own_rows,
    pair_tiles,
    similarities,
    tile_columns,
)

MIN_TEMPERATURE = tl.constexpr(1 / (88.72 - 14))  # log of fp32's largest number, less that of a million terms


@triton.jit
def lse_forward_kernel(
    y_ptr,  # (M, D): x or its copy
    g_ptr,  # (M,)
    temperature,
    partial_ptr,  # (splits, 2n) fp32
    n,
    M,
    first_tile,
    last_tile,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    ONLINE: tl.constexpr,
    TAU_IS_POINTER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # partial_i = log2 of the sum of 2^t_ij over the negatives j in this program's share of the tiles
    if TAU_IS_POINTER and (tl.load(temperature) < MIN_TEMPERATURE) != ONLINE:
        return  # both forms were launched, for the device alone knows which one it takes
    i, i_end, k_i = own_rows(n, BLOCK_M)
    first, pairs = pair_tiles(n, BLOCK_M, BLOCK_N)
    split, splits = tl.program_id(1), tl.num_programs(1)
    begin = first_tile + (last_tile - first_tile) * split // splits
    end = first_tile + (last_tile - first_tile) * (split + 1) // splits

    y_i = load_rows(y_ptr, i, i_end, 0, D, BLOCK_M, BLOCK_K, EVEN)
    g_i = load_vector(g_ptr, i, i_end, BLOCK_M, EVEN)
    high = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for PAIRS in tl.static_range(1, -1, -1):  # only the first few tiles hold pairs: the others shall not compare
        for u in tl.range(tl.maximum(begin, (1 - PAIRS) * pairs), tl.minimum(end, pairs) if PAIRS else end):
            j, j_end = tile_columns(u, first, n, M, BLOCK_N)
            y_j = load_rows(y_ptr, j, j_end, 0, D, BLOCK_N, BLOCK_K, EVEN)
            g_j = load_vector(g_ptr, j, j_end, BLOCK_N, EVEN)
            t = similarities(
                y_ptr,
                y_i,
                y_j,
                g_i,
                g_j,
                k_i,
                i,
                i_end,
                j,
                j_end,
                n,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                EVEN,
                PAIRS,
                PRECISION,
            )
            high, total = add_exponentials(high, total, t, ONLINE)

    partial = tl.log2(total) + (high if ONLINE else 0.0)
    rows = i + tl.arange(0, BLOCK_M)
    tl.store(partial_ptr + split * 2 * n + rows, partial, mask=rows < i_end)


@triton.jit
def grad_matmul_kernel(
    y_ptr,  # (M, D)
    g_ptr,  # (M,)
    lse_ptr,  # (M,): in base 2, less log2 of a headroom h
    a_ptr,  # (M,): 2^-lse
    b_ptr,  # (M,): a_i g_i
    temperature,
    product_ptr,  # (splits, 2n, D) fp32
    n,
    M,
    tiles,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    ONLINE: tl.constexpr,
    TAU_IS_POINTER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # product_i = sum over the negatives j of 2^t_ij (a_i + a_j) g_j y_j = h sqrt(log2(e) / tau) sum (P_ij + P_ji) z_j
    if TAU_IS_POINTER and (tl.load(temperature) < MIN_TEMPERATURE) != ONLINE:
        return
    i, i_end, k_i = own_rows(n, BLOCK_M)
    first, pairs = pair_tiles(n, BLOCK_M, BLOCK_N)
    split, splits = tl.program_id(1), tl.num_programs(1)
    begin, end = tiles * split // splits, tiles * (split + 1) // splits
    d = tl.program_id(2) * BLOCK_D  # of the product's columns; t takes all D in any case

    y_i = load_rows(y_ptr, i, i_end, 0, D, BLOCK_M, BLOCK_K, EVEN)
    g_i = load_vector(g_ptr, i, i_end, BLOCK_M, EVEN)
    a_i = load_vector(lse_ptr if ONLINE else a_ptr, i, i_end, BLOCK_M, EVEN)
    product = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for PAIRS in tl.static_range(1, -1, -1):
        for u in tl.range(tl.maximum(begin, (1 - PAIRS) * pairs), tl.minimum(end, pairs) if PAIRS else end):
            j, j_end = tile_columns(u, first, n, M, BLOCK_N)
            y_j = load_rows(y_ptr, j, j_end, 0, D, BLOCK_N, BLOCK_K, EVEN)
            g_j = load_vector(g_ptr, j, j_end, BLOCK_N, EVEN)
            t = similarities(
                y_ptr,
                y_i,
                y_j,
                g_i,
                g_j,
                k_i,
                i,
                i_end,
                j,
                j_end,
                n,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                EVEN,
                PAIRS,
                PRECISION,
            )
            if ONLINE:
                lse_j = load_vector(lse_ptr, j, j_end, BLOCK_N, EVEN)
                w = (tl.exp2(t - a_i[:, None]) + tl.exp2(t - lse_j[None, :])) * g_j[None, :]
            else:
                b_j = load_vector(b_ptr, j, j_end, BLOCK_N, EVEN)
                w = tl.exp2(t) * (a_i[:, None] * g_j[None, :] + b_j[None, :])  # a_j g_j is ready: one operation less
            if BLOCK_K < D:
                y_j = load_rows(y_ptr, j, j_end, d, D, BLOCK_N, BLOCK_D, EVEN)
            product = tl.dot(w.to(y_j.dtype), y_j, product, input_precision=PRECISION)

    rows = i + tl.arange(0, BLOCK_M)
    columns = d + tl.arange(0, BLOCK_D)
    at = (split.to(tl.int64) * 2 * n + rows)[:, None] * D + columns[None, :]
    tl.store(product_ptr + at, product, mask=(rows < i_end)[:, None] & (columns < D)[None, :])
