"""Channels and bits of the images of a shard set, and decoding to them."""

import io
from typing import NamedTuple

import cv2
import numpy as np

from .images import PNG_MARK, decode

NPY_MARK = b"\x93NUMPY"


class PixelFormat(NamedTuple):
    """What the images of a set have in common, whatever their file format."""

    channels: int = 3
    """Number of channels, 1 to 16. Images with three channels are RGB."""
    bits: int = 8
    """Bits per channel, 8 or 16."""

    @property
    def white(self) -> int:
        """Largest level, 255 or 65535; views are normalized as levels / white."""
        return 2**self.bits - 1

    @property
    def dtype(self) -> np.dtype:
        """uint8 or uint16."""
        return np.dtype(f"u{self.bits // 8}")

    def __str__(self) -> str:
        kind = {1: "gray", 3: "RGB"}.get(self.channels, f"{self.channels} channels")
        return f"{kind}, {self.bits} bits"


RGB8 = PixelFormat()


def decode_pixels(encoded: bytes, pixel_format: PixelFormat) -> np.ndarray | None:
    """Decode an image to (H, W, C) of the format's channels and dtype; None if it is damaged or has another format.

    Every image file decodes to 8-bit RGB (see `pipeline.images.decode`), also one with more bits, of which the upper
    eight are kept. To any other format decode only images that have it.
    """
    if pixel_format == RGB8:
        return decode(encoded)
    if encoded.startswith(NPY_MARK):
        try:
            pixels = np.load(io.BytesIO(encoded), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
    elif encoded.startswith(PNG_MARK):
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is not None and pixels.ndim == 3:
            pixels = cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2RGB)
    else:
        return None
    if pixels is None or pixels.dtype != pixel_format.dtype:
        return None
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels if pixels.shape[2] == pixel_format.channels else None
