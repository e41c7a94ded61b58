"""The SimCLR augmentation as data, and its parameters for every (seed, epoch, sample, view).

The recipe is written down once, here; a backend receives `AugmentParams` and has nothing left to draw. All numbers
are those of Chen et al. 2020 (arXiv 2002.05709), appendix A.

    python -m pipeline.augment preview --data SHARDS --out grid.png   a contact sheet of images and their views
"""

import itertools
from dataclasses import dataclass

import numpy as np

from ..philox import uniforms
from .config import AugmentConfig

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.uint8)  # (24, 4)
ATTEMPTS = 10
LUMA = np.array([0.299, 0.587, 0.114])
"""Share of R, G and B in a pixel's gray (ITU-R BT.601, as PIL and torchvision have it)."""
YUV = np.stack([LUMA, 0.492 * ([0, 0, 1] - LUMA), 0.877 * ([1, 0, 0] - LUMA)])
"""(3, 3): RGB -> Y, U, V. A turn from U towards V runs through the hues as on the HSV wheel: red, yellow, green."""


@dataclass(frozen=True)
class AugmentParams:
    """Everything that distinguishes V views of n images; every array starts with (V, n)."""

    crop: np.ndarray
    """(V, n, 4) int32: top, left, height, width in pixels of the encoded image (EXIF orientation not applied)."""
    flip: np.ndarray
    """(V, n) bool."""
    order: np.ndarray
    """(V, n, 4) uint8: which of BRIGHTNESS, CONTRAST, SATURATION, HUE comes first, second, third, fourth."""
    brightness: np.ndarray
    """(V, n) float32 factor; 1 leaves the image as it is. Likewise contrast and saturation."""
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    """(V, n) float32 shift in turns of the HSV color wheel; 0 leaves the image as it is."""
    gray: np.ndarray
    """(V, n) bool."""
    sigma: np.ndarray
    """(V, n) float32 standard deviation of the blur in pixels; 0 for no blur."""

    @property
    def jittered(self) -> np.ndarray:
        """(V, n) bool: whether any of the four jitter operations changes the view."""
        return (self.brightness != 1) | (self.contrast != 1) | (self.saturation != 1) | (self.hue != 0)


def draw_params(
    recipe: AugmentConfig,
    seed: int,
    epoch: int,
    sample: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    views: int = 2,
) -> AugmentParams:
    """The parameters of `views` random views of each sample: a pure function of (seed, epoch, sample, view).

    Args:
        sample, height, width: (n,) integers: index in the shard set, size of the encoded image in pixels.
    """
    height, width = np.asarray(height), np.asarray(width)
    drawn = [_draw_view(recipe, uniforms(seed, epoch, sample, view, 32), height, width) for view in range(views)]
    return AugmentParams(**{name: np.stack([view[name] for view in drawn]) for name in drawn[0]})


def _draw_view(recipe: AugmentConfig, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> dict[str, np.ndarray]:
    strength = recipe.jitter_strength
    jitter = u[:, 23] < recipe.jitter_p

    def factor(column: int) -> np.ndarray:
        low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
        return np.where(jitter, low + (high - low) * u[:, column], 1.0).astype(np.float32)

    low, high = recipe.blur_sigma
    return {
        "crop": _random_crop(recipe, u[:, :22], height, width),
        "flip": u[:, 22] < recipe.flip_p,
        "order": ORDERS[(u[:, 24] * len(ORDERS)).astype(np.int64)],
        "brightness": factor(25),
        "contrast": factor(26),
        "saturation": factor(27),
        "hue": np.where(jitter, 0.2 * strength * (2 * u[:, 28] - 1), 0.0).astype(np.float32),
        "gray": u[:, 29] < recipe.gray_p,
        "sigma": np.where(u[:, 30] < recipe.blur_p, low + (high - low) * u[:, 31], 0.0).astype(np.float32),
    }


def _random_crop(recipe: AugmentConfig, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """(n, 4) int32: the first of ten windows that fits, else the largest central one of an allowed aspect."""
    low, high = recipe.crop_area
    area = (low + (high - low) * u[:, :ATTEMPTS]) * (height * width)[:, None]  # (n, attempts)
    low, high = np.log(recipe.crop_aspect)
    aspect = np.exp(low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (w <= width[:, None]) & (h >= 1) & (h <= height[:, None])
    first = fits.argmax(1)
    rows = np.arange(len(u))
    h, w = h[rows, first], w[rows, first]
    top, left = np.floor(u[:, 20] * (height - h + 1)), np.floor(u[:, 21] * (width - w + 1))
    windows = np.stack([top, left, h, w], 1)
    aspect = np.clip(width / height, *recipe.crop_aspect)
    h, w = np.rint(np.minimum(height, width / aspect)), np.rint(np.minimum(width, height * aspect))
    h, w = np.maximum(h, 1), np.maximum(w, 1)  # where the image has not enough pixels for an allowed aspect
    center = np.stack([(height - h) // 2, (width - w) // 2, h, w], 1)
    return np.where(fits.any(1)[:, None], windows, center).astype(np.int32)


def affine_jitter(parameters: AugmentParams) -> tuple[np.ndarray, np.ndarray]:
    """Jitter and grayscale of `AugmentConfig.jitter = "affine"`: one map of RGB per view, x -> A x + pull m, clipped once.

    m is the mean gray (by `LUMA`) of the cropped and resized view, the same for all three channels. Split a pixel into
    its gray y and its chroma x - y. Brightness scales both by b, contrast scales both by c and adds (1 - c) times the
    mean gray, saturation scales the chroma by s, and the hue turns it in the chroma plane of YUV (which is that of YIQ,
    with other axes), so y stays where HSV keeps the largest channel. Without clipping in between, these four commute
    and the drawn order has no say: A x = b c (y + s turned chroma), pull = b (1 - c). Grayscale is s = 0.

    Returns:
        A (V, n, 3, 3) and pull (V, n), float32; the identity and 0 where a view keeps its colors.
    """
    saturation = np.where(parameters.gray, 0, parameters.saturation).astype(np.float64)
    angle = 2 * np.pi * parameters.hue.astype(np.float64)
    turn = np.zeros((*angle.shape, 3, 3))
    turn[..., 0, 0] = 1
    turn[..., 1, 1] = turn[..., 2, 2] = saturation * np.cos(angle)
    turn[..., 2, 1] = saturation * np.sin(angle)
    turn[..., 1, 2] = -turn[..., 2, 1]
    brightness, contrast = parameters.brightness.astype(np.float64), parameters.contrast.astype(np.float64)
    matrix = (brightness * contrast)[..., None, None] * (np.linalg.inv(YUV) @ turn @ YUV)
    return matrix.astype(np.float32), (brightness * (1 - contrast)).astype(np.float32)


def center_crop(recipe: AugmentConfig, height: np.ndarray, width: np.ndarray) -> AugmentParams:
    """The one deterministic view of an evaluation: V = 1.

    The window is the central square of 224/256 of the short side, which is "resize to 256, crop 224" in one step;
    views of 64 px or less take the whole short side, since cutting small images loses the object.
    """
    n = len(height)
    short = np.minimum(height, width)
    side = short if recipe.size <= 64 else np.maximum(np.rint(short * 224 / 256), 1)
    crop = np.stack([(height - side) // 2, (width - side) // 2, side, side], 1).astype(np.int32)
    one = np.ones((1, n), np.float32)
    return AugmentParams(
        crop=crop[None],
        flip=np.zeros((1, n), bool),
        order=np.broadcast_to(ORDERS[0], (1, n, 4)),
        brightness=one,
        contrast=one,
        saturation=one,
        hue=0 * one,
        gray=np.zeros((1, n), bool),
        sigma=0 * one,
    )
