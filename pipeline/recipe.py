"""The SimCLR augmentation as data, and its parameters for every (seed, epoch, sample, view).

The recipe is written down once, here; a backend receives `ViewParameters` and has nothing left to draw. All numbers
are those of Chen et al. 2020 (arXiv 2002.05709), appendix A.

    python -m pipeline.recipe preview --data SHARDS --out grid.png   a contact sheet of images and their views
"""

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from errors import UserError
from pipeline.philox import uniforms

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.uint8)  # (24, 4)
ATTEMPTS = 10
LUMA = np.array([0.299, 0.587, 0.114])
"""Share of R, G and B in a pixel's gray (ITU-R BT.601, as PIL and torchvision have it)."""
YUV = np.stack([LUMA, 0.492 * ([0, 0, 1] - LUMA), 0.877 * ([1, 0, 0] - LUMA)])
"""(3, 3): RGB -> Y, U, V. A turn from U towards V runs through the hues as on the HSV wheel: red, yellow, green."""
Jitter = Literal["exact", "affine"]


@dataclass(frozen=True)
class Recipe:
    """What is done to an image, in this order: crop and resize, flip, colour jitter, grayscale, blur, normalise."""

    size: int = 224
    """Side of a view in pixels."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip_p: float = 0.5
    """Probability of a horizontal flip."""
    jitter_p: float = 0.8
    """Probability of colour jitter."""
    jitter_strength: float = 1.0
    """The paper's s: brightness, contrast and saturation by up to 0.8 s, hue by up to 0.2 s turns."""
    jitter: Jitter = "exact"
    """exact: the paper's, in random order, clipped after each, hue in HSV. affine: faster, see `affine_jitter`."""
    gray_p: float = 0.2
    """Probability of dropping the colour."""
    blur_p: float = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted per channel (RGB, image in 0..1)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divided by per channel."""

    def __post_init__(self):
        def require(holds: bool, field: str, expected: str) -> None:
            if not holds:
                value = getattr(self, field)
                shown = value if isinstance(value, str) or not np.iterable(value) else " ".join(map(str, value))
                raise UserError(f"--views.{field.replace('_', '-')} is {shown}; it must be {expected}.")

        # written so that nan fails every comparison
        require(self.size >= 8, "size", "at least 8 pixels")
        low, high = self.crop_area
        require(0 < low <= high <= 1, "crop_area", "two shares of the image, 0 < smallest <= largest <= 1")
        low, high = self.crop_aspect
        require(0 < low <= high < np.inf, "crop_aspect", "two ratios of width to height, 0 < smallest <= largest")
        for field in ("flip_p", "jitter_p", "gray_p", "blur_p"):
            require(0 <= getattr(self, field) <= 1, field, "a probability from 0 to 1")
        require(0 <= self.jitter_strength <= 2.5, "jitter_strength", "from 0 to 2.5, where the hue reaches every color")
        require(self.jitter in get_args(Jitter), "jitter", " or ".join(get_args(Jitter)))
        low, high = self.blur_sigma
        expected = "two standard deviations in pixels, 0 < smallest <= largest; use --views.blur-p 0 for no blur"
        require(0 < low <= high < np.inf, "blur_sigma", expected)
        scale = "for an image in 0..1, not 0..255"
        require(all(0 <= value <= 1 for value in self.mean), "mean", f"three numbers from 0 to 1, {scale}")
        require(all(1e-3 <= value <= 1 for value in self.std), "std", f"three numbers from 0.001 to 1, {scale}")

    @property
    def blur_window(self) -> int:
        """Side of the blur kernel in pixels: a tenth of the view, made odd (23 at 224)."""
        return max(3, self.size // 10 + 1 - (self.size // 10) % 2)


@dataclass(frozen=True)
class ViewParameters:
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
    """(V, n) float32 shift in turns of the HSV colour wheel; 0 leaves the image as it is."""
    gray: np.ndarray
    """(V, n) bool."""
    sigma: np.ndarray
    """(V, n) float32 standard deviation of the blur in pixels; 0 for no blur."""

    @property
    def jittered(self) -> np.ndarray:
        """(V, n) bool: whether any of the four jitter operations changes the view."""
        return (self.brightness != 1) | (self.contrast != 1) | (self.saturation != 1) | (self.hue != 0)


def draw_views(
    recipe: Recipe, seed: int, epoch: int, sample: np.ndarray, height: np.ndarray, width: np.ndarray, views: int = 2
) -> ViewParameters:
    """The parameters of `views` random views of each sample: a pure function of (seed, epoch, sample, view).

    Args:
        sample, height, width: (n,) integers: index in the shard set, size of the encoded image in pixels.
    """
    height, width = np.asarray(height), np.asarray(width)
    drawn = [_draw_view(recipe, uniforms(seed, epoch, sample, view, 32), height, width) for view in range(views)]
    return ViewParameters(**{name: np.stack([view[name] for view in drawn]) for name in drawn[0]})


def _draw_view(recipe: Recipe, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> dict[str, np.ndarray]:
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


def _random_crop(recipe: Recipe, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
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
    central = np.stack([(height - h) // 2, (width - w) // 2, h, w], 1)
    return np.where(fits.any(1)[:, None], windows, central).astype(np.int32)


def affine_jitter(parameters: ViewParameters) -> tuple[np.ndarray, np.ndarray]:
    """Jitter and grayscale of `Recipe.jitter = "affine"`: one map of RGB per view, x -> A x + pull m, clipped once.

    m is the mean gray (by `LUMA`) of the cropped and resized view, the same for all three channels. Split a pixel into
    its gray y and its chroma x - y. Brightness scales both by b, contrast scales both by c and adds (1 - c) times the
    mean gray, saturation scales the chroma by s, and the hue turns it in the chroma plane of YUV (which is that of YIQ,
    with other axes), so y stays where HSV keeps the largest channel. Without clipping in between, these four commute
    and the drawn order has no say: A x = b c (y + s turned chroma), pull = b (1 - c). Grayscale is s = 0.

    Returns:
        A (V, n, 3, 3) and pull (V, n), float32; the identity and 0 where a view keeps its colours.
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


def central_view(recipe: Recipe, height: np.ndarray, width: np.ndarray) -> ViewParameters:
    """The one deterministic view of an evaluation: V = 1.

    The window is the central square of 224/256 of the short side, which is "resize to 256, crop 224" in one step;
    views of 64 px or less take the whole short side, since cutting small images loses the object.
    """
    n = len(height)
    short = np.minimum(height, width)
    side = short if recipe.size <= 64 else np.maximum(np.rint(short * 224 / 256), 1)
    crop = np.stack([(height - side) // 2, (width - side) // 2, side, side], 1).astype(np.int32)
    one = np.ones((1, n), np.float32)
    return ViewParameters(
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


if __name__ == "__main__":
    from pipeline.preview import main  # which builds on this module

    main()
