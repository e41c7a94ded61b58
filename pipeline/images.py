"""Encoded images: which formats are taken, and how the host decodes them."""

import io

import cv2
import numpy as np
from PIL import Image

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
"""Image formats that every backend decodes (DALI reads neither GIF nor AVIF), and how they are named in a shard."""
IMAGE_SUFFIXES = frozenset(["jpeg", "tiff", "gif", "avif", *EXTENSIONS.values()])


class DecodeError(ValueError):
    """An image can't be decoded; raised by a backend, `args[1]` (where it is known) is its place in the batch."""


def decode(encoded: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB, EXIF orientation not applied; None if the bytes are no whole image."""
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # raised for no bytes at all and for gigantic images, where damaged ones give None
        return None


def inspect(encoded: bytes) -> tuple[str, int, int]:
    """Decode once and report (file extension, height, width).

    Raises:
        DecodeError: why the image can't be used.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            form = image.format
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's on damaged headers
        raise DecodeError("not an image, or its header is damaged") from error
    if form not in EXTENSIONS:
        raise DecodeError(f"{form} is not a format that every backend decodes")
    pixels = decode(encoded)  # by the decoder that training uses: what Pillow reads, it may refuse
    if pixels is None:
        raise DecodeError(f"a damaged or truncated {form}, or one of an unusual kind")
    return EXTENSIONS[form], *pixels.shape[:2]
