"""Record of a view: where its image is and what is done to it, as the host writes and the kernels read it."""

import numpy as np
import triton.language as tl
from torch import Tensor

from ..config import AugmentConfig
from ..params import CONTRAST, AugmentParams, affine_jitter

VIEW = np.dtype(
    [
        ("address", np.int64),  # of the first pixel of the crop
        ("row_stride", np.int32),  # in bytes, as the next two
        ("column_stride", np.int32),
        ("channel_stride", np.int32),
        ("height", np.int32),  # of the crop
        ("width", np.int32),
        ("flip", np.int32),
        ("sigma", np.float32),
        # exact jitter: the operations besides contrast and their amounts, in the order of the view
        ("operation", np.int32, 3),
        ("amount", np.float32, 3),
        ("before", np.int32),  # number of operations that precede contrast
        ("contrast", np.float32),
        ("gray", np.int32),
        # affine jitter
        ("matrix", np.float32, (3, 3)),
        ("mean_weight", np.float32),
    ],
    align=True,
)
NO_OPERATION = -1


def _word(name: str) -> tl.constexpr:
    return tl.constexpr(VIEW.fields[name][1] // 4)


# Positions in units of 32 bits
ROW_STRIDE, COLUMN_STRIDE, CHANNEL_STRIDE = map(_word, ("row_stride", "column_stride", "channel_stride"))
HEIGHT, WIDTH, FLIP, SIGMA = map(_word, ("height", "width", "flip", "sigma"))
OPERATION, AMOUNT, BEFORE, CONTRAST_FACTOR, GRAY = map(_word, ("operation", "amount", "before", "contrast", "gray"))
MATRIX, MEAN_WEIGHT = map(_word, ("matrix", "mean_weight"))
WORDS = tl.constexpr(VIEW.itemsize // 4)


def view_records(images: list[Tensor], params: AugmentParams, config: AugmentConfig) -> np.ndarray:
    """Records of V views of k images (3, H, W): (V k, WORDS) int32, view v of image i at v k + i."""
    channel, row, column = np.array([image.stride() for image in images]).T  # (k,) each
    top, left, height, width = np.moveaxis(params.crop, -1, 0)  # (V, k) each
    records = np.zeros(params.flip.shape, VIEW)
    records["address"] = np.array([image.data_ptr() for image in images]) + top * row + left * column
    records["row_stride"], records["column_stride"], records["channel_stride"] = row, column, channel
    records["height"], records["width"] = height, width
    records["flip"], records["sigma"] = params.flip, params.sigma
    if config.jitter == "exact":
        amounts = np.stack([params.brightness, params.contrast, params.saturation, params.hue], -1)  # (V, k, 4)
        neutral = amounts == np.float32([1, 1, 1, 0])
        order = params.order[params.order != CONTRAST].reshape(*params.flip.shape, 3).astype(np.int64)
        records["operation"] = np.where(np.take_along_axis(neutral, order, -1), NO_OPERATION, order)
        records["amount"] = np.take_along_axis(amounts, order, -1)
        records["before"] = (params.order == CONTRAST).argmax(-1)
        records["contrast"], records["gray"] = params.contrast, params.gray
    else:
        records["matrix"], records["mean_weight"] = affine_jitter(params)
    return records.ravel().view(np.int32).reshape(-1, WORDS.value)
