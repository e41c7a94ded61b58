"""TIFFs beyond 8-bit RGB: 16 bits per channel, more than four channels, or a channel per page.

Pillow reads one channel per page. It keeps only the upper byte of other 16-bit images and opens at most six channels,
so these are read by the package tifffile.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    ImageFileDirectory_v2,
)

from ..common import UserError
from .arrays import MOST_CHANNELS
from .files import LARGEST_PIXELS, TOO_LARGE, DecodeError, open_unrotated, tiff_checksums_agree
from .pixel_format import DAMAGED_TIFF, DeepImage, PixelFormat, gray16_pixels

UNSIGNED, RGB, ALPHA, BIG_TIFF = 1, 2, (1, 2), 43
"""Values of SampleFormat, PhotometricInterpretation and ExtraSamples (TIFF 6.0, sections 8 and 19), and the version."""
TAGS = (IMAGELENGTH, IMAGEWIDTH, SAMPLESPERPIXEL, BITSPERSAMPLE, SAMPLEFORMAT, PHOTOMETRIC_INTERPRETATION, EXTRASAMPLES)


def open_tiff(encoded: bytes, bits: int | None = None, pages_as_channels: bool = False) -> DeepImage | None:
    """Describe a TIFF from its header; None for one that `pipeline.images.files.decode` decodes, or that is no TIFF.

    Alpha is dropped, as far as ExtraSamples declares it, or four samples are RGB without such a declaration.

    Args:
        encoded: content of the file.
        bits: 8 for images that `pipeline.images.files.decode` reduces to 8 bits.
        pages_as_channels: whether each page is a channel, instead of using the first page.

    Raises:
        DecodeError: the header is truncated, the pages are not alike, or there are more than 16 channels.
        UserError: the package tifffile or imagecodecs is required, but not installed.
    """
    if pages_as_channels:
        return _open_pages(encoded)
    tags = _tags(encoded)
    height, width, samples = (tags.get(tag, 1) for tag in (IMAGELENGTH, IMAGEWIDTH, SAMPLESPERPIXEL))
    depths = set(tags.get(BITSPERSAMPLE, ()))
    unsigned = set(tags.get(SAMPLEFORMAT, (UNSIGNED,))) == {UNSIGNED}
    reduces = depths == {8} or bits == 8
    if depths not in ({8}, {12}, {16}) or not unsigned or (reduces and samples <= 4 and _opens(encoded)):
        return None
    if height * width > LARGEST_PIXELS:
        raise DecodeError(TOO_LARGE)
    if samples == 1:
        return DeepImage(PixelFormat(1, 16), height, width, "tif", lambda: _page(encoded, 0))
    extra = tags.get(EXTRASAMPLES, ALPHA[:1] if samples == 4 and tags.get(PHOTOMETRIC_INTERPRETATION) == RGB else ())
    kinds = [*[None] * (samples - len(extra)), *extra][:samples]
    kept = [place for place, kind in enumerate(kinds) if kind not in ALPHA]
    if len(kept) > MOST_CHANNELS:
        raise DecodeError(f"{len(kept)} channels; images may have at most {MOST_CHANNELS}")
    (depth,) = depths
    pixel_format = PixelFormat(len(kept), 8 if depth == 8 else 16)
    _import_tifffile(pixel_format)

    def read() -> np.ndarray:
        return np.ascontiguousarray(_by_tifffile(encoded, (height, width, samples))[..., kept], pixel_format.dtype)

    return DeepImage(pixel_format, height, width, "", read, depth)


@contextmanager
def _damage() -> Iterator[None]:
    """Turn errors of the libraries, which raise many types for damaged files, into DecodeErrors.

    A missing package is a UserError: an image that it can read must not be left out as damaged.
    """
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        if "imagecodecs" in str(error) and not find_spec("imagecodecs"):
            raise UserError(
                "Reading a TIFF of this compression requires the package imagecodecs: pip install imagecodecs, or save "
                "it uncompressed or deflated."
            ) from error
        raise DecodeError(DAMAGED_TIFF) from error


def _pages(encoded: bytes) -> Iterator[ImageFileDirectory_v2]:
    """Tags of each page, valid until the next. Pillow opens only pages that it can decode, and skips truncated ones.

    Raises:
        DecodeError: the list of tags leads out of the file.
    """
    file = io.BytesIO(encoded)
    big = encoded[2] == BIG_TIFF
    tags = ImageFileDirectory_v2(file.read(16 if big else 8))
    count_bytes, entry_bytes, next_bytes = (8, 20, 8) if big else (2, 12, 4)
    at = tags.next
    while at:
        entries = int.from_bytes(encoded[at : at + count_bytes], "little" if encoded.startswith(b"II") else "big")
        if at + count_bytes + entries * entry_bytes + next_bytes > len(encoded):
            raise DecodeError(DAMAGED_TIFF)
        file.seek(at)
        tags.load(file)
        yield tags
        at = tags.next


def _tags(encoded: bytes) -> dict[int, Any]:
    """Tags of the first page, {} if they can't be read; raises DecodeError if they are truncated."""
    try:
        tags = next(_pages(encoded))
        return {tag: tags[tag] for tag in TAGS if tag in tags}
    except DecodeError:
        raise
    except Exception:  # see _damage
        return {}


def _opens(encoded: bytes) -> bool:
    try:
        open_unrotated(encoded).close()
    except Exception:  # see _damage
        return False
    return True


def _open_pages(encoded: bytes) -> DeepImage:
    with _damage():
        count = sum(1 for _ in islice(_pages(encoded), MOST_CHANNELS + 1))
    if count > MOST_CHANNELS:
        raise DecodeError(f"more than {MOST_CHANNELS} pages; images may have at most {MOST_CHANNELS} channels")
    with _damage(), Image.open(io.BytesIO(encoded), formats=["TIFF"]) as image:
        kinds = []
        for page in range(count):
            image.seek(page)
            depth = image.tag_v2.get(BITSPERSAMPLE, (1,))[0]
            kinds.append((image.mode, image.tag_v2[IMAGELENGTH], image.tag_v2[IMAGEWIDTH], depth))
    mode, height, width, depth = kinds[0]
    if mode != "L" and not mode.startswith("I;16"):
        raise DecodeError(f"pages of mode {mode}; pages that are channels must have one channel of 8 or 16 bits")
    if different := next((page for page, kind in enumerate(kinds) if kind != kinds[0]), 0):
        raise DecodeError(f"page {different + 1} differs from the first one in size or depth")

    def read() -> np.ndarray:
        return np.concatenate([_page(encoded, page) for page in range(count)], 2)

    return DeepImage(PixelFormat(count, 8 if mode == "L" else 16), height, width, "", read, depth)


def _page(encoded: bytes, page: int) -> np.ndarray:
    """(H, W, 1) uint8 or uint16."""
    with _damage(), open_unrotated(encoded, page) as image:
        pixels = np.asarray(image.copy())[..., None] if image.mode == "L" else gray16_pixels(encoded, page)
    if not tiff_checksums_agree(encoded, page):
        raise DecodeError(DAMAGED_TIFF)
    return pixels


def _import_tifffile(pixel_format: PixelFormat) -> None:
    try:
        import tifffile  # noqa: F401
    except ImportError as error:
        kind = "or use --bits 8 for its upper eight bits" if pixel_format.channels == 3 else "or save it as .npy"
        raise UserError(
            f"Reading a TIFF of {pixel_format} requires the package tifffile: pip install tifffile, {kind}."
        ) from error


def _by_tifffile(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """All samples, those of alpha included."""
    import tifffile

    with _damage(), tifffile.TiffFile(io.BytesIO(encoded)) as file:
        page = file.pages.first
        pixels = page.asarray()
        if page.axes.startswith("S"):  # a plane per channel
            pixels = np.moveaxis(pixels, 0, 2)
        if pixels.shape != shape:
            raise DecodeError(DAMAGED_TIFF)
        return pixels
