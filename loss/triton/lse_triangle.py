"""Sums over the negatives of every row among this rank's own 2n columns, from half of the pairs, as integers:

    sums_i = sum over own j, j not in {i, p(i)}, of 2^(places + t_ij)

t is symmetric, so a tile gives sums to its rows and to its columns. Other programs add to the same sums; additions of
integers in any order have the same result, those of floating-point numbers do not. The package docstring derives t.

Pairs are shared by going around in a circle: 2n rows in K strips of BLOCK_M, where strip 2c + v is block c of view v.
The program of strip s takes its own strip, then strips s + 1 to s + K / 2 modulo K; of two opposite strips, the first
takes their common tiles. All programs have the same work, up to one strip.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import load_rows, load_vector, similarities
from .rows import LN_2, LOG2_E
from .temperature import temperature_argument
from .tiles import MAX_SPLITS, chip, choose_tile, programs_at_once, tile_of


@triton.jit
def lse_triangle_kernel(
    y_ptr,  # (2n, D): x or its copy
    g_ptr,  # (2n,) float32
    sums_ptr,  # (2n,) int64: added to
    scale,  # 2^places
    n,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WGMMA: tl.constexpr,
):
    strip, strips = tl.program_id(0), tl.num_programs(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    TILES: tl.constexpr = BLOCK_M // BLOCK_N  # of a strip
    tiles = (strips // 2 + (strip < strips // 2).to(tl.int32)) * TILES
    pairs = (2 - strip % 2) * TILES  # the first tiles hold self-pairs and, from the first view on, positives
    begin, end = tiles * split // splits, tiles * (split + 1) // splits
    i, i_end = (strip % 2) * n + (strip // 2) * BLOCK_M, (strip % 2 + 1) * n

    # A tile is t_ji: tensor cores keep its rows in different threads, so that sums over j would take many exchanges of
    # registers. They are left to the end, except for that of rows 8 apart, which one thread holds. Sums over i are not.
    y_i = load_rows(y_ptr, i, i_end, 0, D, BLOCK_M, BLOCK_K, EVEN)
    if WGMMA:  # reads operands from shared memory, to which Triton 3.9 would copy y_i again for every tile
        y_i = tl.trans(y_i)
    g_i = load_vector(g_ptr, i, i_end, BLOCK_M, EVEN)
    total_i = tl.zeros((BLOCK_N // 16, 8, BLOCK_M), tl.float32)
    for PAIRS in tl.static_range(1, -1, -1):
        for u in tl.range(tl.maximum(begin, (1 - PAIRS) * pairs), tl.minimum(end, pairs) if PAIRS else end):
            other = strip + u // TILES
            other = tl.where(other < strips, other, other - strips)
            k = (other // 2) * BLOCK_M + (u % TILES) * BLOCK_N
            k_j = k + tl.arange(0, BLOCK_N)
            j, j_end = (other % 2) * n + k, (other % 2 + 1) * n
            y_j = load_rows(y_ptr, j, j_end, 0, D, BLOCK_N, BLOCK_K, EVEN)
            g_j = load_vector(g_ptr, j, j_end, BLOCK_N, EVEN)
            t = similarities(
                y_ptr, y_j, y_i if WGMMA else tl.trans(y_i), g_j, g_i, k_j, j, j_end, i, i_end, n,
                D, BLOCK_N, BLOCK_M, BLOCK_K, EVEN, PAIRS, PRECISION,
            )  # fmt: skip
            rows = j + tl.arange(0, BLOCK_N)
            if not EVEN:
                t += tl.where(rows < j_end, 0.0, -float("inf"))[:, None]
            w = tl.exp2(t)  # (BLOCK_N, BLOCK_M)
            total_i += tl.sum(tl.reshape(w, (BLOCK_N // 16, 2, 8, BLOCK_M)), axis=1)
            sums_j = (tl.sum(w, axis=1) * scale).to(tl.int64)
            other_strip = u >= TILES  # the program's own strip holds its pairs twice
            tl.atomic_add(sums_ptr + rows, sums_j, mask=(rows < j_end) & other_strip, sem="relaxed")

    sums_i = (tl.sum(tl.reshape(total_i, (BLOCK_N // 2, BLOCK_M)), axis=0) * scale).to(tl.int64)
    rows = i + tl.arange(0, BLOCK_M)
    tl.atomic_add(sums_ptr + rows, sums_i, mask=rows < i_end, sem="relaxed")


def lse_triangle(y: Tensor, g: Tensor, sums: Tensor, places: int, n: int, precision: str) -> None:
    """Add to sums (2n,) int64 the sums over this rank's 2n columns, times 2^places.

    y (M, pitch), g (M,) and the zeros in `sums` are from `rows.scale_rows`, `places` from `triangle_places`.
    """
    tile, splits = choose_tile("lse_triangle", y, precision, n, n)
    here = chip(y.device)
    lse_triangle_kernel[2 * triton.cdiv(n, tile.block_m), splits](
        *(y, g, sums, 2.0**places, n),
        **tile.constants(n, y.shape[1], precision, online=False),
        WGMMA=here is not None and uses_wgmma(here.architecture, y.dtype, precision),
    )


def uses_wgmma(architecture: str, dtype: torch.dtype, precision: str) -> bool:
    return architecture == "sm_90" and (dtype != torch.float32 or precision == "tf32")


def triangle_places(x: Tensor, temperature: Tensor, n: int, precision: str) -> int | None:
    """Binary places of the integers for rows x (M, D), 2n of them on this rank; None where `lse_forward` must run.

    |t_ij| <= T = log2(e) / tau, so a sum over 2n - 2 negatives is between (2n - 2) 2^-T and (2n - 2) 2^T. With 62.9 -
    log2(2n - 2) - T places, rounded down, it stays below 2^63; the tenth is for rounding errors of t and of the terms.
    A row receives one number from every strip that takes its own, which are at most half of all, and one from every
    split. Each of these A numbers is cut by less than one unit. At worst, all negatives of a row are opposite to it,
    and the base-2 logarithm of its sum is off by

        A 2^-places / ((2n - 2) 2^-T ln 2)

    Integers are used where this is at most 2^-24 T, the rounding of a single t_ij of that row in float32: with strips
    of 128 rows down to tau = 0.077 at 2n = 2048, 0.080 at 8192 and 0.086 at 65536. They are not used for a temperature
    on the device, which the host does not know, where the device runs all tiles of the square at once, so that half as
    many would take as long, and on chips with tensor memory: their layout of a tile makes the kernel spill registers.
    """
    if (here := chip(x.device)) is not None and here.tensor_memory:
        return None
    tile, tau = tile_of("lse_triangle", x, precision), temperature_argument(temperature)
    square = 2 * triton.cdiv(n, tile.block_m) * tile.own_tiles(n)
    if isinstance(tau, Tensor) or square <= programs_at_once(tile, x.device, n) or tile.block_m % tile.block_n:
        return None
    largest, terms = LOG2_E.value / tau, 2 * n - 2
    if not largest < 63:  # nan as well
        return None
    places = math.floor(62.9 - math.log2(terms) - largest)
    numbers = triton.cdiv(n, tile.block_m) + MAX_SPLITS
    error = numbers * 2.0 ** (largest - places) / (terms * LN_2.value)
    return places if error <= 2**-24 * largest else None
