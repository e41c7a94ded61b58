"""Encoded images: which formats are taken, how the host decodes them, and what of them goes into a shard."""

import io
import struct
import warnings
import zlib
from itertools import chain

import cv2
import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import (
    COMPRESSION,
    FILLORDER,
    IMAGELENGTH,
    IMAGEWIDTH,
    STRIPBYTECOUNTS,
    STRIPOFFSETS,
    TILEBYTECOUNTS,
    TILEOFFSETS,
)

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
"""Image formats that every backend decodes (DALI reads neither GIF nor AVIF), and how they are named in a shard."""
IMAGE_SUFFIXES = frozenset(["jpeg", "tiff", "gif", "avif", *EXTENSIONS.values()])
QUALITY = 90
"""JPEG quality of images that are made smaller."""
LARGEST_PIXELS = 178_956_970
"""Limit of Pillow, which opens no larger image: twice its MAX_IMAGE_PIXELS."""
TOO_LARGE = f"too large: more than {LARGEST_PIXELS:,} pixels"
JPEG_MARK, PNG_MARK, TIFF_MARKS = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"II", b"MM")
DEFLATE = (8, 32946)
BLOCK_BYTES = 1 << 20

# Pillow warns about images above half of LARGEST_PIXELS, although it opens them.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DecodeError(ValueError):
    """An image can't be decoded; raised by a backend, `args[1]` (where it is known) is its place in the batch."""


def decode(encoded: bytes) -> np.ndarray | None:
    """Decode an image to (H, W, 3) uint8 RGB, or to None if it is damaged.

    Every backend follows this definition: the orientation tag is ignored, alpha is dropped (not multiplied into the
    colors), the upper byte of 16 bits is kept, and the first of several frames is taken.
    """
    if encoded.startswith(TIFF_MARKS) or _is_cmyk_jpeg(encoded):
        return _decode_by_pillow(encoded)
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # raised for no bytes at all and for gigantic images, where damaged ones give None
        return None


def contains(height: int, width: int, crops: np.ndarray) -> bool:
    """Whether crops, (V, 4) rows of top, left, height, width, lie inside an image; they don't if its index is wrong."""
    return bool((crops[:, :2] + crops[:, 2:] <= (height, width)).all())


def decodes_alike(encoded: bytes) -> bool:
    """Whether DALI and nvJPEG can be trusted to decode an image like `decode`.

    True for PNG, WebP and JPEG files, but not for CMYK JPEGs, which decoders invert or not; TIFF and BMP have too many
    variants (orientation, alpha, 1, 4 or 16 bits per pixel).
    """
    if encoded.startswith(JPEG_MARK):
        return not _is_cmyk_jpeg(encoded)
    return encoded.startswith(PNG_MARK) or (encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP")


def _is_cmyk_jpeg(encoded: bytes) -> bool:
    """Whether the first start of frame of a JPEG names four channels."""
    at = 2 if encoded.startswith(JPEG_MARK) else len(encoded)
    while at + 9 < len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return encoded[at + 9] == 4
        # a marker may be preceded by any number of bytes 0xFF
        at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return False


def _decode_by_pillow(encoded: bytes) -> np.ndarray | None:
    """Decode what OpenCV does not decode faithfully.

    It rotates TIFFs even if told not to, premultiplies their alpha and fills in damaged strips without an error; of
    CMYK it makes colors that are a level too dark.
    """
    try:
        with _open_unrotated(encoded) as image:
            if image.mode.startswith("I;16"):
                levels = (np.asarray(image) >> 8).astype(np.uint8)  # Pillow would clip at 255
                return cv2.cvtColor(levels, cv2.COLOR_GRAY2RGB)
            if image.mode in ("I", "F"):  # 32 bits or floats, whose white nobody knows
                return None
            return np.array(image.convert("RGB"))
    except Exception:  # Pillow raises many kinds on damage
        return None


def _open_unrotated(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded), formats=["TIFF", "JPEG"])
    image.getexif()[ExifTags.Base.Orientation] = 1  # which Pillow would otherwise apply to the pixels of a TIFF
    return image


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
    encodes, jpeg = cv2.imencode(".jpg", cv2.cvtColor(smaller, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not encodes:
        raise DecodeError(f"too long for a JPEG whose short side has {short_side} pixels: {width} x {height}")
    return ("jpg", height, width), jpeg.tobytes()


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as PNG: the same bytes for the same pixels and OpenCV version."""
    _, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    return encoded.tobytes()


def ppm(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as PPM: a header and the pixels."""
    height, width, _ = pixels.shape
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()


def _header(encoded: bytes) -> tuple[str, int, int]:
    """(format, height, width) as the header says."""
    if size := _png_size(encoded):
        return "PNG", *size
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            form, (width, height) = image.format, image.size
            if form == "TIFF":  # whose size Pillow gives after rotation
                width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    except Image.DecompressionBombError as error:
        raise DecodeError(TOO_LARGE) from error
    except Exception as error:  # each of Pillow's plugins raises what it likes on damage, AVIF's a RuntimeError
        raise DecodeError("not an image, or its header is damaged") from error
    if form not in EXTENSIONS:
        raise DecodeError(f"{form} is not a format that every backend decodes")
    return form, height, width


def _png_size(encoded: bytes) -> tuple[int, int] | None:
    """(height, width) of a PNG; None if its first chunk is damaged.

    Pillow opens no PNG that has a compressed comment of more than a megabyte, and does not say so.
    """
    header = encoded[12:29]
    if not encoded.startswith(PNG_MARK) or encoded[29:33] != struct.pack(">I", zlib.crc32(header)):
        return None
    _, width, height = struct.unpack(">4sII", header[:12])
    if height * width > LARGEST_PIXELS:
        raise DecodeError(TOO_LARGE)
    return (height, width) if height and width else None


def _is_whole_jpeg(encoded: bytes, height: int, width: int) -> bool:
    """Decode at full size in gray, in two thirds of the time.

    Every coefficient of every channel still goes through the entropy decoder, the only part of a JPEG decoder that can
    fail. What is saved is arithmetic: the inverse DCT of the chroma and the conversion to RGB.
    """
    if _is_cmyk_jpeg(encoded):  # training decodes it by Pillow, which may refuse other damage
        return False
    try:
        buffer = np.frombuffer(encoded, np.uint8)
        gray = cv2.imdecode(buffer, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return False
    return gray is not None and gray.shape == (height, width)


def _pixels(encoded: bytes, form: str) -> np.ndarray:
    pixels = decode(encoded)  # by the decoder that training uses: what Pillow reads, it may refuse
    if pixels is None or (form == "TIFF" and not _tiff_checksums_agree(encoded)):
        raise DecodeError(f"a damaged or truncated {form}, or one of an unusual kind")
    return pixels


def _tiff_checksums_agree(encoded: bytes) -> bool:
    """Whether every strip or tile compressed by deflate has the checksum at its end, which libtiff does not read."""
    try:
        with _open_unrotated(encoded) as image:
            tags = image.tag_v2
            if tags.get(COMPRESSION) not in DEFLATE or tags.get(FILLORDER, 1) != 1:
                return True
            offsets = chain(tags.get(STRIPOFFSETS, ()), tags.get(TILEOFFSETS, ()))
            sizes = chain(tags.get(STRIPBYTECOUNTS, ()), tags.get(TILEBYTECOUNTS, ()))
            return all(_inflates(encoded[at : at + size]) for at, size in zip(offsets, sizes, strict=True))
    except Exception:  # as above
        return False


def _inflates(block: bytes) -> bool:
    inflate = zlib.decompressobj()
    while block and not inflate.eof:  # by parts: a hostile block may inflate to a thousand times its size
        inflate.decompress(block, BLOCK_BYTES)
        block = inflate.unconsumed_tail
    return inflate.eof
