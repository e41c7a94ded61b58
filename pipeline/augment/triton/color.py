"""Device functions for the colors of a block of pixels: red, green and blue in 0..1, float32, of any one shape."""

import triton
import triton.language as tl

from .. import params
from .record import AMOUNT, BEFORE, CONTRAST_FACTOR, GRAY, MATRIX, MEAN_WEIGHT, OPERATION

BRIGHTNESS = tl.constexpr(params.BRIGHTNESS)
SATURATION = tl.constexpr(params.SATURATION)
HUE = tl.constexpr(params.HUE)
RED, GREEN, BLUE = map(tl.constexpr, params.LUMA.tolist())


@triton.jit
def load_float(word_ptr):
    return tl.load(word_ptr).to(tl.float32, bitcast=True)


@triton.jit
def clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def to_gray(r, g, b):
    return RED * r + GREEN * g + BLUE * b


@triton.jit
def shift_hue(r, g, b, turns):
    # In sixths of a turn, a channel is value - chroma * T(hue + its place), T a trapezoid of period 6: 0 at 0, 1 from 1
    # to 3, 0 from 4 to 6.
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    inverse = 1 / tl.where(chroma > 0, chroma, 1.0)
    not_red = tl.where(value == g, 2 + (b - r) * inverse, 4 + (r - g) * inverse)
    hue = tl.where(value == r, (g - b) * inverse, not_red) + 6 * turns
    return _on_wheel(value, chroma, hue + 5), _on_wheel(value, chroma, hue + 3), _on_wheel(value, chroma, hue + 1)


@triton.jit
def _on_wheel(value, chroma, place):
    place -= 6 * tl.floor(place * (1 / 6))
    return value - chroma * clip(tl.minimum(place, 4 - place))


@triton.jit
def apply_operations(r, g, b, record, first, last):
    # brightness, saturation and hue in the order of the view, clipped after each
    for k in range(first, last):
        operation = tl.load(record + OPERATION + k)
        amount = load_float(record + AMOUNT + k)
        if operation == BRIGHTNESS:
            r, g, b = clip(r * amount), clip(g * amount), clip(b * amount)
        elif operation == SATURATION:
            rest = (1 - amount) * to_gray(r, g, b)
            r, g, b = clip(r * amount + rest), clip(g * amount + rest), clip(b * amount + rest)
        elif operation == HUE:
            r, g, b = shift_hue(r, g, b, amount)
    return r, g, b


@triton.jit
def before_mean(r, g, b, record, EXACT: tl.constexpr):
    # what precedes the mean gray: the operations before contrast, or nothing in the affine jitter
    if EXACT:
        r, g, b = apply_operations(r, g, b, record, 0, tl.load(record + BEFORE))
    return r, g, b


@triton.jit
def after_mean(r, g, b, record, mean, EXACT: tl.constexpr):
    # contrast, the operations behind it and grayscale; or the affine map
    if EXACT:
        contrast = load_float(record + CONTRAST_FACTOR)
        rest = (1 - contrast) * mean
        r, g, b = clip(r * contrast + rest), clip(g * contrast + rest), clip(b * contrast + rest)
        r, g, b = apply_operations(r, g, b, record, tl.load(record + BEFORE), 3)
        if tl.load(record + GRAY) != 0:
            y = to_gray(r, g, b)
            r, g, b = y, y, y
    else:
        offset = load_float(record + MEAN_WEIGHT) * mean
        r, g, b = (
            _affine(r, g, b, record + MATRIX, offset),
            _affine(r, g, b, record + MATRIX + 3, offset),
            _affine(r, g, b, record + MATRIX + 6, offset),
        )
    return r, g, b


@triton.jit
def _affine(r, g, b, row_ptr, offset):
    return clip(load_float(row_ptr) * r + load_float(row_ptr + 1) * g + load_float(row_ptr + 2) * b + offset)
