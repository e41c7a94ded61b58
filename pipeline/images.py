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
        verify: False parses the header alone, so an image that is cut off or damaged further on goes unnoticed.

    Raises:
        DecodeError: why the image can't be used.
    """
    return _opened(encoded, verify)[0]


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
    form, pixels = _opened(encoded, verify)
    height, width = form[1:]
    if short_side is None or min(height, width) <= short_side:
        return form, encoded
    if pixels is None:
        pixels = _whole(encoded, form[0])
    scale = short_side / min(height, width)
    height, width = (max(short_side, round(side * scale)) for side in (height, width))
    smaller = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(smaller, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return ("jpg", height, width), jpeg.tobytes()


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as PNG: the same bytes for the same pixels and OpenCV version."""
    _, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    return encoded.tobytes()


def _opened(encoded: bytes, verify: bool) -> tuple[tuple[str, int, int], np.ndarray | None]:
    """(file extension, height, width), and the pixels if they were decoded."""
    if verify and encoded.startswith(b"\xff\xd8\xff"):  # spares nearly every image Pillow's reading of the header
        form, size = "JPEG", None
    else:
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                form, size = image.format, image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's on damaged headers
            raise DecodeError("not an image, or its header is damaged") from error
    if form not in EXTENSIONS:
        raise DecodeError(f"{form} is not a format that every backend decodes")
    if not verify:
        return (EXTENSIONS[form], size[1], size[0]), None
    pixels = _whole(encoded, form)
    return (EXTENSIONS[form], *pixels.shape[:2]), pixels


def _whole(encoded: bytes, form: str) -> np.ndarray:
    pixels = decode(encoded)  # by the decoder that training uses: what Pillow reads, it may refuse
    if pixels is None:
        raise DecodeError(f"a damaged or truncated {form}, or one of an unusual kind")
    return pixels
