"""Device functions of the kernels, each for one block of rows or one tile of pairs.

The package docstring defines the names.
"""

import triton
import triton.language as tl

SHORTEST_ROW = tl.constexpr(100 * 2.0**-63)  # 100 times the square root of the smallest normal float32


@triton.jit
def inverse_norm(x):
    # 1 / |x_i| (ROWS,). 0 for a zero row, which has no direction, and for a row whose square is near the smallest
    # normal number. NaN for a row whose square overflows, so that a diverged run stops.
    x = x.to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, axis=1))
    norm = tl.where(norm == float("inf"), float("nan"), norm)
    return tl.where(norm < SHORTEST_ROW, 0.0, 1 / norm)


@triton.jit
def power_of_two_above(g):
    # 2^e with g / 2^e in [1/2, 1), from the exponent bits of g
    exponent = (g.to(tl.int32, bitcast=True) >> 23) + 1
    return (tl.minimum(exponent, 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def own_rows(n, BLOCK_M: tl.constexpr):
    # Rows i ... i_end of this program, all of the same view, and the samples k_i (BLOCK_M,) they belong to.
    blocks = tl.cdiv(n, BLOCK_M)
    view = tl.program_id(0) // blocks
    k = (tl.program_id(0) % blocks) * BLOCK_M
    return view * n + k, (view + 1) * n, k + tl.arange(0, BLOCK_M)


@triton.jit
def pair_tiles(n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # Index of the first tile with self-pairs or positives of this program's rows, and their number. Each view's own
    # columns are tiled separately, and tile 2c + v is tile c of view v, so that these tiles are consecutive.
    k = (tl.program_id(0) % tl.cdiv(n, BLOCK_M)) * BLOCK_M
    c = k // BLOCK_N
    return 2 * c, 2 * (tl.cdiv(tl.minimum(k + BLOCK_M, n), BLOCK_N) - c)


@triton.jit
def tile_columns(u, first, n, M, BLOCK_N: tl.constexpr):
    # Columns j ... j_end of tile u in this program's order: tiles with pairs, other own columns, other ranks' columns.
    own_tiles = 2 * tl.cdiv(n, BLOCK_N)
    tile = (first + u) % own_tiles
    is_own = u < own_tiles
    j = tl.where(is_own, (tile % 2) * n + (tile // 2) * BLOCK_N, 2 * n + (u - own_tiles) * BLOCK_N)
    return j, tl.where(is_own, (tile % 2 + 1) * n, M)


@triton.jit
def load_rows(
    ptr, row, row_end, column, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr
):
    # (ROWS, COLUMNS) starting at (row, column), 0 outside
    r = tl.arange(0, ROWS)
    d = column + tl.arange(0, COLUMNS)
    pointers = ptr + row.to(tl.int64) * D + (r[:, None] * D + d[None, :])
    if EVEN and D % COLUMNS == 0:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(row + r < row_end)[:, None] & (d < D)[None, :], other=0.0)
    return x


@triton.jit
def load_vector(ptr, row, row_end, ROWS: tl.constexpr, EVEN: tl.constexpr):
    rows = row + tl.arange(0, ROWS)
    return tl.load(ptr + rows) if EVEN else tl.load(ptr + rows, mask=rows < row_end, other=0.0)


@triton.jit
def similarities(
    y_ptr, y_i, y_j_t, g_i, g_j, k_i, i, i_end, j, j_end, n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # t_ij = g_i g_j (x_i . x_j) (BLOCK_M, BLOCK_N), -inf outside the matrix and, if PAIRS, for two views of one sample.
    # y_i (BLOCK_M, BLOCK_K) and y_j_t (BLOCK_K, BLOCK_N) hold all D columns, or else are ignored and loaded in turn.
    if BLOCK_K >= D:
        dot = tl.dot(y_i, y_j_t, input_precision=PRECISION)
    else:
        dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for d in tl.range(0, D, BLOCK_K):
            y_i = load_rows(y_ptr, i, i_end, d, D, BLOCK_M, BLOCK_K, EVEN)
            y_j = load_rows(y_ptr, j, j_end, d, D, BLOCK_N, BLOCK_K, EVEN)
            dot = tl.dot(y_i, tl.trans(y_j), dot, input_precision=PRECISION)
    t = dot * g_i[:, None] * g_j[None, :]
    columns = tl.arange(0, BLOCK_N)
    if not EVEN:
        t += tl.where(j + columns < j_end, 0.0, -float("inf"))[None, :]
    if PAIRS:
        t = tl.where(k_i[:, None] == (j % n + columns)[None, :], -float("inf"), t)
    return t


@triton.jit
def add_exponentials(high, total, t, ONLINE: tl.constexpr):
    # Add sum_j 2^t_ij to total 2^high; high changes only if ONLINE
    if ONLINE:
        new_high = tl.maximum(high, tl.max(t, axis=1))
        finite = tl.where(new_high == -float("inf"), 0.0, new_high)
        total = total * tl.exp2(high - finite) + tl.sum(tl.exp2(t - finite[:, None]), axis=1)
        high = new_high
    else:
        total += tl.sum(tl.exp2(t), axis=1)
    return high, total
