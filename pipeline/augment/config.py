"""Augmentation options."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..common import UserError

Jitter = Literal["exact", "affine"]


@dataclass(frozen=True)
class AugmentConfig:
    """Image augmentation, in this order: crop and resize, flip, color jitter, grayscale, blur, normalize."""

    size: int = 224
    """Side of a view in pixels."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest crop area, as a fraction of the image."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of a crop."""
    flip_p: float = 0.5
    """Probability of a horizontal flip."""
    jitter_p: float = 0.8
    """Probability of color jitter."""
    jitter_strength: float = 1.0
    """Strength s of color jitter: brightness, contrast and saturation vary by up to 0.8 s, hue by up to 0.2 s turns."""
    jitter: Jitter = "exact"
    """exact: operations in random order, clipped after each, hue in HSV. affine: one linear map of colors, faster."""
    gray_p: float = 0.2
    """Probability of conversion to grayscale."""
    blur_p: float = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean per channel that is subtracted (RGB, images in 0..1)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation per channel to divide by."""

    def __post_init__(self) -> None:
        def require(holds: bool, field: str, expected: str) -> None:
            if not holds:
                value = getattr(self, field)
                shown = value if isinstance(value, str) or not np.iterable(value) else " ".join(map(str, value))
                raise UserError(f"--views.{field.replace('_', '-')} is {shown}; it must be {expected}.")

        # comparisons are written such that nan fails them
        require(self.size >= 8, "size", "at least 8 pixels")
        low, high = self.crop_area
        require(0 < low <= high <= 1, "crop_area", "two fractions of the image, 0 < smallest <= largest <= 1")
        low, high = self.crop_aspect
        require(0 < low <= high < np.inf, "crop_aspect", "two ratios of width to height, 0 < smallest <= largest")
        for field in ("flip_p", "jitter_p", "gray_p", "blur_p"):
            require(0 <= getattr(self, field) <= 1, field, "a probability from 0 to 1")
        require(0 <= self.jitter_strength <= 2.5, "jitter_strength", "from 0 to 2.5, where the hue covers every color")
        require(self.jitter in get_args(Jitter), "jitter", " or ".join(get_args(Jitter)))
        low, high = self.blur_sigma
        expected = "two standard deviations in pixels, 0 < smallest <= largest; use --views.blur-p 0 for no blur"
        require(0 < low <= high < np.inf, "blur_sigma", expected)
        scale = "for an image in 0..1, not 0..255"
        require(all(0 <= value <= 1 for value in self.mean), "mean", f"three numbers from 0 to 1, {scale}")
        require(all(1e-3 <= value <= 1 for value in self.std), "std", f"three numbers from 0.001 to 1, {scale}")

    @property
    def blur_window(self) -> int:
        """Side of the blur kernel in pixels: a tenth of the view, rounded to an odd number (23 at 224)."""
        return max(3, self.size // 10 + 1 - (self.size // 10) % 2)
