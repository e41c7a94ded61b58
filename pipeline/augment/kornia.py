"""Augmentation with Kornia on any torch device; CUDA GPUs decode JPEGs with nvJPEG.

Kornia's random augmentation classes are not used, because they draw their own parameters and apply one jitter order to
the whole batch. Its functions accept one factor per image; each is applied to the rows of the batch that need it next.
"""

import math
import re
from collections.abc import Iterable
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

from ..images import DecodeError, contains, decode, nvjpeg_decodes_alike
from ..pixel_format import RGB8, PixelFormat
from .config import AugmentConfig
from .gpu import augment_in_chunks, check_rgb8, copy_to, pinned, refusal, warn_once
from .params import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION, AugmentParams, affine_jitter

NVJPEG_REFUSALS = re.compile(
    r"Failed to [a-z ]+: (3|4|9|10)\b"  # of nvjpegStatus_t: bad, unsupported, not implemented, incomplete
    r"|Unknown chroma subsampling|not compiled with nvJPEG|Couldn't load the image extension"
)
"""Errors of torchvision that mean that nvJPEG is missing or cannot decode a file."""


class KorniaBackend:
    """Augmentation backend for any torch device; see `Backend` for the interface.

    Args:
        config: augmentation options.
        device: device of the views.
        batch_size, views: not used; part of the common signature.
        workers: number of threads that decode on the host.
        dtype: of the views, float32 or bfloat16; they are computed in float32.
        pixel_format: format of the images, which must be 8-bit RGB.

    Raises:
        UserError: another format.
    """

    def __init__(
        self,
        config: AugmentConfig,
        device: torch.device,
        batch_size: int,
        views: int,
        workers: int,
        dtype: torch.dtype = torch.float32,
        pixel_format: PixelFormat = RGB8,
    ):
        check_rgb8("Kornia", pixel_format)
        self._config, self._dtype = config, dtype
        self._device = torch.device(device)
        self.image_device = self._device if self._device.type in ("cpu", "cuda") else None
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __call__(self, images: list[bytes | np.ndarray | Tensor], params: AugmentParams) -> Tensor:
        """Augment V views of n images; see `Backend`."""
        return augment_in_chunks(self._augment, images, params, self._config, self._device, self._dtype)

    def close(self) -> None:
        """End the decoding threads."""
        self._threads.shutdown()

    def _augment(self, images: list[bytes | np.ndarray | Tensor], params: AugmentParams) -> Iterable[Tensor]:
        images = self._decode(images)
        for i, image in enumerate(images):
            if not contains(*image.shape[1:], params.crop[:, i]):
                raise DecodeError("the image is smaller than its index says", i)
        return augment(images, params, self._config).unflatten(0, (-1, len(images)))

    def _decode(self, encoded: list[bytes | np.ndarray | Tensor]) -> list[Tensor]:
        """(3, H, W) uint8 RGB per image, on the device; the EXIF orientation is not applied."""
        images: dict[int, Tensor | None] = dict.fromkeys(range(len(encoded)))
        images |= {i: torch.as_tensor(x).permute(2, 0, 1) for i, x in enumerate(encoded) if not isinstance(x, bytes)}
        if self._device.type == "cuda":
            jpegs = [i for i, image in images.items() if image is None and nvjpeg_decodes_alike(encoded[i])]
            images |= zip(jpegs, decode_on_gpu([encoded[i] for i in jpegs], self._device), strict=True)
        rest = [i for i, image in images.items() if image is None]
        for i, pixels in zip(rest, self._threads.map(self._decode_on_host, [encoded[i] for i in rest]), strict=True):
            if pixels is None:
                raise DecodeError("the image can't be decoded", i)
            images[i] = pixels.to(self._device, non_blocking=True).permute(2, 0, 1)
        return list(images.values())

    def _decode_on_host(self, encoded: bytes) -> Tensor | None:
        pixels = decode(encoded)
        return None if pixels is None else pinned(pixels, self._device)


def decode_on_gpu(files: list[bytes], device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs with nvJPEG to (3, H, W) uint8 RGB each; all None if nvJPEG is missing or refuses one of them."""
    if not files:
        return []
    # torchvision decodes on its own stream into memory of the current stream. That memory may have been freed while
    # kernels that read the previous batch were still queued, so wait for them before it is overwritten.
    torch.cuda.current_stream(device).synchronize()
    try:
        return decode_jpeg(
            [torch.frombuffer(bytearray(f), dtype=torch.uint8) for f in files], ImageReadMode.RGB, device
        )
    except RuntimeError as error:
        reason = refusal(error, NVJPEG_REFUSALS)
        warn_once(f"nvJPEG can't decode some JPEGs ({reason}); batches with them are decoded on the host.")
        return [None] * len(files)


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
    window = image[None, :, top : top + height, left : left + width].float() / 255
    x = F.interpolate(window, (size, size), mode="bicubic", antialias=True, align_corners=False)[0].clamp_(0, 1)
    return x.flip(-1) if flip else x


def _change_rows(x: Tensor, rows: np.ndarray, change, *arguments) -> None:
    """Compute x[rows] = change(x[rows], ...) in place; a boolean mask would make the host wait for the device."""
    if len(rows):
        index = copy_to(x.device, rows)
        x.index_copy_(0, index, change(x.index_select(0, index), *arguments))


def _drop_color(x: Tensor) -> Tensor:
    return rgb_to_grayscale(x).expand(-1, 3, -1, -1)
