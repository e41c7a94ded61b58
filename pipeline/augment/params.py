"""Augmentation parameters for every (seed, epoch, sample, view), and for the center crop of an evaluation.

All random numbers are drawn here; backends only apply `AugmentParams`. Distributions and default values are those of
SimCLR (arXiv 2002.05709, appendix A).
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
"""Weights of R, G and B in the gray of a pixel (ITU-R BT.601, as in PIL and torchvision)."""
YUV = np.stack([LUMA, 0.492 * ([0, 0, 1] - LUMA), 0.877 * ([1, 0, 0] - LUMA)])
"""(3, 3) matrix RGB -> YUV. A rotation from U to V runs through the hues like the HSV wheel: red, yellow, green."""


@dataclass(frozen=True)
class AugmentParams:
    """Augmentation parameters of V views of n images; the first dimensions of every array are (V, n)."""

    crop: np.ndarray
    """(V, n, 4) int32: top, left, height, width in pixels of the encoded image (EXIF orientation not applied)."""
    flip: np.ndarray
    """(V, n) bool: horizontal flip."""
    order: np.ndarray
    """(V, n, 4) uint8: BRIGHTNESS, CONTRAST, SATURATION and HUE in the order of application."""
    brightness: np.ndarray
    """(V, n) float32 factor; 1 for no change."""
    contrast: np.ndarray
    """(V, n) float32 factor; 1 for no change."""
    saturation: np.ndarray
    """(V, n) float32 factor; 1 for no change."""
    hue: np.ndarray
    """(V, n) float32 shift in turns of the HSV color wheel; 0 for no change."""
    gray: np.ndarray
    """(V, n) bool: conversion to grayscale."""
    sigma: np.ndarray
    """(V, n) float32 standard deviation of the blur in pixels; 0 for no blur."""

    @property
    def jittered(self) -> np.ndarray:
        """Whether any of the four jitter operations changes the view: (V, n) bool."""
        return (self.brightness != 1) | (self.contrast != 1) | (self.saturation != 1) | (self.hue != 0)

    def of_images(self, rows: slice) -> "AugmentParams":
        """Parameters of some of the images."""
        return AugmentParams(**{name: values[:, rows] for name, values in vars(self).items()})


def draw_params(
    config: AugmentConfig,
    seed: int,
    epoch: int,
    sample: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    *,
    views: int = 2,
) -> AugmentParams:
    """Draw the parameters of `views` random views of each sample, a pure function of (seed, epoch, sample, view).

    Args:
        config: augmentation options.
        seed: seed of the run, up to 64 bits.
        epoch: epoch number, below 2**32.
        sample: (n,) integers, indices in the shard set.
        height, width: (n,) integers, size of the encoded image in pixels.
        views: V, number of views per sample.
    """
    n = len(sample)
    # all views at once: for a batch, the overhead of NumPy's calls is larger than their work
    u = uniforms(seed, epoch, np.tile(sample, views), np.repeat(np.arange(views), n), 32)
    drawn = _draw(config, u, np.tile(height, views), np.tile(width, views))
    return AugmentParams(**{name: values.reshape(views, n, *values.shape[1:]) for name, values in drawn.items()})


def _draw(config: AugmentConfig, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters of m views from u (m, 32); the first dimension of each is m."""
    strength = config.jitter_strength
    jitter = u[:, 23] < config.jitter_p

    def factor(column: int) -> np.ndarray:
        low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
        return np.where(jitter, low + (high - low) * u[:, column], 1.0).astype(np.float32)

    low, high = config.blur_sigma
    return {
        "crop": _random_crop(config, u[:, :22], height, width),
        "flip": u[:, 22] < config.flip_p,
        "order": ORDERS[(u[:, 24] * len(ORDERS)).astype(np.int64)],
        "brightness": factor(25),
        "contrast": factor(26),
        "saturation": factor(27),
        "hue": np.where(jitter, 0.2 * strength * (2 * u[:, 28] - 1), 0.0).astype(np.float32),
        "gray": u[:, 29] < config.gray_p,
        "sigma": np.where(u[:, 30] < config.blur_p, low + (high - low) * u[:, 31], 0.0).astype(np.float32),
    }


def _random_crop(config: AugmentConfig, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """First of ten random crops that fits, or else the largest central one of an allowed aspect ratio: (n, 4) int32."""
    low, high = config.crop_area
    area = (low + (high - low) * u[:, :ATTEMPTS]) * (height * width)[:, None]  # (n, attempts)
    low, high = np.log(config.crop_aspect)
    aspect = np.exp(low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (w <= width[:, None]) & (h >= 1) & (h <= height[:, None])
    first = fits.argmax(1)
    rows = np.arange(len(u))
    h, w = h[rows, first], w[rows, first]
    top, left = np.floor(u[:, 20] * (height - h + 1)), np.floor(u[:, 21] * (width - w + 1))
    crops = np.stack([top, left, h, w], 1)
    aspect = np.clip(width / height, *config.crop_aspect)
    h, w = np.rint(np.minimum(height, width / aspect)), np.rint(np.minimum(width, height * aspect))
    h, w = np.maximum(h, 1), np.maximum(w, 1)  # if the image is too small for an allowed aspect ratio
    center = np.stack([(height - h) // 2, (width - w) // 2, h, w], 1)
    return np.where(fits.any(1)[:, None], crops, center).astype(np.int32)


def affine_jitter(params: AugmentParams) -> tuple[np.ndarray, np.ndarray]:
    """Compose jitter and grayscale into one map of RGB per view, x -> A x + w m, clipped once (`jitter = "affine"`).

    m is the mean gray (by `LUMA`) of the cropped and resized view, the same for all three channels. Let y be the gray
    of a pixel and x - y its chroma. Brightness scales both by b; contrast scales both by c and adds (1 - c) m;
    saturation scales the chroma by s; hue rotates it in the chroma plane of YUV (also that of YIQ, with other axes), so
    it preserves y, whereas HSV preserves the largest channel. Without clipping in between, the four operations commute
    and their order has no effect: A x = b c (y + s * rotated chroma), w = b (1 - c). Grayscale is s = 0.

    Returns:
        A (V, n, 3, 3) and w (V, n), float32; identity and 0 for views whose colors do not change.
    """
    saturation = np.where(params.gray, 0, params.saturation).astype(np.float64)
    angle = 2 * np.pi * params.hue.astype(np.float64)
    rotation = np.zeros((*angle.shape, 3, 3))
    rotation[..., 0, 0] = 1
    rotation[..., 1, 1] = rotation[..., 2, 2] = saturation * np.cos(angle)
    rotation[..., 2, 1] = saturation * np.sin(angle)
    rotation[..., 1, 2] = -rotation[..., 2, 1]
    brightness, contrast = params.brightness.astype(np.float64), params.contrast.astype(np.float64)
    matrix = (brightness * contrast)[..., None, None] * (np.linalg.inv(YUV) @ rotation @ YUV)
    return matrix.astype(np.float32), (brightness * (1 - contrast)).astype(np.float32)


def center_crop(config: AugmentConfig, height: np.ndarray, width: np.ndarray) -> AugmentParams:
    """Parameters of the deterministic view of an evaluation, V = 1.

    The crop is the central square of 224/256 of the short side, which is "resize to 256, crop 224" in one step. Views
    of 64 px or less use the whole short side, because cropping small images loses the object.

    Args:
        height, width: (n,) integers, size of the encoded image in pixels.
    """
    n = len(height)
    short = np.minimum(height, width)
    side = short if config.size <= 64 else np.maximum(np.rint(short * 224 / 256), 1)
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
