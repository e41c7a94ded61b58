"""Device functions for resizing and blur: matrices of filter weights, and products of a block of pixels with them.

Both filters are linear and separable, so a tile is D X A for pixels X: A (across) weighs columns and D (down) rows.
The products run on tensor cores in float16 with float32 sums. Weights are divided by the sum of the rounded weights,
and pixels are centered around zero, where float16 is finest: the result is exact to a few hundredths of a level.
"""

import triton
import triton.language as tl

from .color import clip
from .record import CHANNEL_STRIDE, COLUMN_STRIDE, FLIP, HEIGHT, ROW_STRIDE, WIDTH

MIDDLE = tl.constexpr(128.0)
"""Level that is subtracted from pixels; all differences are whole numbers up to 128, exact in float16."""


@triton.jit
def cubic(t):
    # Keys' cubic convolution with a = -1/2 at a distance |t|; zero from 2 on. Below 1, (1 - |t|)^2 (2 |t| - 1) is added
    # to the polynomial that holds from 1 to 2.
    t = tl.abs(t)
    s, u = tl.maximum(2 - t, 0.0), tl.maximum(1 - t, 0.0)
    return s * s * (0.5 * s - 0.5) + u * u * (1 - 2 * u)


@triton.jit
def line_scale(length, SIZE: tl.constexpr):
    # Scale of a line of `length` pixels that becomes SIZE pixels, and the factor that compresses distances: an enlarged
    # line uses the kernel as it is, a shrunk one a kernel as wide as the scale (antialiasing).
    scale = length.to(tl.float32) / SIZE
    return scale, 1 / tl.maximum(scale, 1.0)


@triton.jit
def source_range(first, end, length, SIZE: tl.constexpr):
    # Range of the pixels of a line of `length` pixels that pixels first ... end of SIZE depend on.
    scale, compress = line_scale(length, SIZE)
    begin = tl.floor((first + 0.5) * scale - 2 / compress).to(tl.int32)
    end = tl.ceil((end - 0.5) * scale + 2 / compress).to(tl.int32)
    return tl.maximum(begin, 0), tl.minimum(end, length)


@triton.jit
def resize_weights(out, at, length, SIZE: tl.constexpr):
    # Weight of pixel `at` of a line of `length` pixels in pixel `out` of SIZE, broadcast, float16, not normalized.
    scale, compress = line_scale(length, SIZE)
    return cubic((at + 0.5) * compress - (out + 0.5) * (scale * compress)).to(tl.float16)


@triton.jit
def inverse_weight_sums(out, begin, end, length, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros_like(out).to(tl.float32)
    for first in range(begin, end, BLOCK):
        at = (first + tl.arange(0, BLOCK))[None, :]
        weights = resize_weights(out[:, None], at, length, SIZE).to(tl.float32)
        total += tl.sum(tl.where(at < end, weights, 0.0), axis=1)
    return 1 / tl.where(total == 0, 1.0, total)  # pixels beyond SIZE may have no weights


@triton.jit
def resized_tile(record, i0, j0, SIZE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    # Crop, resize and flip: red, green and blue of rows i0 ... and columns j0 ... of a view, (TILE, TILE) in 0..1.
    image = tl.load(record.to(tl.pointer_type(tl.int64))).to(tl.pointer_type(tl.uint8))
    channel = tl.load(record + CHANNEL_STRIDE)
    height, width = tl.load(record + HEIGHT), tl.load(record + WIDTH)
    flip = tl.load(record + FLIP) != 0
    i, j = i0 + tl.arange(0, TILE), j0 + tl.arange(0, TILE)
    j = tl.where(flip, SIZE - 1 - j, j)
    i1, j1 = tl.minimum(i0 + TILE, SIZE), tl.minimum(j0 + TILE, SIZE)
    y_begin, y_end = source_range(i0, i1, height, SIZE)
    x_begin, x_end = source_range(tl.where(flip, SIZE - j1, j0), tl.where(flip, SIZE - j0, j1), width, SIZE)
    by_down = inverse_weight_sums(i, y_begin, y_end, height, SIZE, BLOCK)
    by_across = inverse_weight_sums(j, x_begin, x_end, width, SIZE, BLOCK)
    # One channel after the other: computing weights again takes less time than the registers for three would cost.
    r = resized_channel(image, record, i, j, y_begin, y_end, x_begin, x_end, by_down, by_across, SIZE, TILE, BLOCK)
    image += channel
    g = resized_channel(image, record, i, j, y_begin, y_end, x_begin, x_end, by_down, by_across, SIZE, TILE, BLOCK)
    image += channel
    b = resized_channel(image, record, i, j, y_begin, y_end, x_begin, x_end, by_down, by_across, SIZE, TILE, BLOCK)
    return r, g, b


@triton.jit
def resized_channel(
    image, record, i, j, y_begin, y_end, x_begin, x_end, by_down, by_across,
    SIZE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Pixels outside of the ranges are 0, so that their weights have no effect.
    row, column = tl.load(record + ROW_STRIDE), tl.load(record + COLUMN_STRIDE)
    height, width = tl.load(record + HEIGHT), tl.load(record + WIDTH)
    tile = tl.zeros((TILE, TILE), tl.float32)
    for y0 in range(y_begin, y_end, TILE):
        y = y0 + tl.arange(0, TILE)
        lines = tl.zeros((TILE, TILE), tl.float32)
        for x0 in range(x_begin, x_end, BLOCK):
            x = x0 + tl.arange(0, BLOCK)
            inside = (y < y_end)[:, None] & (x < x_end)[None, :]
            pixels = tl.load(image + (y[:, None] * row + x[None, :] * column), mask=inside, other=128)
            across = resize_weights(j[None, :], x[:, None], width, SIZE)  # (BLOCK, TILE)
            lines = tl.dot(pixels.to(tl.float16) - MIDDLE, across, lines)
        down = resize_weights(i[:, None], y[None, :], height, SIZE)  # (TILE, TILE)
        tile = tl.dot(down, (lines * by_across[None, :]).to(tl.float16), tile)
    levels = tile * by_down[:, None] + MIDDLE
    return clip(levels * (1 / 255))  # also NaN, of pixels beyond SIZE


@triton.jit
def gaussian(distance, falloff, radius):
    d = distance.to(tl.float32)
    return tl.where(tl.abs(d) <= radius, tl.exp2(-falloff * d * d), 0.0)


@triton.jit
def blur_parameters(sigma, WINDOW: tl.constexpr, WINDOW_PADDED: tl.constexpr):
    # log2(e) / (2 sigma^2), the largest distance with a weight and the sum of all weights of a pixel. Weights beyond
    # 4 sigma contribute less than 1/20 of a level.
    falloff = 0.7213475204444817 / (sigma * sigma)
    radius = tl.minimum(tl.ceil(4 * sigma).to(tl.int32), WINDOW // 2)
    distance = tl.arange(0, WINDOW_PADDED)
    weight = gaussian(distance, falloff, radius).to(tl.float16).to(tl.float32)
    return falloff, radius, tl.sum(tl.where(distance == 0, weight, 2 * weight), axis=0)


@triton.jit
def blur_weights(out, at, falloff, radius, SIZE: tl.constexpr):
    # Weight of pixel `at` in pixel `out`, broadcast, float16, not normalized. Pixels outside of the view are those
    # reflected at the middle of its first and last pixel, which adds their weights to those inside.
    weight = gaussian(at - out, falloff, radius)
    weight += tl.where(at > 0, gaussian(at + out, falloff, radius), 0.0)
    weight += tl.where(at < SIZE - 1, gaussian(2 * (SIZE - 1) - at - out, falloff, radius), 0.0)
    return tl.where(at < SIZE, weight, 0.0).to(tl.float16)
