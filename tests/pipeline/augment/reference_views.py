"""The slow and obvious views every backend is held against: PIL decodes, torchvision's float functions do the rest.

One image and one view at a time, in float64 and in the order of `AugmentConfig`; torchvision's functional transforms are the
definition of each operation, so nothing here is shared with a backend. The affine jitter, which torchvision lacks, is
done one operation after the other in the drawn order, unclipped, as its definition has it before it is composed.
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

SIZES = ((180, 240), (256, 200), (131, 301), (96, 96), (320, 213))  # (height, width): landscape, portrait, odd, small
IDENTITY = {"flip": False, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "gray": False, "sigma": 0}


def photographs(n: int, seed: int, sizes: Sequence[tuple[int, int]] = SIZES) -> list[bytes]:
    """n JPEGs of quality 95 of smooth colored fields, their (height, width) taken from `sizes` in turn."""
    return [encode(smooth_field(seed, i, *sizes[i % len(sizes)]), "JPEG", quality=95) for i in range(n)]


def smooth_field(seed: int, index: int, height: int, width: int) -> Image.Image:
    """Noise of three wavelengths over a gradient; reaches black and white, so that clipping is exercised."""
    random = np.random.default_rng((seed, index))
    across, down = random.normal(0, 90, (2, 3))
    field = np.linspace(0, across, width)[None] + np.linspace(0, down, height)[:, None]
    for cells, amplitude in (4, 60), (9, 30), (24, 12):
        grid = torch.from_numpy(random.normal(0, amplitude, (1, 3, cells, cells)))
        octave = torch.nn.functional.interpolate(grid, (height, width), mode="bicubic", align_corners=True)
        field = field + octave[0].permute(1, 2, 0).numpy()
    return Image.fromarray(np.clip(np.rint(field - field.mean() + 128), 0, 255).astype(np.uint8))


def encode(image: Image.Image, form: str, **options) -> bytes:
    """The bytes of `image` in one of PIL's formats."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def drawn_parameters(encoded: Sequence[bytes], recipe: AugmentConfig, seed: int, views: int = 2) -> AugmentParams:
    """The recipe's own random parameters for these images."""
    width, height = np.array([Image.open(io.BytesIO(file)).size for file in encoded]).T
    return draw_params(recipe, seed, 0, np.arange(len(encoded)), height, width, views)


def keep_only(parameters: AugmentParams, *names: str) -> AugmentParams:
    """`parameters` with every field that `names` leaves out at its identity; crop and order always stay."""
    neutral = {name: np.full_like(getattr(parameters, name), v) for name, v in IDENTITY.items() if name not in names}
    return replace(parameters, **neutral)


def take(parameters: AugmentParams, rows: slice) -> AugmentParams:
    """The parameters of a part of the images."""
    return AugmentParams(**{f.name: getattr(parameters, f.name)[:, rows] for f in fields(parameters)})


def reference_views(encoded: Sequence[bytes], parameters: AugmentParams, recipe: AugmentConfig) -> Tensor:
    """(V*n, 3, S, S) float64 in levels 0..255, not normalized; row v*n + i is view v of image i."""
    images = [decode(file) for file in encoded]
    rows = np.ndindex(parameters.flip.shape)
    return 255 * torch.stack([_view(images[i], parameters, (v, i), recipe) for v, i in rows])


def decode(file: bytes) -> Tensor:
    """(3, H, W) float64 in 0..1, EXIF orientation ignored."""
    return F.pil_to_tensor(Image.open(io.BytesIO(file)).convert("RGB")).double() / 255


def _gray(x: Tensor) -> Tensor:
    """(3, H, W) -> (1, H, W)."""
    return (torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype)[:, None, None] * x).sum(0, keepdim=True)


def _turn_hue(x: Tensor, turns: float) -> Tensor:
    """Turns the two color differences of YUV, (blue - Y) * 0.492 towards (red - Y) * 0.877, and solves for RGB."""
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
"""The four jitter operations in the order of `pipeline.augment.params`: torchvision's, which clip, and the affine ones."""


def _view(image: Tensor, parameters: AugmentParams, at: tuple[int, int], recipe: AugmentConfig) -> Tensor:
    window, size = parameters.crop[at].tolist(), [recipe.size, recipe.size]
    x = F.resized_crop(image, *window, size, F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    if parameters.flip[at]:
        x = F.hflip(x)
    adjust = JITTER[recipe.jitter]
    amounts = (parameters.brightness, parameters.contrast, parameters.saturation, parameters.hue)
    for which in parameters.order[at]:
        x = adjust[which](x, float(amounts[which][at]))
    if parameters.gray[at]:
        x = F.rgb_to_grayscale(x, 3) if recipe.jitter == "exact" else _gray(x).expand(3, -1, -1)
    x = x.clamp(0, 1)  # of the affine jitter, whose steps do not clip
    sigma = float(parameters.sigma[at])
    return F.gaussian_blur(x, [recipe.blur_window] * 2, [sigma, sigma]) if sigma > 0 else x


def denormalize(views: Tensor, recipe: AugmentConfig) -> Tensor:
    """Normalized views -> float64 levels 0..255 on the CPU, as `reference_views` gives them."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (recipe.mean, recipe.std))
    return 255 * (views.cpu().double() * std + mean)


def deviation(views: Tensor, reference: Tensor, recipe: AugmentConfig) -> tuple[float, float]:
    """(mean, largest) absolute difference of normalized views from reference views, in levels of 255."""
    difference = (denormalize(views, recipe) - reference).abs()
    return difference.mean().item(), difference.max().item()
