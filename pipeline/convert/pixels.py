"""Data sets distributed as raw pixels, which are stored as PNG without loss."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..common import UserError
from ..images import png
from .base import Item, read_range


def numbered_items(split: str, labels: Sequence[int | None], classes: list[str]) -> list[Item]:
    """Items of images in their published order; a key consists of the split and the position."""
    return [
        (None if label is None else classes[label], f"{split}-{number:06d}", (number,))
        for number, label in enumerate(labels)
    ]


def read_pixels(raw: Path, side_px: int, columns_first: bool, number: int) -> bytes:
    """Read image `number` from a file of consecutive (3, side_px, side_px) uint8 planes, and encode it as PNG.

    Args:
        raw: file of planes.
        side_px: height and width of an image in pixels.
        columns_first: whether each plane is stored column by column.
        number: position of the image.

    Raises:
        UserError: the file has become shorter or disappeared.
    """
    size = 3 * side_px**2
    content = read_range(raw, number * size, size)
    if len(content) < size:
        raise UserError(f"{raw} has become shorter; download it again.")
    planes = np.frombuffer(content, np.uint8).reshape(3, side_px, side_px)
    return png(np.ascontiguousarray(planes.transpose((2, 1, 0) if columns_first else (1, 2, 0))))
