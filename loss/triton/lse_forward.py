"""Log-sum-exp over the negatives of every row of this rank, in base 2, one product of all pairs:

    partial_i = log2 of the sum over j in a share of the columns, j not in {i, p(i)}, of 2^t_ij

The shares of a row are combined by `rows.row_losses`. The package docstring derives t.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import add_exponentials, load_rows, load_vector, own_rows, pair_tiles, similarities, tile_columns
from .temperature import is_online, launch_forms, temperature_argument
from .tiles import choose_tile


@triton.jit
def lse_forward_kernel(
    y_ptr,  # (M, D): x or its copy
    g_ptr,  # (M,) float32
    temperature,  # number or, if TAU_IS_POINTER, pointer
    partial_ptr,  # (splits, 2n) float32
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
    if TAU_IS_POINTER and is_online(temperature, TAU_IS_POINTER) != ONLINE:
        return  # the other form, launched as well, handles this temperature
    i, i_end, k_i = own_rows(n, BLOCK_M)
    first, pairs = pair_tiles(n, BLOCK_M, BLOCK_N)
    split, splits = tl.program_id(1), tl.num_programs(1)
    begin = first_tile + (last_tile - first_tile) * split // splits
    end = first_tile + (last_tile - first_tile) * (split + 1) // splits

    y_i = load_rows(y_ptr, i, i_end, 0, D, BLOCK_M, BLOCK_K, EVEN)
    g_i = load_vector(g_ptr, i, i_end, BLOCK_M, EVEN)
    high = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for PAIRS in tl.static_range(1, -1, -1):  # two loops: only the first few tiles hold pairs and need the comparison
        for u in tl.range(tl.maximum(begin, (1 - PAIRS) * pairs), tl.minimum(end, pairs) if PAIRS else end):
            j, j_end = tile_columns(u, first, n, M, BLOCK_N)
            y_j = load_rows(y_ptr, j, j_end, 0, D, BLOCK_N, BLOCK_K, EVEN)
            g_j = load_vector(g_ptr, j, j_end, BLOCK_N, EVEN)
            t = similarities(
                y_ptr, y_i, tl.trans(y_j), g_i, g_j, k_i, i, i_end, j, j_end, n,
                D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PAIRS, PRECISION,
            )  # fmt: skip
            high, total = add_exponentials(high, total, t, ONLINE)

    partial = tl.log2(total) + (high if ONLINE else 0.0)
    rows = i + tl.arange(0, BLOCK_M)
    tl.store(partial_ptr + split * 2 * n + rows, partial, mask=rows < i_end)


def lse_forward(y: Tensor, g: Tensor, temperature: Tensor, n: int, precision: str, *, own: bool) -> Tensor:
    """Partial log-sums (splits, 2n) in base 2 over this rank's `own` 2n columns, or over the M - 2n of the other ranks.

    y (M, pitch) and g (M,) are from `rows.scale_rows`; precision is "tf32" or "ieee", for float32 rows.
    """
    m, width = y.shape
    tile, splits = choose_tile("lse_forward", y, precision, n, 2 * n if own else m - 2 * n)
    first_tile, last_tile = (0, tile.own_tiles(n)) if own else (tile.own_tiles(n), tile.all_tiles(n, m))
    partial = y.new_empty(splits, 2 * n, dtype=torch.float32)
    for form in launch_forms(temperature):
        lse_forward_kernel[2 * triton.cdiv(n, tile.block_m), splits](
            *(y, g, temperature_argument(temperature), partial, n, m, first_tile, last_tile),
            **tile.constants(n, width, precision, form["ONLINE"]),
            **form,
        )
    return partial
