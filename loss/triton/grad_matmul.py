"""Product of all pairs' gradient weights with the rows, for every row i of this rank:

    product_i = sum over j not in {i, p(i)} of 2^t_ij (a_i + a_j) g_j y_j
              = h sqrt(log2(e) / tau) sum over j of (P_ij + P_ji) z_j,         a_i = h 2^-lse_i

with a headroom h that keeps the weights within float16. `rows.row_losses` prepares the terms of a row,
`rows.gradient_rows` turns the product into the gradient. The package docstring derives t and P.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import load_rows, load_vector, own_rows, pair_tiles, similarities, tile_columns
from .temperature import is_online, launch_forms, temperature_argument
from .tiles import choose_tile


@triton.jit
def grad_matmul_kernel(
    y_ptr,  # (M, D): x or its copy
    g_ptr,  # (M,) float32
    a_ptr,  # (2n,) float32: a_i, or lse_i - log2(h) if ONLINE
    b_ptr,  # (M,) float32: a_j g_j, or lse_j - log2(h) if ONLINE
    temperature,  # number or, if TAU_IS_POINTER, pointer
    product_ptr,  # (splits, 2n, D) float32
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
    if TAU_IS_POINTER and is_online(temperature, TAU_IS_POINTER) != ONLINE:
        return  # the other form, launched as well, handles this temperature
    i, i_end, k_i = own_rows(n, BLOCK_M)
    first, pairs = pair_tiles(n, BLOCK_M, BLOCK_N)
    split, splits = tl.program_id(1), tl.num_programs(1)
    begin, end = tiles * split // splits, tiles * (split + 1) // splits
    d = tl.program_id(2) * BLOCK_D  # first column of the product; t needs all D columns in any case

    y_i = load_rows(y_ptr, i, i_end, 0, D, BLOCK_M, BLOCK_K, EVEN)
    g_i = load_vector(g_ptr, i, i_end, BLOCK_M, EVEN)
    a_i = load_vector(a_ptr, i, i_end, BLOCK_M, EVEN)
    product = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for PAIRS in tl.static_range(1, -1, -1):
        for u in tl.range(tl.maximum(begin, (1 - PAIRS) * pairs), tl.minimum(end, pairs) if PAIRS else end):
            j, j_end = tile_columns(u, first, n, M, BLOCK_N)
            y_j = load_rows(y_ptr, j, j_end, 0, D, BLOCK_N, BLOCK_K, EVEN)
            g_j = load_vector(g_ptr, j, j_end, BLOCK_N, EVEN)
            t = similarities(
                y_ptr, y_i, tl.trans(y_j), g_i, g_j, k_i, i, i_end, j, j_end, n,
                D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PAIRS, PRECISION,
            )  # fmt: skip
            b_j = load_vector(b_ptr, j, j_end, BLOCK_N, EVEN)
            if ONLINE:
                w = (tl.exp2(t - a_i[:, None]) + tl.exp2(t - b_j[None, :])) * g_j[None, :]
            else:
                w = tl.exp2(t) * (a_i[:, None] * g_j[None, :] + b_j[None, :])  # b_j = a_j g_j saves a multiplication
            if BLOCK_K < D:
                y_j = load_rows(y_ptr, j, j_end, d, D, BLOCK_N, BLOCK_D, EVEN)
            product = tl.dot(w.to(y_j.dtype), y_j, product, input_precision=PRECISION)

    rows = i + tl.arange(0, BLOCK_M)
    columns = d + tl.arange(0, BLOCK_D)
    at = (split.to(tl.int64) * 2 * n + rows)[:, None] * D + columns[None, :]
    tl.store(product_ptr + at, product, mask=(rows < i_end)[:, None] & (columns < D)[None, :])


def grad_matmul(y: Tensor, g: Tensor, a: Tensor, b: Tensor, temperature: Tensor, precision: str) -> Tensor:
    """Partial products (splits, 2n, pitch) float32 of this rank's rows with those of all ranks.

    y (M, pitch) and g (M,) are from `rows.scale_rows`, a (2n,) of this rank's and b (M,) of all rows from
    `rows.row_losses`; `precision` of float32 rows is "tf32" or "ieee".
    """
    m, pitch = y.shape
    n = a.shape[0] // 2
    tile, splits = choose_tile("grad_matmul", y, precision, n, m)
    product = y.new_empty(splits, 2 * n, pitch, dtype=torch.float32)
    for form in launch_forms(temperature):
        grad_matmul_kernel[2 * triton.cdiv(n, tile.block_m), splits, triton.cdiv(pitch, tile.block_d)](
            *(y, g, a, b, temperature_argument(temperature), product, n, m, tile.all_tiles(n, m)),
            **tile.constants(n, pitch, precision, form["ONLINE"]),
            **form,
            BLOCK_D=tile.block_d,
        )
    return product
