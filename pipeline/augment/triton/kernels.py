"""Kernels: whole views in one program each, or tiles of views in two kernels."""

import triton
import triton.language as tl

from .color import after_mean, before_mean, load_float, to_gray
from .filters import blur_parameters, blur_weights, resized_tile
from .record import SIGMA, WORDS

LEVELS = tl.constexpr(65535)
"""White in the intermediate views, which have 16 bits per channel."""
BATCH = ("images", "view_stride")
"""Arguments that change in the last batch of an epoch, which must not be compiled for their divisors."""


@triton.jit(do_not_specialize=BATCH)
def whole_views_kernel(
    records_ptr,  # (V k, WORDS) int32
    out_ptr,  # (V, k, S, S, 3), view v at v * view_stride
    images,  # k
    view_stride,
    gain_r, gain_g, gain_b, shift_r, shift_g, shift_b,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_PADDED: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,  # at least SIZE
    BLOCK: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0)
    record = records_ptr + view * WORDS
    r, g, b = resized_tile(record, 0, 0, SIZE, TILE, BLOCK)
    r, g, b = before_mean(r, g, b, record, EXACT)
    mean = tl.sum(gray_inside(r, g, b, 0, 0, SIZE, TILE)) / (SIZE * SIZE)
    r, g, b = after_mean(r, g, b, record, mean, EXACT)
    sigma = load_float(record + SIGMA)
    if sigma > 0:
        falloff, radius, total = blur_parameters(sigma, WINDOW, WINDOW_PADDED)
        i = tl.arange(0, TILE)
        across = blur_weights(i[None, :], i[:, None], falloff, radius, SIZE)  # (TILE, TILE)
        down = blur_weights(i[:, None], i[None, :], falloff, radius, SIZE)
        scale = 1 / (total * total)
        r = blurred(r, across, down, scale)
        g = blurred(g, across, down, scale)
        b = blurred(b, across, down, scale)
    out = out_ptr + (view // images).to(tl.int64) * view_stride + (view % images).to(tl.int64) * SIZE * SIZE * 3
    store_tile(out, 0, 0, r, g, b, gain_r, gain_g, gain_b, shift_r, shift_g, shift_b, SIZE, TILE)


@triton.jit
def crop_kernel(
    records_ptr,  # (V k, WORDS) int32
    levels_ptr,  # (V k, 3, S, S) uint16: 65535 for 1
    gray_ptr,  # (V k, tiles) float32: sum of the gray of a tile
    SIZE: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # crop, resize, flip and the operations before contrast
    tile, view = tl.program_id(0), tl.program_id(1)
    record = records_ptr + view * WORDS
    i0, j0 = tile_origin(tile, SIZE, TILE)
    r, g, b = resized_tile(record, i0, j0, SIZE, TILE, BLOCK)
    r, g, b = before_mean(r, g, b, record, EXACT)
    i, j = i0 + tl.arange(0, TILE), j0 + tl.arange(0, TILE)
    inside = (i < SIZE)[:, None] & (j < SIZE)[None, :]
    pixel = levels_ptr + view.to(tl.int64) * 3 * SIZE * SIZE + i[:, None] * SIZE + j[None, :]
    tl.store(pixel, (r * LEVELS + 0.5).to(tl.uint16), mask=inside)
    tl.store(pixel + SIZE * SIZE, (g * LEVELS + 0.5).to(tl.uint16), mask=inside)
    tl.store(pixel + 2 * SIZE * SIZE, (b * LEVELS + 0.5).to(tl.uint16), mask=inside)
    tl.store(gray_ptr + view * tl.num_programs(0) + tile, tl.sum(gray_inside(r, g, b, i0, j0, SIZE, TILE)))


@triton.jit(do_not_specialize=BATCH)
def finish_kernel(
    records_ptr,  # (V k, WORDS) int32
    levels_ptr,  # (V k, 3, S, S) uint16
    gray_ptr,  # (V k, tiles) float32
    out_ptr,  # (V, k, S, S, 3), view v at v * view_stride
    images,  # k
    view_stride,
    gain_r, gain_g, gain_b, shift_r, shift_g, shift_b,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_PADDED: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # contrast and the operations behind it, grayscale, blur, normalization
    tile, view = tl.program_id(0), tl.program_id(1)
    record = records_ptr + view * WORDS
    levels = levels_ptr + view.to(tl.int64) * 3 * SIZE * SIZE
    every = tl.arange(0, TILES_PADDED)
    mean = tl.sum(tl.load(gray_ptr + view * TILES + every, mask=every < TILES, other=0.0)) / (SIZE * SIZE)
    i0, j0 = tile_origin(tile, SIZE, TILE)
    i, j = i0 + tl.arange(0, TILE), j0 + tl.arange(0, TILE)
    sigma = load_float(record + SIGMA)
    if sigma > 0:
        falloff, radius, total = blur_parameters(sigma, WINDOW, WINDOW_PADDED)
        y_begin, y_end = tl.maximum(i0 - radius, 0), tl.minimum(i0 + TILE + radius, SIZE)
        x_begin, x_end = tl.maximum(j0 - radius, 0), tl.minimum(j0 + TILE + radius, SIZE)
        r = tl.zeros((TILE, TILE), tl.float32)
        g = tl.zeros((TILE, TILE), tl.float32)
        b = tl.zeros((TILE, TILE), tl.float32)
        for y0 in range(y_begin, y_end, BLOCK):
            y = y0 + tl.arange(0, BLOCK)
            lines_r = tl.zeros((BLOCK, TILE), tl.float32)
            lines_g = tl.zeros((BLOCK, TILE), tl.float32)
            lines_b = tl.zeros((BLOCK, TILE), tl.float32)
            for x0 in range(x_begin, x_end, BLOCK):
                x = x0 + tl.arange(0, BLOCK)
                near_r, near_g, near_b = finished_pixels(levels, record, y, x, mean, SIZE, EXACT)
                across = blur_weights(j[None, :], x[:, None], falloff, radius, SIZE)  # (BLOCK, TILE)
                lines_r = tl.dot((near_r - 0.5).to(tl.float16), across, lines_r)
                lines_g = tl.dot((near_g - 0.5).to(tl.float16), across, lines_g)
                lines_b = tl.dot((near_b - 0.5).to(tl.float16), across, lines_b)
            down = blur_weights(i[:, None], y[None, :], falloff, radius, SIZE)  # (TILE, BLOCK)
            r = tl.dot(down, lines_r.to(tl.float16), r)
            g = tl.dot(down, lines_g.to(tl.float16), g)
            b = tl.dot(down, lines_b.to(tl.float16), b)
        scale = 1 / (total * total)
        r, g, b = r * scale + 0.5, g * scale + 0.5, b * scale + 0.5
    else:
        r, g, b = finished_pixels(levels, record, i, j, mean, SIZE, EXACT)
    out = out_ptr + (view // images).to(tl.int64) * view_stride + (view % images).to(tl.int64) * SIZE * SIZE * 3
    store_tile(out, i0, j0, r, g, b, gain_r, gain_g, gain_b, shift_r, shift_g, shift_b, SIZE, TILE)


@triton.jit
def tile_origin(tile, SIZE: tl.constexpr, TILE: tl.constexpr):
    across = tl.cdiv(SIZE, TILE)
    return tile // across * TILE, tile % across * TILE


@triton.jit
def gray_inside(r, g, b, i0, j0, SIZE: tl.constexpr, TILE: tl.constexpr):
    i, j = i0 + tl.arange(0, TILE), j0 + tl.arange(0, TILE)
    return tl.where((i < SIZE)[:, None] & (j < SIZE)[None, :], to_gray(r, g, b), 0.0)


@triton.jit
def blurred(x, across, down, scale):
    lines = tl.dot((x - 0.5).to(tl.float16), across)
    return tl.dot(down, lines.to(tl.float16)) * scale + 0.5


@triton.jit
def finished_pixels(levels, record, y, x, mean, SIZE: tl.constexpr, EXACT: tl.constexpr):
    # pixels of rows y and columns x of the intermediate view with their final colors, (len(y), len(x)) each
    inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
    pixel = levels + y[:, None] * SIZE + x[None, :]
    r = tl.load(pixel, mask=inside, other=0).to(tl.float32) * (1 / LEVELS)
    g = tl.load(pixel + SIZE * SIZE, mask=inside, other=0).to(tl.float32) * (1 / LEVELS)
    b = tl.load(pixel + 2 * SIZE * SIZE, mask=inside, other=0).to(tl.float32) * (1 / LEVELS)
    return after_mean(r, g, b, record, mean, EXACT)


@triton.jit
def store_tile(
    out, i0, j0, r, g, b, gain_r, gain_g, gain_b, shift_r, shift_g, shift_b, SIZE: tl.constexpr, TILE: tl.constexpr
):
    # normalize and write the pixels of a tile that are inside of the view
    i, j = i0 + tl.arange(0, TILE), j0 + tl.arange(0, TILE)
    inside = (i < SIZE)[:, None] & (j < SIZE)[None, :]
    pixel = out + (i[:, None] * SIZE + j[None, :]) * 3
    dtype = out.dtype.element_ty
    tl.store(pixel, (r * gain_r + shift_r).to(dtype), mask=inside)
    tl.store(pixel + 1, (g * gain_g + shift_g).to(dtype), mask=inside)
    tl.store(pixel + 2, (b * gain_b + shift_b).to(dtype), mask=inside)
