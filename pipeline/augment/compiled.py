"""Compiled functions for views of 8-bit RGB images: whole small views, and colors and normalization of larger ones.

At 32 px the calls of OpenCV that a view needs, about ten, take several times as long as the arithmetic inside them; at
224 px its conversion to HSV and its tables are slower than compiled loops. Numba compiles the functions for the
processor at hand when they are first needed and stores the result next to this file or, if that folder is read-only, in
the user's cache. All compiled functions are in this file, because Numba compiles again only if the file of the entry
point changes; of params.py they use constants, which do not change.

A view is computed in float32 planes, but resizing, each operation of the exact jitter, the affine map, grayscale and
blur round to whole levels, halves to even, and clip to 0..255, as PIL does. Views are independent of each other. No
sum is reordered and no multiplication fused with an addition (there is no `fastmath`), so that views depend neither on
the slices and threads that compute them nor, among x86-64 processors, on the processor.

Planes are transposed, (3, x, y): both passes of a separable filter then run along contiguous memory.
"""

import math
from collections.abc import Callable

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..images.files import DecodeError
from .config import AugmentConfig
from .params import BRIGHTNESS, CONTRAST, LUMA, SATURATION, AugmentParams, affine_jitter

VIEW = np.dtype(
    [
        ("address", np.int64),  # of the image's first byte
        ("pitch", np.int64),  # bytes from one line of the image to the next
        ("crop", np.int32, 4),
        ("order", np.uint8, 4),
        ("flip", np.bool_),
        ("gray", np.bool_),
        ("recolor", np.bool_),  # whether the affine map changes the view
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
"""One view: its image and its parameters, with the names of `AugmentParams`."""
RED, GREEN, BLUE = (np.float32(weight) for weight in LUMA)
ZERO, ONE, TWO, THREE, FOUR, FIVE, SIX = map(np.float32, range(7))
ROUND = np.float32(1.5 * 2**23)
"""x + ROUND - ROUND rounds 0 <= x <= 255 to an integer, because float32 has no fractions from 2**23 on."""


def _entry_point(function: Callable) -> Callable:
    """Compile without the global interpreter lock, and store the result where Numba can."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written: every process compiles
        return njit(nogil=True)(function)


class CompiledViews:
    """Small views of 8-bit RGB images; compiles in the constructor, so that no batch has to wait.

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
        """Parameters of V views of n images as (V, n) `VIEW`; the images are still missing."""
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
        if len(out) != table.size or any(x.dtype != np.uint8 or x.shape[2:] != (3,) for x in images):
            raise ValueError(f"{table.size} views of (H, W, 3) uint8 images are expected in a batch of {len(out)}.")
        images = [np.ascontiguousarray(image) for image in images]
        sizes = np.array([image.shape[:2] for image in images]).reshape(-1, 2)
        crop = table["crop"][:, part]
        inside = ((crop >= 0).all(-1) & (crop[..., :2] + crop[..., 2:] <= sizes).all(-1)).all(0)
        if not inside.all():
            raise DecodeError("the image is smaller than its index says", part.start + int(inside.argmin()))
        table["address"][:, part] = [image.__array_interface__["data"][0] for image in images]
        table["pitch"][:, part] = 3 * sizes[:, 1]
        _render(table, (part.start, part.stop), self.affine, self.window, self.scale, self.offset, out.view(np.uint16))


def exact_colors(pixels: np.ndarray, params: AugmentParams, v: int, i: int) -> np.ndarray:
    """Apply the exact jitter and grayscale to view v of image i: (S, S, 3) uint8 -> the same, or (S, S) if gray."""
    view = np.zeros(1, VIEW)
    for name in ("order", "gray", "brightness", "contrast", "saturation", "hue"):
        view[name] = getattr(params, name)[v, i]
    levels = np.empty(pixels.shape[: 2 if params.gray[v, i] else 3], np.uint8)
    _exact_colors(np.ascontiguousarray(pixels).reshape(-1), view, levels.reshape(-1))
    return levels


def compile_colors() -> None:
    """Compile what `exact_colors` and `normalize` need, so that no batch has to wait."""
    pixels, line = np.zeros(3, np.uint8), (ZERO, ZERO, ZERO)
    _exact_colors(pixels, np.zeros(1, VIEW), pixels)
    _normalize(pixels, line, line, np.empty(3, np.float32))


def normalize(
    levels: np.ndarray, scale: tuple[np.float32, ...], offset: tuple[np.float32, ...], out: np.ndarray
) -> None:
    """Write scale x + offset of levels x, (S, S, 3) or (S, S) uint8, into `out` (S, S, 3) float32."""
    _normalize(levels.reshape(-1), scale, offset, out.reshape(-1))


@_entry_point
def _exact_colors(pixels, view, levels):
    """Apply the exact jitter to (3 S S,) uint8; `levels` is (3 S S,) or, for a gray view, (S S,)."""
    count = pixels.size // 3
    x = np.empty((3, count), np.float32)
    red, green, blue = x[0], x[1], x[2]
    for p in range(count):
        red[p], green[p], blue[p] = pixels[3 * p], pixels[3 * p + 1], pixels[3 * p + 2]
    _jitter(x, view[0])
    if view[0].gray:
        _gray(x)
        for p in range(count):
            levels[p] = np.int32(red[p])
    else:
        for p in range(count):
            levels[3 * p] = np.int32(red[p])
            levels[3 * p + 1] = np.int32(green[p])
            levels[3 * p + 2] = np.int32(blue[p])


@_entry_point
def _normalize(levels, scale, offset, out):
    a, b, c = scale
    d, e, f = offset
    if 3 * levels.size == out.size:
        for p in range(levels.size):
            x = np.float32(levels[p])
            out[3 * p], out[3 * p + 1], out[3 * p + 2] = a * x + d, b * x + e, c * x + f
    else:
        for p in range(levels.size // 3):
            out[3 * p] = a * np.float32(levels[3 * p]) + d
            out[3 * p + 1] = b * np.float32(levels[3 * p + 1]) + e
            out[3 * p + 2] = c * np.float32(levels[3 * p + 2]) + f


@_entry_point
def _render(views, images, affine, window, scale, offset, out):
    """Write all views of some images into a batch.

    Args:
        views: (V, n) `VIEW`, all views of the batch, with the addresses of the images to render. They must be 8-bit RGB
            with contiguous lines that contain their crops.
        images: first and last + 1 of the images to render.
        affine: whether the jitter is affine.
        window: side of the blur kernel, odd, at most 2 S - 1.
        scale, offset: (3,) float32; a level x of a channel becomes scale x + offset.
        out: (V n, S, S, 3) uint16, bit patterns of bfloat16, or (V n, S, S, 6), those of float32 in halves.
    """
    size = out.shape[1]
    planes = np.empty((3, size, size), np.float32)
    filtered = np.empty((3, size, size), np.float32)
    for v in range(views.shape[0]):
        for i in range(images[0], images[1]):
            view = views[v, i]
            _resized_crop(view, planes)
            if affine:
                if view.recolor:
                    _recolor(planes.reshape(3, -1), view)
            else:
                _jitter(planes.reshape(3, -1), view)
                if view.gray:
                    _gray(planes.reshape(3, -1))
            if view.sigma > 0:
                _blur(planes, filtered, view.sigma, window)
            _store(planes, scale, offset, out[v * views.shape[1] + i])


@intrinsic
def _pointer(typing_context, address):
    """Convert an address (int64) to a pointer, which `carray` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit
def _level(x):
    """Round to whole levels and clip."""
    x = x if x > np.float32(0) else np.float32(0)
    x = x if x < np.float32(255) else np.float32(255)
    return (x + ROUND) - ROUND


@njit
def _resized_crop(view, planes):
    """Crop, resize by antialiased bicubic interpolation and flip into `planes` (3, S, S)."""
    size = planes.shape[1]
    top, left, height, width = view.crop
    first = view.address + top * view.pitch + left * 3
    starts, counts, weights = _taps(height, size)
    line = np.empty(3 * width, np.float32)
    columns = np.empty((3 * width, size), np.float32)  # the crop, resized to (S, 3 width), transposed
    for y in range(size):
        line[:] = 0
        for k in range(0, counts[y], 2):  # two lines at a time, which halves loads and stores of the sums
            even = carray(_pointer(first + (starts[y] + k) * view.pitch), (3 * width,), np.uint8)
            next_line = starts[y] + min(k + 1, counts[y] - 1)
            odd = carray(_pointer(first + next_line * view.pitch), (3 * width,), np.uint8)
            a, b = weights[y, k], weights[y, k + 1]  # b is 0 without a second line
            for j in range(3 * width):
                line[j] += a * np.float32(even[j]) + b * np.float32(odd[j])
        for j in range(3 * width):
            columns[j, y] = line[j]
    starts, counts, weights = _taps(width, size)
    for x in range(size):
        for channel in range(3):
            column = planes[channel, size - 1 - x if view.flip else x]
            column[:] = 0
            for k in range(0, counts[x], 2):
                even = columns[3 * (starts[x] + k) + channel]
                odd = columns[3 * (starts[x] + min(k + 1, counts[x] - 1)) + channel]
                a, b = weights[x, k], weights[x, k + 1]
                for y in range(size):
                    column[y] += a * even[y] + b * odd[y]
            for y in range(size):
                column[y] = _level(column[y])


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
def _jitter(x, view):
    """Apply the exact jitter to levels (3, S S), in the order of the view."""
    for operation in view.order:
        if operation == BRIGHTNESS:
            if view.brightness != 1:
                _scale(x, view.brightness, np.float32(0))
        elif operation == CONTRAST:
            if view.contrast != 1:
                _scale(x, view.contrast, (np.float32(1) - view.contrast) * _mean_gray(x))
        elif operation == SATURATION:
            if view.saturation != 1:
                _saturate(x, view.saturation)
        elif view.hue != 0:
            _shift_hue(x, view.hue)


@njit
def _scale(x, factor, offset):
    values = x.reshape(-1)
    for p in range(values.size):
        values[p] = _level(factor * values[p] + offset)


@njit
def _mean_gray(x):
    """Mean gray of levels (3, S S); sums of integers are exact."""
    red, green, blue = 0, 0, 0
    for p in range(x.shape[1]):
        red += int(x[0, p])
        green += int(x[1, p])
        blue += int(x[2, p])
    return np.float32((LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue) / x.shape[1])


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
def _recolor(x, view):
    """Apply the map of `affine_jitter` to levels (3, S S)."""
    (rr, rg, rb), (gr, gg, gb), (br, bg, bb) = view.matrix
    offset = view.mean_weight * _mean_gray(x)
    for p in range(x.shape[1]):
        red, green, blue = x[0, p], x[1, p], x[2, p]
        x[0, p] = _level(rr * red + rg * green + rb * blue + offset)
        x[1, p] = _level(gr * red + gg * green + gb * blue + offset)
        x[2, p] = _level(br * red + bg * green + bb * blue + offset)


@njit
def _blur(planes, filtered, sigma, window):
    """Blur (3, S, S) by a Gaussian, reflecting at the edges without repeating the last pixel."""
    size, radius = planes.shape[1], window // 2
    weights = np.empty(radius + 1, np.float32)  # from the center
    total = 1.0
    for k in range(1, radius + 1):
        total += 2 * math.exp(-k * k / (2.0 * sigma * sigma))
    for k in range(radius + 1):
        weights[k] = math.exp(-k * k / (2.0 * sigma * sigma)) / total
    line = np.empty(size + 2 * radius, np.float32)
    for channel in range(3):
        for x in range(size):
            column, center, weight = filtered[channel, x], planes[channel, x], weights[0]
            for y in range(size):
                column[y] = weight * center[y]
            for k in range(1, radius + 1):
                left, right = planes[channel, _reflected(x - k, size)], planes[channel, _reflected(x + k, size)]
                weight = weights[k]
                for y in range(size):
                    column[y] += weight * (left[y] + right[y])
        for x in range(size):
            for y in range(line.size):
                line[y] = filtered[channel, x, _reflected(y - radius, size)]
            column, center, weight = planes[channel, x], line[radius:], weights[0]
            for y in range(size):
                column[y] = weight * center[y]
            for k in range(1, radius + 1):
                up, down, weight = line[radius - k :], line[radius + k :], weights[k]
                for y in range(size):
                    column[y] += weight * (up[y] + down[y])
            for y in range(size):
                column[y] = _level(column[y])


@njit
def _reflected(place, size):
    place = abs(place)
    return 2 * (size - 1) - place if place >= size else place


@njit
def _store(planes, scale, offset, out):
    """Normalize levels (3, S, S) into `out`: (S, S, 3) for bfloat16 or (S, S, 6) for float32, see `_render`."""
    size = planes.shape[1]
    for channel in range(3):
        values, factor, shift = planes[channel].reshape(-1), scale[channel], offset[channel]
        for p in range(values.size):
            values[p] = factor * values[p] + shift
    bits = planes.view(np.uint32)
    if out.shape[2] == 3:  # bfloat16 is the upper half of float32, rounded to even
        half, one, sixteen = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
        values = bits.reshape(-1)
        for p in range(values.size):
            values[p] = (values[p] + half + ((values[p] >> sixteen) & one)) >> sixteen
        for y in range(size):
            for x in range(size):
                for channel in range(3):
                    out[y, x, channel] = bits[channel, x, y]
    else:
        whole = out.view(np.uint32)
        for y in range(size):
            for x in range(size):
                for channel in range(3):
                    whole[y, x, channel] = bits[channel, x, y]
