"""Encoded images: which formats are taken, how the host decodes them, and what of them goes into a shard."""

import io

import cv2
import numpy as np
from PIL import Image

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
"""Image formats that every backend decodes (DALI reads neither GIF nor AVIF), and how they are named in a shard."""
IMAGE_SUFFIXES = frozenset(["jpeg", "tiff", "gif", "avif", *EXTENSIONS.values()])
QUALITY = 90
"""JPEG quality of images that are made smaller."""


class DecodeError(ValueError):
    """An image can't be decoded; raised by a backend, `args[1]` (where it is known) is its place in the batch."""


def decode(encoded: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB, EXIF orientation not applied; None if the bytes are no whole image."""
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # raised for no bytes at all and for gigantic images, where damaged ones give None
        return None


def inspect(encoded: bytes, verify: bool = True) -> tuple[str, int, int]:
    """Decode once and report (file extension, height, width).

    Args:
        verify: decode to the last pixel, a JPEG in gray; False parses the header alone, so an image that is cut off or
            damaged further on goes unnoticed.

    Raises:
        DecodeError: why the image can't be used.
    """
    return _inspect(encoded, verify, *_header(encoded))


def _inspect(encoded: bytes, verify: bool, form: str, height: int, width: int) -> tuple[str, int, int]:
    if verify and not (EXTENSIONS[form] == "jpg" and _is_whole_jpeg(encoded, height, width)):
        height, width = _pixels(encoded, form).shape[:2]
    return EXTENSIONS[form], height, width


def prepare(
    encoded: bytes, verify: bool = True, short_side: int | None = None, quality: int = QUALITY
) -> tuple[tuple[str, int, int], bytes]:
    """What goes into a shard for an image: ((file extension, height, width), encoded image).

    Args:
        verify: as for `inspect`; an image that is made smaller is decoded in any case.
        short_side: an image whose shorter side has more pixels becomes a JPEG of this many, by an area filter; any
            other keeps its bytes.
        quality: of that JPEG, 1 to 100.

    Raises:
        DecodeError: why the image can't be used.
    """
    form, height, width = _header(encoded)
    if short_side is None or min(height, width) <= short_side:
        return _inspect(encoded, verify, form, height, width), encoded
    pixels = _pixels(encoded, form)
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    height, width = (max(short_side, round(side * scale)) for side in (height, width))
    smaller = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(smaller, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return ("jpg", height, width), jpeg.tobytes()


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as PNG: the same bytes for the same pixels and OpenCV version."""
    _, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    return encoded.tobytes()


def _header(encoded: bytes) -> tuple[str, int, int]:
    """(format, height, width) as the header says."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            form, (width, height) = image.format, image.size
    except Exception as error:  # each of Pillow's plugins raises what it likes on damage, AVIF's a RuntimeError
        raise DecodeError("not an image, or its header is damaged") from error
    if form not in EXTENSIONS:
        raise DecodeError(f"{form} is not a format that every backend decodes")
    return form, height, width


def _is_whole_jpeg(encoded: bytes, height: int, width: int) -> bool:
    """Decode at full size in gray, in two thirds of the time.

    Every coefficient of every channel still goes through the entropy decoder, the only part of a JPEG decoder that can
    fail. What is saved is arithmetic: the inverse DCT of the chroma and the conversion to RGB.
    """
    try:
        buffer = np.frombuffer(encoded, np.uint8)
        gray = cv2.imdecode(buffer, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return False
    return gray is not None and gray.shape == (height, width)


def _pixels(encoded: bytes, form: str) -> np.ndarray:
    pixels = decode(encoded)  # by the decoder that training uses: what Pillow reads, it may refuse
    if pixels is None:
        raise DecodeError(f"a damaged or truncated {form}, or one of an unusual kind")
    return pixels
