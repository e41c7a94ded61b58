"""Compiled functions that render views of 8-bit RGB images.

At 32 px the calls of OpenCV that a view needs, about ten, take several times as long as the arithmetic inside them; at
224 px its conversion to HSV and torch's resizing are slower than compiled loops. Numba compiles the functions for the
processor at hand when they are first needed and stores the result next to this file or, if that folder is read-only, in
the user's cache. All compiled functions are in this file, because Numba compiles again only if the file of the entry
point changes; of params.py they use constants, which do not change.

Resizing, each operation of the exact jitter, the affine map, grayscale and blur are computed in float32, round to whole
levels, halves to even, and clip to 0..255, as PIL does. Views are independent of each other. No sum is reordered and no
multiplication fused with an addition (there is no `fastmath`), so that views depend neither on the slices and threads
that compute them nor, among x86-64 processors, on the processor.

Between the operations a view is uint8, which the second-level cache holds at 224 px. Its planes are transposed,
(3, x, y): the result of resizing comes in columns.
"""

import math

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..common import compiled
from ..images.files import DecodeError
from .config import AugmentConfig
from .params import BRIGHTNESS, CONTRAST, LUMA, SATURATION, AugmentParams, affine_jitter

VIEW = np.dtype(
    [
        ("crop", np.int32, 4),
        ("order", np.uint8, 4),
        ("flip", np.bool_),
        ("gray", np.bool_),
        ("recolor", np.bool_),  # whether the jitter or grayscale changes the view
        ("brightness", np.float32),
        ("contrast", np.float32),
        ("saturation", np.float32),
        ("hue", np.float32),
        ("sigma", np.float32),
        ("matrix", np.float32, (3, 3)),  # of `affine_jitter`, like the mean weight
        ("mean_weight", np.float32),
    ],
    align=True,
)
"""Parameters of one view, with the names of `AugmentParams`."""
RED, GREEN, BLUE = (np.float32(weight) for weight in LUMA)
ZERO, ONE, TWO, THREE, FOUR, FIVE, SIX = map(np.float32, range(7))
BLOCK_BYTES = 400_000
"""Size of the lines that are resized at once: fewer have more overhead, more exceed the second-level cache."""
PART = 1024
"""Pixels that are jittered or blurred at once: their float32 values stay in the first-level cache."""
ROUND = np.float32(1.5 * 2**23)
"""x + ROUND - ROUND rounds 0 <= x <= 255 to an integer, because float32 has no fractions from 2**23 on."""


class CompiledViews:
    """Views of 8-bit RGB images; compiles in the constructor, so that no batch has to wait.

    Args:
        config: augmentation options, with a mean and a standard deviation.
    """

    def __init__(self, config: AugmentConfig):
        self.affine, self.window = config.jitter == "affine", config.blur_window
        mean, std = (np.broadcast_to(np.float64(values), 3) for values in (config.mean, config.std))
        self.scale, self.offset = np.float32(1 / (255 * std)), np.float32(-mean / std)
        nothing = np.empty((0, config.size, config.size, 3), np.float32)
        self(np.empty((1, 0), VIEW), nothing, slice(0, 0), [])

    def table(self, params: AugmentParams) -> np.ndarray:
        """Parameters of V views of n images as (V, n) `VIEW`."""
        table = np.zeros(params.flip.shape, VIEW)
        for name in ("crop", "order", "flip", "gray", "brightness", "contrast", "saturation", "hue", "sigma"):
            table[name] = getattr(params, name)
        if self.affine:
            table["matrix"], table["mean_weight"] = affine_jitter(params)
        table["recolor"] = params.jittered | params.gray
        return table

    def __call__(self, table: np.ndarray, out: np.ndarray, part: slice, images: list[np.ndarray]) -> None:
        """Write all views of some images into a batch; the global interpreter lock is released meanwhile.

        Args:
            table: (V, n) `VIEW` of all images, from `table`.
            out: (V n, S, S, 3) float32, or uint16 for the bit patterns of bfloat16.
            part: which of the n images.
            images: these, (H, W, 3) uint8 each.

        Raises:
            DecodeError: an image is smaller than a crop; `args[1]` is its position among the n images.
        """
        expected = len(out) == table.size and len(images) == part.stop - part.start
        if not expected or any(x.dtype != np.uint8 or x.shape[2:] != (3,) for x in images):
            raise ValueError(f"{table.size} views of (H, W, 3) uint8 images are expected in a batch of {len(out)}.")
        images = [np.ascontiguousarray(image) for image in images]
        places = [(image.__array_interface__["data"][0], *image.shape[:2]) for image in images]
        places = np.array(places, np.int64).reshape(-1, 3)
        out = out.view(np.uint16)
        bad = _render(table, part.start, places, self.affine, self.window, self.scale, self.offset, out)
        if bad >= 0:
            raise DecodeError("the image is smaller than its index says", bad)


@compiled()
def _render(views, first, images, affine, window, scale, offset, out):
    """Write all views of some images into a batch.

    Args:
        views: (V, n) `VIEW`, all views of the batch.
        first: position of the first of these images among the n of the batch.
        images: (k, 3) int64, address, height and width of each; 8-bit RGB without gaps between lines.
        affine: whether the jitter is affine.
        window: side of the blur kernel, odd, at most S.
        scale, offset: (3,) float32; a level x of a channel becomes scale x + offset.
        out: (V n, S, S, 3) uint16, bit patterns of bfloat16, or (V n, S, S, 6), those of float32 in halves.

    Returns:
        Position of the first image that is smaller than one of its crops; -1 if there is none.
    """
    size = out.shape[1]
    levels = np.empty((3, size, size), np.uint8)
    for k in range(images.shape[0]):
        address, height, width = images[k]
        i = first + k
        for v in range(views.shape[0]):
            view = views[v, i]
            top, left, crop_height, crop_width = view.crop
            if min(top, left, crop_height, crop_width) < 0 or top + crop_height > height or left + crop_width > width:
                return i
            _resized_crop(view, address, 3 * width, levels)
            if view.recolor:
                if affine:
                    _recolor(levels.reshape(3, -1), view)
                else:
                    _jitter(levels.reshape(3, -1), view)
            if view.sigma > 0:
                _blur(levels, view.sigma, window)
            _normalize(levels, scale, offset, out[v * views.shape[1] + i])
    return -1


@intrinsic
def _pointer(typing_context, address):
    """Convert an address (int64) to a pointer, which `carray` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def _at(typing_context, array, i):
    """Pointer to value i of a contiguous array, which must stay in use."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return types.CPointer(array.dtype)(array, i), generate


@intrinsic
def _transpose(typing_context, source, pitch, target, target_pitch):
    """Transpose 8 x 8 values; `source` and `target` are pointers, the pitches are in values (int64).

    Loops would be compiled to moves of single values, which take three times as long.
    """

    def generate(context, builder, signature, arguments):
        source, pitch, target, target_pitch = arguments
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), 8)
        low, high = (
            ir.Constant(ir.VectorType(ir.IntType(32), 8), [half + i // 2 + 8 * (i % 2) for i in range(8)])
            for half in (0, 4)
        )

        def line(start, pitch, i):
            address = builder.gep(start, [builder.mul(pitch, pitch.type(i))])
            return builder.bitcast(address, vector.as_pointer())

        lines = [builder.load(line(source, pitch, i), align=1) for i in range(8)]
        for _ in range(3):  # a perfect shuffle of the 64 values, which thrice is the transposition
            lines = [builder.shuffle_vector(lines[i // 2], lines[i // 2 + 4], high if i % 2 else low) for i in range(8)]
        for i in range(8):
            builder.store(lines[i], line(target, target_pitch, i), align=1)
        return context.get_dummy_value()

    return types.void(source, pitch, target, target_pitch), generate


@njit
def _level(x):
    """Round to whole levels and clip."""
    x = x if x > np.float32(0) else np.float32(0)
    x = x if x < np.float32(255) else np.float32(255)
    return (x + ROUND) - ROUND


@njit
def _resized_crop(view, address, pitch, levels):
    """Crop, resize by antialiased bicubic interpolation and flip into `levels` (3, S, S).

    The view is computed in blocks of lines. Each is resized vertically and transposed, and then stays in the cache
    while it is resized horizontally, all of its lines and channels at once.

    Args:
        view: `VIEW`.
        address: of the image's first byte.
        pitch: bytes from one line of the image to the next.
        levels: output, uint8.
    """
    size = levels.shape[1]
    top, left, height, width = view.crop
    first = address + top * pitch + left * 3
    down, across = _taps(height, size), _taps(width, size)
    blocks = math.ceil(12 * size * (width + 3) / BLOCK_BYTES)
    most = 8 * math.ceil(size / (8 * blocks))  # lines of a block, a multiple of 8
    lines = np.zeros((8, 3 * width + 7), np.float32)
    columns = np.empty((width + 3, 3 * most), np.float32)  # pixel of the crop -> channel and line of the view
    sums = np.empty(3 * most, np.float32)
    for block in range(0, size, most):
        count = min(most, size - block)
        for eight in range(0, count, 8):
            for y in range(min(8, count - eight)):
                _mix_lines(first, pitch, down, block + eight + y, lines[y, : 3 * width])
            for j in range(0, 3 * width, 8):
                _transpose(_at(lines, j), lines.shape[1], _at(columns, j * most + eight), most)
        for x in range(size):
            _mix_columns(columns, across, x, sums)
            for channel in range(3):
                column = levels[channel, size - 1 - x if view.flip else x, block : block + count]
                values = sums[channel * most :]
                for y in range(count):
                    column[y] = np.uint8(_level(values[y]))


@njit
def _mix_lines(first, pitch, taps, y, line):
    """Interpolate line y of a view from lines of the image; `first` is the address of the crop.

    Like `_mix_columns`, takes four lines at a time and then two, so that the sums are seldom loaded and stored. Weights
    behind the last one are 0.
    """
    start, weights = taps[0][y], taps[2][y]
    last = start + taps[1][y] - 1
    p, q = _line(first, pitch, start, line.size), _line(first, pitch, min(start + 1, last), line.size)
    r = _line(first, pitch, min(start + 2, last), line.size)
    s = _line(first, pitch, min(start + 3, last), line.size)
    a, b, c, d = weights[0], weights[1], weights[2], weights[3]
    for j in range(line.size):
        line[j] = (a * np.float32(p[j]) + b * np.float32(q[j])) + (c * np.float32(r[j]) + d * np.float32(s[j]))
    for k in range(4, last + 1 - start, 2):
        p = _line(first, pitch, start + k, line.size)
        q = _line(first, pitch, min(start + k + 1, last), line.size)
        a, b = weights[k], weights[k + 1]
        for j in range(line.size):
            line[j] += a * np.float32(p[j]) + b * np.float32(q[j])


@njit
def _mix_columns(columns, taps, x, sums):
    """Interpolate column x of a block of a view from columns of the crop."""
    start, weights = taps[0][x], taps[2][x]
    last = start + taps[1][x] - 1
    p, q = columns[start], columns[min(start + 1, last)]
    r, s = columns[min(start + 2, last)], columns[min(start + 3, last)]
    a, b, c, d = weights[0], weights[1], weights[2], weights[3]
    for j in range(sums.size):
        sums[j] = (a * p[j] + b * q[j]) + (c * r[j] + d * s[j])
    for k in range(4, last + 1 - start, 2):
        p, q = columns[start + k], columns[min(start + k + 1, last)]
        a, b = weights[k], weights[k + 1]
        for j in range(sums.size):
            sums[j] += a * p[j] + b * q[j]


@njit
def _line(first, pitch, y, count):
    """First `count` bytes of line y of the crop at address `first`."""
    return carray(_pointer(first + y * pitch), (count,), np.uint8)


@njit
def _taps(length, size):
    """Weights of an antialiased bicubic interpolation from `length` to `size` pixels, a = -0.5 as in PIL.

    Computed in float64 as in ATen's `_compute_indices_min_size_weights_aa`.

    Returns:
        For each of the `size` pixels the first pixel that contributes, their number, and their weights (float32), with
        at least one 0 behind them.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2 * stretch
    starts, counts = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, 2 * math.ceil(support) + 2), np.float32)
    exact = np.empty(weights.shape[1])
    for i in range(size):
        center = scale * (i + 0.5)
        start = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), length) - start
        total = 0.0
        for k in range(count):
            t = abs((start + k - center + 0.5) / stretch)
            exact[k] = (1.5 * t - 2.5) * t * t + 1 if t < 1 else ((-0.5 * t + 2.5) * t - 4) * t + 2 if t < 2 else 0.0
            total += exact[k]
        for k in range(count):
            weights[i, k] = exact[k] / total
        starts[i], counts[i] = start, count
    return starts, counts, weights


@njit
def _jitter(levels, view):
    """Apply the exact jitter, in the order of the view, and grayscale to levels (3, S S).

    Contrast is the one operation that depends on other pixels: those before it are applied to all pixels first.
    """
    split = 0
    while split < 4 and view.order[split] != CONTRAST:
        split += 1
    if split > 0:
        _apply(levels, view, view.order[:split], np.float32(0), False)
    _apply(levels, view, view.order[split:], _mean_gray(levels), view.gray)


@njit
def _apply(levels, view, operations, mean, gray):
    """Apply operations of the jitter to levels (3, S S) whose mean gray is `mean`."""
    x = np.zeros((3, PART), np.float32)
    for first in range(0, levels.shape[1], PART):
        last = min(first + PART, levels.shape[1])
        for channel in range(3):
            _convert(levels[channel, first:last], x[channel])
        for operation in operations:
            if operation == BRIGHTNESS:
                if view.brightness != 1:
                    _scale(x, view.brightness, np.float32(0))
            elif operation == CONTRAST:
                if view.contrast != 1:
                    _scale(x, view.contrast, (np.float32(1) - view.contrast) * mean)
            elif operation == SATURATION:
                if view.saturation != 1:
                    _saturate(x, view.saturation)
            elif view.hue != 0:
                _shift_hue(x, view.hue)
        if gray:
            _gray(x)
        for channel in range(3):
            values, target = x[channel], levels[channel, first:last]
            for p in range(target.size):
                target[p] = np.uint8(values[p])


@njit
def _scale(x, factor, offset):
    values = x.reshape(-1)
    for p in range(values.size):
        values[p] = _level(factor * values[p] + offset)


@njit
def _mean_gray(levels):
    """Mean gray of levels (3, S S); sums of integers are exact."""
    red, green, blue = 0, 0, 0
    for p in range(levels.shape[1]):
        red += levels[0, p]
        green += levels[1, p]
        blue += levels[2, p]
    return np.float32((LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue) / levels.shape[1])


@njit
def _saturate(x, factor):
    rest = np.float32(1) - factor
    for p in range(x.shape[1]):
        red, green, blue = x[0, p], x[1, p], x[2, p]
        gray = rest * (RED * red + GREEN * green + BLUE * blue)
        x[0, p], x[1, p], x[2, p] = (
            _level(factor * red + gray),
            _level(factor * green + gray),
            _level(factor * blue + gray),
        )


@njit
def _shift_hue(x, turns):
    """Shift the hue in HSV, whose hue is in sixths of a turn here."""
    shift = np.float32(6 * (turns - math.floor(turns)))
    for p in range(x.shape[1]):
        red, green, blue = x[0, p], x[1, p], x[2, p]
        high, low = _larger(red, _larger(green, blue)), _smaller(red, _smaller(green, blue))
        chroma = high - low
        unit = ONE / (chroma if chroma > ZERO else ONE)
        of_red, of_green, of_blue = (green - blue) * unit, (blue - red) * unit + TWO, (red - green) * unit + FOUR
        hue = of_red if high == red else of_green if high == green else of_blue
        hue += shift
        hue = hue + SIX if hue < ZERO else hue
        hue = hue - SIX if hue >= SIX else hue
        x[0, p] = _level(high - chroma * _share(hue + FIVE))
        x[1, p] = _level(high - chroma * _share(hue + THREE))
        x[2, p] = _level(high - chroma * _share(hue + ONE))


@njit
def _share(k):
    """Share of the chroma that a channel lacks, at 0 <= k < 12 sixths of a turn."""
    k = k - SIX if k >= SIX else k
    share = _smaller(k, FOUR - k)
    return _larger(ZERO, _smaller(ONE, share))


@njit
def _larger(a, b):  # unlike max, without a case for nan, so that loops are vectorized
    return a if a > b else b


@njit
def _smaller(a, b):
    return a if a < b else b


@njit
def _gray(x):
    for p in range(x.shape[1]):
        x[0, p] = x[1, p] = x[2, p] = _level(RED * x[0, p] + GREEN * x[1, p] + BLUE * x[2, p])


@njit
def _recolor(levels, view):
    """Apply the map of `affine_jitter` to levels (3, S S)."""
    (rr, rg, rb), (gr, gg, gb), (br, bg, bb) = view.matrix
    offset = view.mean_weight * _mean_gray(levels)
    for p in range(levels.shape[1]):
        red, green, blue = np.float32(levels[0, p]), np.float32(levels[1, p]), np.float32(levels[2, p])
        levels[0, p] = np.uint8(_level(rr * red + rg * green + rb * blue + offset))
        levels[1, p] = np.uint8(_level(gr * red + gg * green + gb * blue + offset))
        levels[2, p] = np.uint8(_level(br * red + bg * green + bb * blue + offset))


@njit
def _blur(levels, sigma, window):
    """Blur (3, S, S) by a Gaussian, reflecting at the edges without repeating the last pixel.

    A narrow Gaussian does not need the whole window: the weights beyond 4 sigma contribute less than 1/20 of a level.
    """
    size, radius = levels.shape[1], min(window // 2, math.ceil(4 * sigma))
    if radius == 0:  # a window of one pixel
        return
    weights = np.zeros(radius + 4, np.float32)  # from the center, and three of 0
    total = 1.0
    for k in range(1, radius + 1):
        total += 2 * math.exp(-k * k / (2.0 * sigma * sigma))
    for k in range(radius + 1):
        weights[k] = math.exp(-k * k / (2.0 * sigma * sigma)) / total
    edge = radius + 3
    pitch = 16 * math.ceil((size + 2 * edge) / 16)  # whole cache lines, so that loads of neighboring lines are aligned
    plane = np.zeros((size + 2 * edge, pitch), np.float32)  # a channel with its reflections
    together = max(1, PART // size)  # lines of the plane that are filtered by one call, for less overhead
    lines, sums = np.zeros((together + 2) * pitch, np.float32), np.empty(together * pitch, np.float32)
    for channel in range(3):
        for x in range(size):
            _convert(levels[channel, x], plane[edge + x, edge : edge + size])
        for k in range(1, edge + 1):
            plane[edge - k], plane[edge + size - 1 + k] = plane[edge + k], plane[edge + size - 1 - k]
        for x in range(0, size, together):
            count = min(together, size - x)
            _filter(plane.reshape(-1), (edge + x) * pitch, pitch, weights, lines[pitch : (count + 1) * pitch])
            for line in range(1, count + 1):
                first, last = line * pitch + edge, line * pitch + edge + size - 1
                for k in range(1, radius + 1):
                    lines[first - k], lines[last + k] = lines[first + k], lines[last - k]
            _filter(lines, pitch, 1, weights, sums[: count * pitch])
            for line in range(count):
                target, values = levels[channel, x + line], sums[line * pitch + edge :]
                for y in range(size):
                    target[y] = np.uint8(_level(values[y]))


@njit
def _filter(source, first, step, weights, sums):
    """Filter symmetrically: value p of `sums` has its center at first + p of `source` and its neighbors each `step`."""
    count, center, weight = sums.size, source[first:], weights[0]
    for k in range(1, weights.size - 3, 4):  # four pairs at a time, so that the sums are seldom loaded and stored
        a, b = source[first - k * step :], source[first + k * step :]
        c, d = source[first - (k + 1) * step :], source[first + (k + 1) * step :]
        e, f = source[first - (k + 2) * step :], source[first + (k + 2) * step :]
        g, h = source[first - (k + 3) * step :], source[first + (k + 3) * step :]
        w, x, y, z = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        if k == 1:
            for p in range(count):
                sums[p] = (
                    weight * center[p] + w * (a[p] + b[p]) + x * (c[p] + d[p]) + y * (e[p] + f[p]) + z * (g[p] + h[p])
                )
        else:
            for p in range(count):
                sums[p] = sums[p] + w * (a[p] + b[p]) + x * (c[p] + d[p]) + y * (e[p] + f[p]) + z * (g[p] + h[p])


@njit
def _convert(levels, values):
    for p in range(levels.size):
        values[p] = np.float32(levels[p])


@njit
def _normalize(levels, scale, offset, out):
    """Normalize levels (3, x, y) into `out` (y, x, ...): (S, S, 3) for bfloat16 or (S, S, 6) for float32."""
    size = levels.shape[1]
    lines, values = np.empty((3, 8 * size), np.uint8), np.empty(24 * size, np.float32)
    for block in range(0, size, 8):
        top = min(block, size - 8)  # the last two blocks overlap if the size is not a multiple of 8
        for channel in range(3):
            for block_x in range(0, size, 8):
                left = min(block_x, size - 8)
                source = _at(levels, (channel * size + left) * size + top)
                _transpose(source, size, _at(lines, channel * 8 * size + left), size)
        part = out[top : top + 8].reshape(-1)
        if part.size == values.size:
            _scale_levels(lines, scale, offset, values)
            _round_to_bfloat16(values.view(np.uint32), part)
        else:
            _scale_levels(lines, scale, offset, part.view(np.float32))


@njit
def _scale_levels(levels, scale, offset, out):
    red, green, blue = levels[0], levels[1], levels[2]
    a, b, c = scale
    d, e, f = offset
    for p in range(red.size):
        out[3 * p] = a * np.float32(red[p]) + d
        out[3 * p + 1] = b * np.float32(green[p]) + e
        out[3 * p + 2] = c * np.float32(blue[p]) + f


@njit
def _round_to_bfloat16(bits, out):
    """Write bit patterns of float32 as those of bfloat16, which is the upper half, rounded to even."""
    half, one, sixteen = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    for p in range(bits.size):
        out[p] = np.uint16((bits[p] + half + ((bits[p] >> sixteen) & one)) >> sixteen)
