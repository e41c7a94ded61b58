"""Augmentation options."""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from ..common import UserError
from ..images.pixel_format import RGB8, PixelFormat

Jitter = Literal["exact", "affine"]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""Normalization of 8-bit RGB images that nobody measured, as in torchvision and timm."""
SMALLEST_STD = 1e-5
"""Smallest standard deviation: below one level of 16 bits, 1.5e-5, so that a scan of few levels can be normalized."""


@dataclass(frozen=True)
class AugmentConfig:
    """Image augmentation, in this order: crop and resize, flip, color jitter, grayscale, blur, normalize."""

    size: int = 224
    """Side of a view in pixels."""
    size_schedule: tuple[str, ...] = field(default=(), kw_only=True)
    """Smaller views in the first epochs of train.py, as SIZE:EPOCHS: 128:30 160:40 is 128 px for 30 epochs, 160 px for
    the next 40, then --views.size."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest crop area, as a fraction of the image."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of a crop."""
    flip_p: float = 0.5
    """Probability of a horizontal flip."""
    jitter_p: float = 0.8
    """Probability of color jitter; for images that are not RGB, of brightness and contrast alone."""
    jitter_strength: float = 1.0
    """Strength s of color jitter: brightness, contrast and saturation vary by up to 0.8 s, hue by up to 0.2 s turns."""
    jitter: Jitter = "exact"
    """exact: operations in random order, clipped after each, hue in HSV. affine: one linear map of colors, faster."""
    gray_p: float = 0.2
    """Probability of conversion to grayscale (RGB images)."""
    blur_p: float = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels."""
    mean: tuple[float, ...] | None = None
    """Mean to subtract, per channel or one for all (images in 0..1). Default: as measured at conversion."""
    std: tuple[float, ...] | None = None
    """Standard deviation to divide by, per channel or one for all. Default: as measured at conversion."""

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, expected: str) -> None:
            if not holds:
                value = getattr(self, name)
                shown = value if isinstance(value, str) or not np.iterable(value) else " ".join(map(str, value))
                raise UserError(f"--views.{name.replace('_', '-')} is {shown}; it must be {expected}.")

        # comparisons are written such that nan fails them
        require(self.size >= 8, "size", "at least 8 pixels")
        pairs = all(re.fullmatch(r"\d{1,9}:0*[1-9]\d{0,8}", item) for item in self.size_schedule)
        require(pairs, "size_schedule", "pairs SIZE:EPOCHS of whole numbers, such as 128:30 160:40")
        sizes = [size for size, _ in self.phases]
        require(sizes == sorted(set(sizes)), "size_schedule", "in ascending order of sizes, each size once")
        expected = f"of sizes from 8 pixels to less than --views.size ({self.size}), which the remaining epochs have"
        require(all(8 <= size < self.size for size in sizes), "size_schedule", expected)
        low, high = self.crop_area
        require(0 < low <= high <= 1, "crop_area", "two fractions of the image, 0 < smallest <= largest <= 1")
        low, high = self.crop_aspect
        require(0 < low <= high < np.inf, "crop_aspect", "two ratios of width to height, 0 < smallest <= largest")
        for name in ("flip_p", "jitter_p", "gray_p", "blur_p"):
            require(0 <= getattr(self, name) <= 1, name, "a probability from 0 to 1")
        require(0 <= self.jitter_strength <= 2.5, "jitter_strength", "from 0 to 2.5, where the hue covers every color")
        require(self.jitter in get_args(Jitter), "jitter", " or ".join(get_args(Jitter)))
        low, high = self.blur_sigma
        expected = "two standard deviations in pixels, 0 < smallest <= largest <= 1e6; use --views.blur-p 0 for no blur"
        require(0 < low <= high <= 1e6, "blur_sigma", expected)
        for name, smallest in ("mean", 0), ("std", SMALLEST_STD):
            values = getattr(self, name)
            expected = f"one number per channel or one for all, {smallest:g} to 1, for an image in 0..1, not 0..255"
            require(values is None or (len(values) and all(smallest <= x <= 1 for x in values)), name, expected)

    def for_images(self, pixel_format: PixelFormat, statistics: dict[str, Any]) -> "AugmentConfig":
        """The configuration with a mean and a standard deviation for each channel of the images.

        Values that are set stay, a single one for all channels. Others are those measured at conversion or, for 8-bit
        RGB images that were not measured, ImageNet's. A channel that was measured to be constant is not scaled.

        Args:
            pixel_format: format of the images.
            statistics: "mean" and "std" of each channel, in units of white, as in the manifest of a shard set; empty
                if nothing was measured.

        Raises:
            UserError: the number of values is neither 1 nor that of the channels, or nothing is known.
        """
        measured = {name: statistics[name] for name in IMAGENET if name in statistics}
        if "std" in measured:
            measured["std"] = [std if std >= SMALLEST_STD else 1.0 for std in measured["std"]]
        known, found = (IMAGENET if pixel_format == RGB8 else {}) | measured, {}
        for name in IMAGENET:
            values = getattr(self, name) or known.get(name)
            if not values:
                raise UserError(
                    f"Mean and standard deviation of the images ({pixel_format}) were not measured; use --views.mean "
                    "and --views.std, or convert the images again."
                )
            if len(values) not in (1, pixel_format.channels):
                channels = "1 channel" if pixel_format.channels == 1 else f"{pixel_format.channels} channels"
                raise UserError(
                    f"--views.{name} has {len(values)} values, but the images have {channels}; use one value per "
                    "channel, or one for all."
                )
            found[name] = tuple(map(float, values)) * (pixel_format.channels if len(values) == 1 else 1)
        return replace(self, **found)

    @property
    def phases(self) -> list[tuple[int, int]]:
        """Size and number of epochs of each item of `size_schedule`."""
        return [tuple(map(int, item.split(":"))) for item in self.size_schedule]

    @property
    def full_size(self) -> "AugmentConfig":
        """The configuration without a schedule, for views of `size` in every epoch."""
        return replace(self, size_schedule=())

    def at_epoch(self, epoch: int) -> "AugmentConfig":
        """The configuration of one epoch (counted from 0), without a schedule.

        The blur shrinks with the view, so that it covers the same part of the image at every size.
        """
        for size, epochs in self.phases:
            if epoch < epochs:
                low, high = (sigma * size / self.size for sigma in self.blur_sigma)
                return replace(self, size=size, size_schedule=(), blur_sigma=(low, high))
            epoch -= epochs
        return self.full_size

    def check_epochs(self, epochs: int) -> None:
        """Refuse a schedule that is longer than the run. It may be as long: no epoch then has views of `size`.

        Raises:
            UserError: names both numbers of epochs.
        """
        scheduled = sum(each for _, each in self.phases)
        if scheduled > epochs:
            raise UserError(
                f"--views.size-schedule covers {scheduled} epochs, but --epochs is {epochs}; shorten the schedule or "
                f"use --epochs {scheduled} or more."
            )

    @property
    def blur_window(self) -> int:
        """Side of the blur kernel in pixels: a tenth of the view, rounded to an odd number (23 at 224)."""
        return max(3, self.size // 10 + 1 - (self.size // 10) % 2)
