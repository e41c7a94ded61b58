"""Records of the views for the kernels, and their launch."""

import numpy as np
import torch
import triton
from torch import Tensor

from ..config import AugmentConfig
from ..gpu import copy_to
from ..params import CONTRAST, AugmentParams, affine_jitter
from . import color
from .kernels import crop_kernel, finish_kernel, whole_views_kernel

TILE = 32
"""Side of a tile in pixels; a view of this size or smaller is one tile, which one program augments completely."""
BLOCK = 16
"""Number of pixels of a line that are multiplied with weights at a time. Smaller than a tile: Triton would give blocks
of both the same layout, in which neighboring threads do not read neighboring pixels of the image."""
WARPS = 4
REGISTERS = {"whole_views_kernel": 128, "crop_kernel": 128, "finish_kernel": 168}
"""Maximum per thread, so that four or three programs fit a multiprocessor."""


def render(images: list[Tensor], params: AugmentParams, config: AugmentConfig, out: Tensor) -> None:
    """Augment V views of k images on the current stream, without waiting for it.

    Args:
        images: (3, H, W) uint8 RGB each, of any strides, on the device of `out`.
        params: parameters of the V views.
        config: augmentation options.
        out: (V, k, 3, S, S), float32 or bfloat16; each out[v] is contiguous in channels-last order.
    """
    records = copy_to(out.device, view_records(images, params, config))
    views, size = len(records), config.size
    gain = [1 / std for std in config.std]
    shift = [-mean / std for mean, std in zip(config.mean, config.std, strict=True)]
    target = (out, len(images), out.stride(0), *gain, *shift)
    if size <= TILE:
        whole_views_kernel[(views,)](records, *target, **constants(whole_views_kernel, config))
        return
    tiles = triton.cdiv(size, TILE) ** 2
    levels = torch.empty((views, 3, size, size), dtype=torch.uint16, device=out.device)
    gray = torch.empty((views, tiles), dtype=torch.float32, device=out.device)
    crop_kernel[tiles, views](records, levels, gray, **constants(crop_kernel, config))
    finish_kernel[tiles, views](records, levels, gray, *target, **constants(finish_kernel, config))


def constants(kernel: triton.JITFunction, config: AugmentConfig) -> dict[str, int | bool]:
    """Compile-time arguments of a kernel and number of its warps."""
    tiles = triton.cdiv(config.size, TILE) ** 2
    values = {
        "SIZE": config.size,
        "WINDOW": config.blur_window,
        "WINDOW_PADDED": triton.next_power_of_2(config.blur_window),
        "EXACT": config.jitter == "exact",
        "TILE": TILE,
        "TILES": tiles,
        "TILES_PADDED": triton.next_power_of_2(tiles),
        "BLOCK": BLOCK,
    }
    options = {"num_warps": WARPS, "maxnreg": REGISTERS[kernel.__name__]}
    return {name: value for name, value in values.items() if name in kernel.arg_names} | options


def view_records(images: list[Tensor], params: AugmentParams, config: AugmentConfig) -> np.ndarray:
    """Everything the kernels need to know of each view: (V k, WORDS) int32, view v of image i at v k + i.

    The words are named in color.py; floats are stored by their bits.
    """
    channel, row, column = np.array([image.stride() for image in images]).T  # (k,) each
    top, left, height, width = np.moveaxis(params.crop, -1, 0)  # (V, k) each
    address = np.array([image.data_ptr() for image in images]) + top * row + left * column
    records = np.zeros((*params.flip.shape, color.WORDS.value), np.int32)
    floats = records.view(np.float32)
    records[..., :2] = address[..., None].view(np.int32)
    records[..., color.ROW_STRIDE.value], records[..., color.COLUMN_STRIDE.value] = row, column
    records[..., color.CHANNEL_STRIDE.value] = channel
    records[..., color.HEIGHT.value], records[..., color.WIDTH.value] = height, width
    records[..., color.FLIP.value] = params.flip
    floats[..., color.SIGMA.value] = params.sigma
    (_exact_words if config.jitter == "exact" else _affine_words)(params, records, floats)
    return records.reshape(-1, color.WORDS.value)


def _exact_words(params: AugmentParams, records: np.ndarray, floats: np.ndarray) -> None:
    amounts = np.stack([params.brightness, params.contrast, params.saturation, params.hue], -1)  # (V, k, 4)
    changes = amounts != np.float32([1, 1, 1, 0])
    order = params.order[params.order != CONTRAST].reshape(*params.flip.shape, 3).astype(np.int64)
    operation = slice(color.OPERATION.value, color.OPERATION.value + 3)
    amount = slice(color.AMOUNT.value, color.AMOUNT.value + 3)
    records[..., color.BEFORE.value] = (params.order == CONTRAST).argmax(-1)
    records[..., color.GRAY.value] = params.gray
    floats[..., color.CONTRAST.value] = params.contrast
    records[..., operation] = np.where(np.take_along_axis(changes, order, -1), order, color.NO_OPERATION)
    floats[..., amount] = np.take_along_axis(amounts, order, -1)


def _affine_words(params: AugmentParams, records: np.ndarray, floats: np.ndarray) -> None:
    matrix, floats[..., color.MEAN_WEIGHT.value] = affine_jitter(params)
    floats[..., color.MATRIX.value : color.MATRIX.value + 9] = matrix.reshape(*params.flip.shape, 9)
