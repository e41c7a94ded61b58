"""Statistics of a split, measured while it is converted or indexed and stored in its manifest."""

from collections import Counter
from typing import Any

import cv2
import numpy as np

from ..common import UserError
from ..images.pixel_format import PixelFormat
from .format import SHORT_SIDE_PX, short_side_counts

MEASURED_IMAGES = 1000
"""Number of images, spread over all shards, whose colors are measured. The order of the samples is random, so the first
ones of each shard are a random sample that does not depend on how the work is distributed."""


def channel_moments(pixels: np.ndarray) -> list[float]:
    """Mean and mean square of each channel in units of white, 2 C numbers in 0..1.

    Args:
        pixels: (H, W, C) uint8 or uint16.
    """
    mean, std = (each[:, 0] / np.iinfo(pixels.dtype).max for each in cv2.meanStdDev(pixels))
    return [*mean, *(std**2 + mean**2)]


def mixed_formats(name: str, counts: Counter[PixelFormat], command: str) -> UserError:
    """Error for a set whose images differ in channels or bits, with the number of images of each kind.

    It proposes --bits 8 only where that makes image files alike: not for five channels, or if all have 8 bits already.

    Args:
        name: of the set.
        counts: number of images of each format.
        command: name of the module whose option --bits 8 reads the set all the same.
    """
    kinds = "; ".join(f"{pixel_format}: {count:,}" for pixel_format, count in sorted(counts.items()))
    reduces = {pixel_format.channels for pixel_format in counts} <= {1, 3} and any(each.bits > 8 for each in counts)
    remedy = f", or use `python -m {command}` with --bits 8, which reads every image file as 8-bit RGB"
    return UserError(f"{name} mixes kinds of images ({kinds}); separate them{remedy if reduces else ''}.")


def measure(moments: list[list[float]], pixel_format: PixelFormat) -> dict[str, Any]:
    """Statistics of colors for the manifest.

    Args:
        moments: `channel_moments` of some images.
        pixel_format: of all images.

    Returns:
        "mean" and "std" of each channel in units of white, in which all images weigh the same, whatever their size;
        "measured_images", on which they are based.
    """
    found: dict[str, Any] = {"measured_images": len(moments)}
    if moments:  # none of them can be decoded if all are truncated and not verified
        mean, square = np.mean(moments, 0).reshape(2, pixel_format.channels)
        digits = pixel_format.bits // 2  # below a tenth of a level: 1/255 or 1/65535
        found["mean"] = mean.round(digits).tolist()
        found["std"] = np.sqrt(np.maximum(square - mean**2, 0)).round(digits).tolist()
    return found


def short_sides(parts: list[np.ndarray]) -> dict[str, int]:
    """Lower bound of a range of short sides in pixels -> number of images, given the (n,) index rows of each shard."""
    sides = sum(short_side_counts(rows) for rows in parts)
    return {str(low): int(n) for low, n in zip(SHORT_SIDE_PX, sides, strict=True) if n}
