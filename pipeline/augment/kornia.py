"""The recipe with Kornia on any torch device; JPEGs are decoded by nvJPEG where the device is a CUDA GPU.

Kornia's random augmentation classes are not used: they draw by themselves and keep one order of the jitter for a whole
batch. Its functions take one factor per image; each is applied to the rows of the batch that need it next.
"""

import math
from concurrent.futures import ThreadPoolExecutor

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
from torchvision.io import ImageReadMode, decode_jpeg

from ..images import JPEG_MARK, DecodeError, contains, decode, decodes_alike
from .config import AugmentConfig
from .params import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION, AugmentParams, affine_jitter


class KorniaBackend:
    """Encoded images -> normalized views, augmented by Kornia.

    Args:
        device: of the views; any that torch knows.
        batch_size: most images in one call; Kornia allocates per call and has no use for it.
        views: views per image; likewise.
        workers: threads that decode on the host.
    """

    def __init__(self, recipe: AugmentConfig, device: torch.device, batch_size: int, views: int, workers: int):
        self._recipe = recipe
        self._device = torch.device(device)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __call__(self, encoded: list[bytes], parameters: AugmentParams) -> Tensor:
        """(V*n, 3, S, S) float32, channels-last, on the device; row v*n + i is view v of image i.

        Raises:
            DecodeError: an image can't be decoded or is smaller than its crop; `args[1]` is its place in `encoded`.
        """
        images = self._decode(encoded)
        for i, image in enumerate(images):
            if not contains(*image.shape[1:], parameters.crop[:, i]):
                raise DecodeError("the image is smaller than its index says", i)
        return augment(images, parameters, self._recipe)

    def close(self) -> None:
        """Ends the decoding threads."""
        self._threads.shutdown()

    def _decode(self, encoded: list[bytes]) -> list[Tensor]:
        """(3, H, W) uint8 RGB per image, on the device, EXIF orientation not applied."""
        images = dict.fromkeys(range(len(encoded)))
        if self._device.type == "cuda":
            jpegs = [i for i, file in enumerate(encoded) if file.startswith(JPEG_MARK) and decodes_alike(file)]
            images |= zip(jpegs, decode_on_gpu([encoded[i] for i in jpegs], self._device), strict=True)
        rest = [i for i, image in images.items() if image is None]
        for i, pixels in zip(rest, self._threads.map(decode, [encoded[i] for i in rest]), strict=True):
            if pixels is None:
                raise DecodeError("the image can't be decoded", i)
            images[i] = torch.from_numpy(pixels).to(self._device, non_blocking=True).permute(2, 0, 1)
        return list(images.values())


def decode_on_gpu(files: list[bytes], device: torch.device) -> list[Tensor | None]:
    """(3, H, W) uint8 RGB per JPEG by nvJPEG; all None, for the host to try, if it refuses one (CMYK, damaged)."""
    if not files:
        return []
    # torchvision decodes on a stream of its own into memory of the current one, which may have been freed while
    # kernels that read the last batch were still queued: they have to be through before it is written again.
    torch.cuda.current_stream(device).synchronize()
    try:
        return decode_jpeg(
            [torch.frombuffer(bytearray(f), dtype=torch.uint8) for f in files], ImageReadMode.RGB, device
        )
    except RuntimeError:
        return [None] * len(files)


def augment(images: list[Tensor], parameters: AugmentParams, recipe: AugmentConfig) -> Tensor:
    """n images (3, H, W) uint8 on one device -> (V*n, 3, S, S) float32 there, normalized and channels-last.

    Which rows an operation touches is decided on the host, so nothing here waits for a GPU.
    """
    x = resized_crops(images, parameters, recipe.size)
    color(x, parameters, recipe)
    blur(x, parameters, recipe)
    return pack(x, recipe)


def resized_crops(images: list[Tensor], parameters: AugmentParams, size: int) -> Tensor:
    """Window and flip of every view: n images (3, H, W) uint8 -> (V*n, 3, S, S) float32 in 0..1."""
    at = np.ndindex(parameters.flip.shape)
    return torch.stack([_resized_crop(images[i], parameters.crop[v, i], parameters.flip[v, i], size) for v, i in at])


def color(x: Tensor, parameters: AugmentParams, recipe: AugmentConfig) -> None:
    """Jitter and grayscale of (V*n, 3, S, S) in place."""
    if recipe.jitter == "exact":
        _exact_jitter(x, parameters)
    else:
        _affine_jitter(x, parameters)


def blur(x: Tensor, parameters: AugmentParams, recipe: AugmentConfig) -> None:
    """Gaussian blur of (V*n, 3, S, S) in place."""
    sigma = parameters.sigma.ravel()  # (V*n,)
    rows = np.flatnonzero(sigma > 0)
    # Not gaussian_blur2d, which reads the sign of sigma back from where it is.
    kernel = get_gaussian_kernel1d(recipe.blur_window, torch.from_numpy(sigma[rows])[:, None])  # (rows, window)
    _change_rows(x, rows, filter2d_separable, kernel, kernel)


def pack(x: Tensor, recipe: AugmentConfig) -> Tensor:
    """Normalized, in place, and channels-last."""
    mean, std = (torch.tensor(v)[:, None, None].to(x.device, non_blocking=True) for v in (recipe.mean, recipe.std))
    return x.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


def _exact_jitter(x: Tensor, parameters: AugmentParams) -> None:
    """Jitter and grayscale in place, each row in its own order."""
    order = parameters.order.reshape(-1, 4)  # (V*n, 4)
    jitter = {
        BRIGHTNESS: (adjust_brightness_accumulative, parameters.brightness.ravel(), 1),
        CONTRAST: (adjust_contrast_with_mean_subtraction, parameters.contrast.ravel(), 1),
        SATURATION: (adjust_saturation_with_gray_subtraction, parameters.saturation.ravel(), 1),
        HUE: (adjust_hue, 2 * math.pi * parameters.hue.ravel(), 0),  # Kornia's hue is in radians
    }
    for place in range(4):
        for operation, (adjust, amount, neutral) in jitter.items():
            rows = np.flatnonzero((order[:, place] == operation) & (amount != neutral))
            _change_rows(x, rows, adjust, torch.from_numpy(amount[rows]))
    _change_rows(x, np.flatnonzero(parameters.gray), _drop_color)


def _affine_jitter(x: Tensor, parameters: AugmentParams) -> None:
    """`pipeline.augment.params.affine_jitter` of all rows in place: one product of matrices, for want of a Kornia function."""
    matrix, pull = (torch.from_numpy(array).flatten(0, 1) for array in affine_jitter(parameters))  # (V*n, 3, 3), (V*n,)
    matrix, pull = (tensor.to(x.device, non_blocking=True) for tensor in (matrix, pull))
    weights = torch.tensor(LUMA, dtype=x.dtype).to(x.device, non_blocking=True)
    offset = pull * (x.mean((2, 3)) @ weights)  # (V*n,)
    pixels = x.flatten(2)  # (V*n, 3, S*S)
    x.copy_(torch.baddbmm(offset[:, None, None], matrix, pixels).clamp_(0, 1).view_as(x))


def _resized_crop(image: Tensor, crop: np.ndarray, flip: bool, size: int) -> Tensor:
    """(3, H, W) uint8 -> (3, S, S) float32 in 0..1."""
    top, left, height, width = crop.tolist()
    window = image[None, :, top : top + height, left : left + width].float() / 255
    x = F.interpolate(window, (size, size), mode="bicubic", antialias=True, align_corners=False)[0].clamp_(0, 1)
    return x.flip(-1) if flip else x


def _change_rows(x: Tensor, rows: np.ndarray, change, *arguments) -> None:
    """x[rows] = change(x[rows], ...), in place; boolean masks would make the host wait for the device."""
    if len(rows):
        index = torch.from_numpy(rows).to(x.device, non_blocking=True)
        x.index_copy_(0, index, change(x.index_select(0, index), *arguments))


def _drop_color(x: Tensor) -> Tensor:
    return rgb_to_grayscale(x).expand(-1, 3, -1, -1)
