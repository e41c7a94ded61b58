"""Augmentation with Kornia on any torch device; CUDA GPUs decode JPEGs with nvJPEG.

Kornia's random augmentation classes are not used, because they draw their own parameters and apply one jitter order to
the whole batch. Its functions accept one factor per image; each is applied to the rows of the batch that need it next.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
)
from kornia.enhance.adjust import adjust_contrast_with_mean_subtraction
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import Tensor

from .config import AugmentConfig
from .decoding import DecodingBackend
from .gpu import copy_to
from .params import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION, AugmentParams, affine_jitter

LARGEST_SHRINK = 40
"""Crops with a side of more than 40 times that of the view are resized on the CPU: torch's kernel for GPUs keeps its
weights in shared memory, whose 48 KB suffice for 47 times (PyTorch, UpSampleBilinear2d.cu)."""


class KorniaBackend(DecodingBackend):
    """Augmentation backend for any torch device."""

    name = "Kornia"

    def _render(self, images: list[Tensor], params: AugmentParams, out: Tensor) -> None:
        out.copy_(augment(images, params, self._config).unflatten(0, (-1, len(images))))


def augment(images: list[Tensor], params: AugmentParams, config: AugmentConfig) -> Tensor:
    """Augment n images (3, H, W) uint8 on one device: (V n, 3, S, S) float32, normalized.

    The rows that an operation changes are selected on the host, so the host never waits for the GPU.
    """
    x = resized_crops(images, params, config.size)
    color(x, params, config)
    blur(x, params, config)
    normalize(x, config)
    return x


def resized_crops(images: list[Tensor], params: AugmentParams, size: int) -> Tensor:
    """Crop, resize and flip every view: n images (3, H, W) uint8 -> (V n, 3, S, S) float32 in 0..1."""
    at = np.ndindex(params.flip.shape)
    return torch.stack([_resized_crop(images[i], params.crop[v, i], params.flip[v, i], size) for v, i in at])


def color(x: Tensor, params: AugmentParams, config: AugmentConfig) -> None:
    """Apply jitter and grayscale to (V n, 3, S, S) in place."""
    if config.jitter == "exact":
        _exact_jitter(x, params)
    else:
        _affine_jitter(x, params)


def blur(x: Tensor, params: AugmentParams, config: AugmentConfig) -> None:
    """Blur (V n, 3, S, S) in place."""
    sigma = params.sigma.ravel()  # (V n,)
    rows = np.flatnonzero(sigma > 0)
    # gaussian_blur2d would copy sigma back from the device to check its sign
    kernel = get_gaussian_kernel1d(config.blur_window, copy_to(x.device, sigma[rows, None]))  # (rows, window)
    _change_rows(x, rows, filter2d_separable, kernel, kernel)


def normalize(x: Tensor, config: AugmentConfig) -> None:
    """Normalize (V n, 3, S, S) in place."""
    for channel, mean, std in zip(range(3), config.mean, config.std, strict=True):  # numbers need no copy to the device
        x[:, channel].sub_(mean).div_(std)


def _exact_jitter(x: Tensor, params: AugmentParams) -> None:
    """Apply jitter, in the order of each row, and grayscale in place."""
    order = params.order.reshape(-1, 4)  # (V n, 4)
    jitter = {
        BRIGHTNESS: (adjust_brightness_accumulative, params.brightness.ravel(), 1),
        CONTRAST: (adjust_contrast_with_mean_subtraction, params.contrast.ravel(), 1),
        SATURATION: (adjust_saturation_with_gray_subtraction, params.saturation.ravel(), 1),
        HUE: (adjust_hue, 2 * math.pi * params.hue.ravel(), 0),  # Kornia's hue is in radians
    }
    for place in range(4):
        for operation, (adjust, amount, neutral) in jitter.items():
            rows = np.flatnonzero((order[:, place] == operation) & (amount != neutral))
            _change_rows(x, rows, adjust, copy_to(x.device, amount[rows]))
    _change_rows(x, np.flatnonzero(params.gray), _drop_color)


def _affine_jitter(x: Tensor, params: AugmentParams) -> None:
    """Apply `affine_jitter` to all rows in place by one matrix product; Kornia has no function for it."""
    # (V n, 3, 3), (V n,)
    matrix, mean_weight = (copy_to(x.device, array).flatten(0, 1) for array in affine_jitter(params))
    red, green, blue = x.mean((2, 3)).unbind(1)
    offset = mean_weight * (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)  # (V n,)
    pixels = x.flatten(2)  # (V n, 3, S*S)
    x.copy_(torch.baddbmm(offset[:, None, None], matrix, pixels).clamp_(0, 1).view_as(x))


def _resized_crop(image: Tensor, crop: np.ndarray, flip: bool, size: int) -> Tensor:
    """Crop, resize and flip: (3, H, W) uint8 -> (3, S, S) float32 in 0..1."""
    top, left, height, width = crop.tolist()
    window = image[None, :, top : top + height, left : left + width]
    if max(height, width) > LARGEST_SHRINK * size:
        window = window.cpu()
    x = F.interpolate(window.float() / 255, (size, size), mode="bicubic", antialias=True, align_corners=False)
    x = x[0].clamp_(0, 1).to(image.device)
    return x.flip(-1) if flip else x


def _change_rows(x: Tensor, rows: np.ndarray, change, *arguments) -> None:
    """Compute x[rows] = change(x[rows], ...) in place; a boolean mask would make the host wait for the device."""
    if len(rows):
        index = copy_to(x.device, rows)
        x.index_copy_(0, index, change(x.index_select(0, index), *arguments))


def _drop_color(x: Tensor) -> Tensor:
    return rgb_to_grayscale(x).expand(-1, 3, -1, -1)
