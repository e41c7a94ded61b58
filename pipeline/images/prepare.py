"""Preparation of an image for a shard: determine its format, verify it, and shrink or encode it if necessary."""

from typing import NamedTuple

import cv2
import numpy as np

from .arrays import NPY_MARK, npy_bytes, npy_pixels
from .dicom import is_dicom, open_dicom
from .files import EXTENSIONS, TIFF_MARKS, DecodeError, is_intact_jpeg, png, read_header, verified_pixels
from .pixel_format import RGB8, DeepImage, PixelFormat, png16_pixels, png_format
from .tiff import open_tiff

QUALITY = 90
"""JPEG quality of shrunk images."""


class Prepared(NamedTuple):
    """An image as a shard holds it."""

    form: tuple[str, int, int]
    """(file extension, height, width), with sizes in pixels."""
    encoded: bytes
    """Content that `pipeline.images.pixel_format.decode_pixels` decodes."""
    pixel_format: PixelFormat


def prepare(
    encoded: bytes,
    verify: bool = True,
    short_side: int | None = None,
    quality: int = QUALITY,
    bits: int | None = None,
    pages_as_channels: bool = False,
) -> Prepared:
    """Prepare an image for a shard.

    Files that `decode_pixels` decodes keep their bytes. Other pixels, those of DICOM files and of TIFFs with several
    channels of 16 bits, are stored as PNG if they have one channel of 16 bits or three, else as .npy.

    Args:
        encoded: content of the file.
        verify: whether to decode it completely (a JPEG in gray); False parses only the header of files that keep their
            bytes, so that a truncated image or damage behind the header is not noticed.
        short_side: length in pixels to which longer short sides are shrunk with an area filter in the image's own
            depth; 8-bit RGB as JPEG, other formats without loss. None shrinks no image.
        quality: JPEG quality of shrunk images, 1 to 100.
        bits: 8 keeps the upper eight bits of deeper images; None keeps all.
        pages_as_channels: whether each page of a TIFF is a channel, instead of using the first page.

    Raises:
        DecodeError: the image cannot be used; the message is the reason.
        UserError: the package that reads it is not installed.
    """
    if image := open_deep(encoded, bits, pages_as_channels):
        return _prepare_deep(image, encoded, verify, short_side)
    form, height, width = read_header(encoded)
    if short_side is None or min(height, width) <= short_side:
        if verify and not (EXTENSIONS[form] == "jpg" and is_intact_jpeg(encoded, height, width)):
            height, width = verified_pixels(encoded, form).shape[:2]
        return Prepared((EXTENSIONS[form], height, width), encoded, RGB8)
    pixels = _shrunk(verified_pixels(encoded, form), short_side)
    height, width = pixels.shape[:2]
    encodes, jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not encodes:
        raise DecodeError(f"too long for a JPEG whose short side has {short_side} pixels: {width} x {height}")
    return Prepared(("jpg", height, width), jpeg.tobytes(), RGB8)


def read_format(encoded: bytes, bits: int | None = None, pages_as_channels: bool = False) -> PixelFormat:
    """Format of an image by its header; arguments and errors as in `prepare`."""
    if image := open_deep(encoded, bits, pages_as_channels):
        return image.pixel_format
    read_header(encoded)
    return RGB8


def open_deep(encoded: bytes, bits: int | None = None, pages_as_channels: bool = False) -> DeepImage | None:
    """Describe an image by its header; None for an image file of 8 bits per channel, or one that is damaged.

    Arguments and errors as in `prepare`.
    """
    image = None
    if encoded.startswith(NPY_MARK):
        pixels = npy_pixels(encoded)
        pixel_format = PixelFormat(pixels.shape[2], 8 * pixels.itemsize)
        extension = "" if pixel_format == RGB8 else "npy"  # every backend reads 8-bit RGB, but from image files
        image = DeepImage(pixel_format, *pixels.shape[:2], extension, lambda: pixels)
    elif is_dicom(encoded):
        image = open_dicom(encoded)
    elif encoded.startswith(TIFF_MARKS):
        image = open_tiff(encoded, bits, pages_as_channels)
    elif bits != 8 and (pixel_format := png_format(encoded)):
        _, height, width = read_header(encoded)
        image = DeepImage(pixel_format, height, width, "png", lambda: png16_pixels(encoded))
    if not image or bits is None or image.pixel_format.bits == 8:
        return image
    channels = image.pixel_format.channels
    repeats = 3 if channels == 1 and not encoded.startswith(NPY_MARK) else 1  # gray image files count as RGB

    def upper_byte() -> np.ndarray:
        return np.repeat((image.read() >> image.depth - 8).astype(np.uint8), repeats, 2)

    return DeepImage(PixelFormat(channels * repeats, 8), image.height, image.width, "", upper_byte)


def _prepare_deep(image: DeepImage, encoded: bytes, verify: bool, short_side: int | None) -> Prepared:
    shrinks = short_side is not None and min(image.height, image.width) > short_side
    if image.extension and not shrinks:
        height, width = image.read().shape[:2] if verify else (image.height, image.width)
        return Prepared((image.extension, height, width), encoded, image.pixel_format)
    pixels = _shrunk(image.read(), short_side) if shrinks else image.read()
    lossless = image.pixel_format in (RGB8, PixelFormat(1, 16), PixelFormat(3, 16))
    extension, stored = ("png", png(pixels)) if lossless else ("npy", npy_bytes(pixels))
    return Prepared((extension, *pixels.shape[:2]), stored, image.pixel_format)


def _shrunk(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """Shrink (H, W, C) uint8 or uint16 pixels to a short side in pixels."""
    sides = pixels.shape[:2]
    scale = short_side / min(sides)
    height, width = (max(short_side, round(side * scale)) for side in sides)
    # the area filter takes at most four channels, except for whole scales
    groups = (pixels[..., first : first + 4] for first in range(0, pixels.shape[2], 4))
    shrunk = (cv2.resize(group, (width, height), interpolation=cv2.INTER_AREA) for group in groups)
    return np.concatenate([group.reshape(height, width, -1) for group in shrunk], 2)
