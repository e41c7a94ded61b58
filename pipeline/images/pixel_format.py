"""Channels and bits of the images of a shard set, and decoding to them."""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from .arrays import NPY_MARK, npy_pixels
from .files import PNG_MARK, TIFF_MARKS, DecodeError, decode, gray_levels, open_unrotated

DAMAGED_TIFF = "a damaged or truncated TIFF, or one of an unusual kind"
PNG_GRAY = (0, 4)
"""PNG color types of one channel, without and with alpha (section 11.2.1 of the PNG specification)."""


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


class DeepImage(NamedTuple):
    """An image that is not an image file of 8 bits per channel, as described by its header."""

    pixel_format: PixelFormat
    height: int
    width: int
    extension: str
    """File extension under which `decode_pixels` decodes the file; "" if its pixels must be encoded again."""
    read: Callable[[], np.ndarray]
    """Decodes it to (H, W, C) of the format's dtype; raises DecodeError if it is damaged."""
    depth: int = 16
    """Bits that its levels have, 8 to 16; `--bits 8` keeps the upper eight."""


def decode_pixels(encoded: bytes, pixel_format: PixelFormat) -> np.ndarray | None:
    """Decode an image to (H, W, C) of the format's channels and dtype; None if it is damaged or has another format.

    Every image file decodes to 8-bit RGB (see `pipeline.images.files.decode`), also one with more bits, of which the
    upper eight are kept. Other formats are read from arrays (.npy), 16-bit PNGs, and TIFFs of one channel, as far as
    they have exactly this format. Alpha is dropped, and orientation tags are ignored.
    """
    if pixel_format == RGB8:
        return decode(encoded)
    try:
        pixels = _own_pixels(encoded)
    except DecodeError:
        return None
    return pixels if pixels.dtype == pixel_format.dtype and pixels.shape[2] == pixel_format.channels else None


def _own_pixels(encoded: bytes) -> np.ndarray:
    """Decode an image in its own depth, except image files with 8 bits."""
    if encoded.startswith(NPY_MARK):
        return npy_pixels(encoded)
    if encoded.startswith(TIFF_MARKS):
        return gray16_pixels(encoded)
    if png_format(encoded):
        return png16_pixels(encoded)
    raise DecodeError("neither an array nor an image file with more than 8 bits per channel")


def png_format(encoded: bytes) -> PixelFormat | None:
    """Format of a 16-bit PNG, without alpha; None for other files."""
    if encoded.startswith(PNG_MARK) and encoded[24:25] == b"\x10":
        return PixelFormat(1 if encoded[25] in PNG_GRAY else 3, 16)
    return None


def png16_pixels(encoded: bytes) -> np.ndarray:
    """Decode a 16-bit PNG to (H, W, 1 or 3) uint16.

    Raises:
        DecodeError: it is damaged or truncated. The decoder compares the checksums of all chunks with image data.
    """
    color = cv2.IMREAD_GRAYSCALE if encoded[25] in PNG_GRAY else cv2.IMREAD_COLOR_RGB
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), color | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise DecodeError("a damaged or truncated PNG")
    return pixels.reshape(*pixels.shape[:2], -1)


def gray16_pixels(encoded: bytes, page: int = 0) -> np.ndarray:
    """Decode a page of a TIFF of one channel with 12 or 16 bits to (H, W, 1) uint16; 12 bits keep their levels.

    Raises:
        DecodeError: it is damaged, truncated or of another kind.
    """
    try:
        with open_unrotated(encoded, page) as image:
            pixels = gray_levels(image)[0] if image.mode.startswith("I;16") else None
    except Exception as error:  # Pillow raises many exception types for damaged files
        raise DecodeError(DAMAGED_TIFF) from error
    if pixels is None:
        raise DecodeError(DAMAGED_TIFF)
    return pixels[..., None]
