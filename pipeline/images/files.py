"""Image files of 8 bits per channel: supported formats, and decoding on the CPU to RGB."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    FILLORDER,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    STRIPBYTECOUNTS,
    STRIPOFFSETS,
    TILEBYTECOUNTS,
    TILEOFFSETS,
)

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
"""Pillow name of each format that every backend decodes (DALI reads neither GIF nor AVIF) -> extension in a shard."""
ARRAY_SUFFIX = "npy"
IMAGE_SUFFIXES = frozenset(["jpeg", "jpe", "jfif", "tiff", "dcm", ARRAY_SUFFIX, *EXTENSIONS.values()])
IMAGE_SUFFIXES |= {"gif", "avif", "heic", "heif"}  # listed as left out
LARGEST_PIXELS = 178_956_970
"""Largest image that Pillow opens: twice its MAX_IMAGE_PIXELS."""
TOO_LARGE = f"too large: more than {LARGEST_PIXELS:,} pixels"
JPEG_MARK, PNG_MARK, TIFF_MARKS = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"II", b"MM")
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
START_OF_SCAN, ADOBE, END_OF_IMAGE = 0xDA, 0xEE, b"\xff\xd9"
DEFLATE = (8, 32946)
WHITE_IS_ZERO = 0
"""Photometric interpretation of inverted TIFFs (TIFF 6.0, section 8), which Pillow inverts only at 8 bits."""
BLOCK_BYTES = 1 << 20

# Pillow warns about images above half of LARGEST_PIXELS, although it opens them
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DecodeError(ValueError):
    """An image cannot be decoded. If raised by a backend, `args[1]` is its position in the batch, if known."""


def decode(encoded: bytes) -> np.ndarray | None:
    """Decode an image to (H, W, 3) uint8 RGB; None if it is damaged.

    All backends follow this definition: the orientation tag is ignored, alpha is dropped (not multiplied into the
    colors), the upper eight bits of deeper values are kept, the first of several frames is used, and chroma of lower
    resolution is interpolated.
    """
    by_pillow = encoded.startswith(TIFF_MARKS)
    if encoded.startswith(JPEG_MARK):
        jpeg = _jpeg_header(encoded)
        if jpeg is None:
            return None
        by_pillow = jpeg.channels == 4
    if by_pillow:
        return _decode_by_pillow(encoded)
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # raised for empty input and huge images; damaged ones return None
        return None


def contains(height: int, width: int, crops: np.ndarray) -> bool:
    """Whether crops, (V, 4) rows of top, left, height, width, lie inside the image; if not, its index is wrong."""
    return bool((crops[:, :2] + crops[:, 2:] <= (height, width)).all())


def decodes_alike(encoded: bytes) -> bool:
    """Whether DALI decodes an image like `decode`, given that the image is intact.

    True for PNG, WebP and JPEG files except CMYK JPEGs, which decoders invert inconsistently, and truncated JPEGs,
    which nvJPEG may decode without an error. False for TIFF and BMP, which have too many variants (orientation, alpha,
    1, 4 or 16 bits per pixel).
    """
    if encoded.startswith(JPEG_MARK):
        return (jpeg := _jpeg_header(encoded)) is not None and jpeg.channels != 4
    return encoded.startswith(PNG_MARK) or (encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP")


def nvjpeg_decodes_alike(encoded: bytes) -> bool:
    """Whether nvJPEG without options, as torchvision calls it, decodes an intact image like `decode`.

    True for complete JPEGs that are gray, or YCbCr with chroma of full resolution: chroma of lower resolution would be
    repeated instead of interpolated.
    """
    return encoded.startswith(JPEG_MARK) and (jpeg := _jpeg_header(encoded)) is not None and jpeg.plain


class _JpegHeader(NamedTuple):
    channels: int
    plain: bool
    """Whether the image is gray, or YCbCr with all channels of the same resolution."""


def _jpeg_header(encoded: bytes) -> _JpegHeader | None:
    """Read the header of a JPEG; None if the file is truncated or has no image.

    OpenCV, Pillow and DALI's decoder on the CPU refuse a file without an end-of-image marker, even if only the marker
    is missing; nvJPEG may not. The marker is searched behind the first scan's header, because a thumbnail in the header
    has one too, and from the end, where it is in most files. Inside a scan, it cannot occur as data.
    """
    frame, adobe = b"", False
    for marker, at in _jpeg_segments(encoded):
        if marker in START_OF_FRAME:
            frame = encoded[at + 2 : at + 20]  # precision, height, width, channels, (name, sampling, table) of each
        adobe |= marker == ADOBE  # may declare RGB
        if marker == START_OF_SCAN:
            if len(frame) < 6 or encoded.rfind(END_OF_IMAGE, at) < 0:
                return None
            names, sampling = frame[6:15:3], frame[7:15:3]
            ycbcr = not adobe and frame[5] == 3 and names == b"\1\2\3"
            return _JpegHeader(frame[5], frame[5] == 1 or (ycbcr and len(set(sampling)) == 1))
    return None


def _jpeg_segments(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, position of the two bytes of its length) of each segment of a JPEG up to the end of the file."""
    at = encoded.find(b"\xff", 2)  # decoders skip bytes between segments
    while 0 <= at < len(encoded) - 3:
        marker = encoded[at + 1]
        if marker == 0xFF:  # a marker may be preceded by any number of bytes 0xFF
            at += 1
        elif marker <= 1 or 0xD0 <= marker <= 0xD8:  # no marker, or one without a segment
            at += 2
        else:
            yield marker, at + 2
            at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
        at = encoded.find(b"\xff", at)


def _decode_by_pillow(encoded: bytes) -> np.ndarray | None:
    """Decode formats that OpenCV does not decode faithfully.

    OpenCV rotates TIFFs even if told not to, premultiplies their alpha and fills damaged strips without an error; CMYK
    images become one level too dark.
    """
    try:
        with open_unrotated(encoded) as image:
            if image.mode.startswith("I;16"):
                levels, bits = gray_levels(image)
                return cv2.cvtColor((levels >> bits - 8).astype(np.uint8), cv2.COLOR_GRAY2RGB)  # Pillow would clip
            if image.mode in ("I", "F"):  # 32-bit integers or floats, whose white level is unknown
                return None
            return np.array(image.convert("RGB"))
    except Exception:  # Pillow raises many exception types for damaged files
        return None


def gray_levels(image: Image.Image) -> tuple[np.ndarray, int]:
    """(H, W) uint16 levels of an open TIFF of mode I;16, of which the largest is white; and their bits, 12 or 16."""
    (bits,) = image.tag_v2[BITSPERSAMPLE]
    levels = np.asarray(image.copy()).astype(np.uint16)
    return (2**bits - 1 - levels if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO else levels), bits


def open_unrotated(encoded: bytes, page: int = 0) -> Image.Image:
    """Open a TIFF or JPEG with Pillow such that its orientation tag is ignored; raises many exception types.

    The image's size is still that after rotation; its copies and conversions have the right one.
    """
    image = Image.open(io.BytesIO(encoded), formats=["TIFF", "JPEG"])
    if page:
        image.seek(page)
    image.getexif()[ExifTags.Base.Orientation] = 1  # or Pillow would rotate the pixels of a TIFF
    return image


def png(pixels: np.ndarray) -> bytes:
    """Encode (H, W, 3) RGB or (H, W, 1) gray, uint8 or uint16, as PNG.

    The bytes depend on the pixels and the OpenCV version only.

    Raises:
        DecodeError: a side is too long for the encoder, which has a limit of a million pixels.
    """
    height, width, channels = pixels.shape
    encodes, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if channels == 3 else pixels)
    if not encodes:
        raise DecodeError(f"too long for a PNG: {width} x {height}")
    return encoded.tobytes()


def ppm(pixels: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 RGB as PPM: a header and the raw pixels."""
    height, width, _ = pixels.shape
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()


def read_header(encoded: bytes) -> tuple[str, int, int]:
    """Read (Pillow format, height, width in pixels) from the header of an image file.

    Raises:
        DecodeError: it is not an image of a supported format, or too large.
    """
    if size := _png_size(encoded):
        return "PNG", *size
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            form, (width, height) = image.format, image.size
            if form == "TIFF":  # whose size Pillow reports after rotation
                width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    except Image.DecompressionBombError as error:
        raise DecodeError(TOO_LARGE) from error
    except Exception as error:  # Pillow's plugins raise many exception types, AVIF's a RuntimeError
        if encoded[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
            raise DecodeError("HEIF is not a format that every backend decodes") from error
        raise DecodeError("not an image, or its header is damaged") from error
    if form not in EXTENSIONS:
        raise DecodeError(f"{form} is not a format that every backend decodes")
    return form, height, width


def _png_size(encoded: bytes) -> tuple[int, int] | None:
    """Read (height, width) of a PNG; None if it is not a PNG or its first chunk is damaged.

    Pillow silently refuses PNGs with a compressed comment of more than a megabyte.
    """
    header = encoded[12:29]
    if not encoded.startswith(PNG_MARK) or encoded[29:33] != struct.pack(">I", zlib.crc32(header)):
        return None
    _, width, height = struct.unpack(">4sII", header[:12])
    if height * width > LARGEST_PIXELS:
        raise DecodeError(TOO_LARGE)
    return (height, width) if height and width else None


def is_intact_jpeg(encoded: bytes, height: int, width: int) -> bool:
    """Decode at full size in gray, which takes two thirds of the time.

    All coefficients of all channels still pass through the entropy decoder, the only part of a JPEG decoder that can
    fail. This saves only the inverse DCT of the chroma and the conversion to RGB.
    """
    jpeg = _jpeg_header(encoded)
    if jpeg is None or jpeg.channels == 4:  # training decodes CMYK with Pillow, which may refuse other damage
        return False
    try:
        buffer = np.frombuffer(encoded, np.uint8)
        gray = cv2.imdecode(buffer, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return False
    return gray is not None and gray.shape == (height, width)


def verified_pixels(encoded: bytes, form: str) -> np.ndarray:
    """Decode an image of a Pillow format like `decode`.

    Raises:
        DecodeError: it is damaged.
    """
    pixels = decode(encoded)  # the decoder used in training may refuse what Pillow reads
    if pixels is None or (form == "TIFF" and not tiff_checksums_agree(encoded)):
        raise DecodeError(f"a damaged or truncated {form}, or one of an unusual kind")
    return pixels


def tiff_checksums_agree(encoded: bytes, page: int = 0) -> bool:
    """Whether each deflate-compressed strip or tile of a page ends with its checksum, which libtiff does not verify."""
    try:
        with open_unrotated(encoded, page) as image:
            tags = image.tag_v2
            if tags.get(COMPRESSION) not in DEFLATE or tags.get(FILLORDER, 1) != 1:
                return True
            offsets = chain(tags.get(STRIPOFFSETS, ()), tags.get(TILEOFFSETS, ()))
            sizes = chain(tags.get(STRIPBYTECOUNTS, ()), tags.get(TILEBYTECOUNTS, ()))
            return all(_inflates(encoded[at : at + size]) for at, size in zip(offsets, sizes, strict=True))
    except Exception:  # see _decode_by_pillow
        return False


def _inflates(block: bytes) -> bool:
    inflate = zlib.decompressobj()
    while block and not inflate.eof:  # in parts, because a malicious block may inflate a thousandfold
        inflate.decompress(block, BLOCK_BYTES)
        block = inflate.unconsumed_tail
    return inflate.eof
