"""Reference views: PIL decodes, torchvision's float functions do the rest, in float64 and one view at a time.

torchvision's functional transforms define each operation, in the order of `AugmentConfig`; no code is shared with a
backend. The affine jitter, which torchvision lacks, is applied one operation after the other, unclipped and in the
drawn order: its definition before the operations are composed.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor

from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import AugmentParams, draw_params
from pipeline.images.pixel_format import RGB8

SIZES = ((180, 240), (256, 200), (131, 301), (96, 96), (320, 213))  # (height, width): landscape, portrait, odd, small
IDENTITY = {"flip": False, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "gray": False, "sigma": 0}


def photographs(n: int, seed: int, sizes: Sequence[tuple[int, int]] = SIZES) -> list[bytes]:
    """n JPEGs of smooth colored fields; their (height, width) cycle through `sizes`."""
    return [encode(smooth_field(seed, i, *sizes[i % len(sizes)]), "JPEG", quality=95) for i in range(n)]


def smooth_field(seed: int, index: int, height: int, width: int) -> Image.Image:
    """Noise of three wavelengths over a gradient, from black to white so that clipping is exercised."""
    random = np.random.default_rng((seed, index))
    across, down = random.normal(0, 90, (2, 3))
    field = np.linspace(0, across, width)[None] + np.linspace(0, down, height)[:, None]
    for cells, amplitude in (4, 60), (9, 30), (24, 12):
        grid = torch.from_numpy(random.normal(0, amplitude, (1, 3, cells, cells)))
        octave = torch.nn.functional.interpolate(grid, (height, width), mode="bicubic", align_corners=True)
        field = field + octave[0].permute(1, 2, 0).numpy()
    return Image.fromarray(np.clip(np.rint(field - field.mean() + 128), 0, 255).astype(np.uint8))


def encode(image: Image.Image, form: str, **options) -> bytes:
    """Encode an image in one of PIL's formats."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def random_params(encoded: Sequence[bytes], config: AugmentConfig, seed: int, views: int = 2) -> AugmentParams:
    """Random augmentation parameters of these images."""
    width, height = np.array([Image.open(io.BytesIO(file)).size for file in encoded]).T
    return draw_params(config, seed, 0, np.arange(len(encoded)), height, width, views=views)


def keep_only(params: AugmentParams, *names: str) -> AugmentParams:
    """Neutralize all operations except for `names`; crop and order are kept."""
    neutral = {name: np.full_like(getattr(params, name), v) for name, v in IDENTITY.items() if name not in names}
    return replace(params, **neutral)


def select(params: AugmentParams, rows: slice) -> AugmentParams:
    """Parameters of some of the images."""
    return AugmentParams(**{f.name: getattr(params, f.name)[:, rows] for f in fields(params)})


def reference_views(encoded: Sequence[bytes], params: AugmentParams, config: AugmentConfig) -> Tensor:
    """Views as (V n, 3, S, S) float64 in levels 0..255, not normalized; row v n + i is view v of image i."""
    images = [decode(file) for file in encoded]
    rows = np.ndindex(params.flip.shape)
    return 255 * torch.stack([_view(images[i], params, (v, i), config) for v, i in rows])


def decode(file: bytes) -> Tensor:
    """Decode to (3, H, W) float64 in 0..1; the EXIF orientation is ignored."""
    return F.pil_to_tensor(Image.open(io.BytesIO(file)).convert("RGB")).double() / 255


def _gray(x: Tensor) -> Tensor:
    """Gray by BT.601: (3, H, W) -> (1, H, W)."""
    return (torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype)[:, None, None] * x).sum(0, keepdim=True)


def _turn_hue(x: Tensor, turns: float) -> Tensor:
    """Rotate the color differences of YUV, (blue - Y) * 0.492 toward (red - Y) * 0.877, and solve for RGB."""
    y, angle = _gray(x), 2 * math.pi * turns
    u, v = 0.492 * (x[2:] - y), 0.877 * (x[:1] - y)
    u, v = u * math.cos(angle) - v * math.sin(angle), u * math.sin(angle) + v * math.cos(angle)
    red, blue = y + v / 0.877, y + u / 0.492
    return torch.cat([red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue])


JITTER = {
    "exact": (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue),
    "affine": (
        lambda x, factor: factor * x,
        lambda x, factor: factor * x + (1 - factor) * _gray(x).mean(),
        lambda x, factor: factor * x + (1 - factor) * _gray(x),
        _turn_hue,
    ),
}
"""Brightness, contrast, saturation and hue: torchvision's functions, which clip, and the affine operations."""


def _view(image: Tensor, params: AugmentParams, at: tuple[int, int], config: AugmentConfig) -> Tensor:
    window, size = params.crop[at].tolist(), [config.size, config.size]
    x = F.resized_crop(image, *window, size, F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    if params.flip[at]:
        x = F.hflip(x)
    adjust = JITTER[config.jitter]
    amounts = (params.brightness, params.contrast, params.saturation, params.hue)
    for which in params.order[at]:
        x = adjust[which](x, float(amounts[which][at]))
    if params.gray[at]:
        x = F.rgb_to_grayscale(x, 3) if config.jitter == "exact" else _gray(x).expand(3, -1, -1)
    x = x.clamp(0, 1)  # the affine jitter clips once
    sigma = float(params.sigma[at])
    return blurred(x, config.blur_window, sigma) if sigma > 0 else x


def blurred(x: Tensor, window: int, sigma: float) -> Tensor:
    """Gaussian blur of (C, S, S), one axis after the other: torchvision convolves with a square, many times slower."""
    for window_of_axes in ([window, 1], [1, window]):
        x = F.gaussian_blur(x, window_of_axes, [sigma, sigma])
    return x


def denormalize(views: Tensor, config: AugmentConfig) -> Tensor:
    """Convert normalized views to float64 levels 0..255 on the CPU, like those of `reference_views`."""
    config = config.for_images(RGB8, {})
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (config.mean, config.std))
    return 255 * (views.cpu().double() * std + mean)


def deviation(views: Tensor, reference: Tensor, config: AugmentConfig) -> tuple[float, float]:
    """Mean and largest absolute difference of normalized views from reference views, in levels of 255."""
    difference = (denormalize(views, config) - reference).abs()
    return difference.mean().item(), difference.max().item()
