"""Statistics of a split, measured during its conversion and stored in its manifest."""

from typing import Any

import cv2
import numpy as np

from ..shards.format import SHORT_SIDE_PX, short_side_counts

MEASURED_IMAGES = 1000
"""Number of images, spread over all shards, whose colors are measured. The order of the samples is random, so the first
ones of each shard are a random sample that does not depend on how the work is distributed."""


def channel_moments(pixels: np.ndarray) -> list[float]:
    """Mean and mean square of R, G and B, six numbers in 0..1.

    Args:
        pixels: (H, W, 3) uint8.
    """
    mean, std = (each[:, 0] / 255 for each in cv2.meanStdDev(pixels))
    return [*mean, *(std**2 + mean**2)]


def measure(moments: list[list[float]], parts: list[np.ndarray]) -> dict[str, Any]:
    """Statistics for the manifest.

    Args:
        moments: `channel_moments` of some images.
        parts: (n,) index rows of each shard.

    Returns:
        "mean" and "std" of R, G and B in 0..1, in which all images weigh the same, whatever their size;
        "measured_images", on which they are based; "short_side_px": lower bound of a range -> number of images.
    """
    found: dict[str, Any] = {"measured_images": len(moments)}
    if moments:  # none of them can be decoded if all are truncated and not verified
        mean, square = np.mean(moments, 0).reshape(2, 3)
        found["mean"] = mean.round(4).tolist()
        found["std"] = np.sqrt(np.maximum(square - mean**2, 0)).round(4).tolist()
    sides = sum(short_side_counts(rows) for rows in parts)
    return found | {"short_side_px": {str(low): int(n) for low, n in zip(SHORT_SIDE_PX, sides, strict=True) if n}}
