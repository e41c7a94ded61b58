"""Images stored as NumPy arrays (.npy), read without NumPy's own parser.

That parser evaluates the header as Python, which in Python 3.11 occasionally fails if two threads do it at once, and
reading from memory allocates whatever the header claims. The format is described in
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

import io
import re

import numpy as np

from .files import LARGEST_PIXELS, TOO_LARGE, DecodeError

NPY_MARK = b"\x93NUMPY"
MOST_CHANNELS = 16
BYTE_ORDERS = "<>|="
KINDS = {"f": "floats", "i": "signed integers", "u": "integers of more than 16 bits", "b": "booleans"}
FIELDS = [
    r"'descr'\s*:\s*'([^']*)'",
    r"'fortran_order'\s*:\s*(True|False)",
    r"'shape'\s*:\s*\(((?:\d{1,12}, ?)*(?:\d{1,12})?)\)",
]
"""Fields of the header: data type, order of the axes, shape."""


def npy_pixels(encoded: bytes) -> np.ndarray:
    """Read an image of 1 to 16 channels from a .npy file; returns a new (H, W, C) uint8 or uint16 array.

    The file holds (H, W), one channel; (H, W, C); or (C, H, W) if its last axis is longer than 16 and its first is not.

    Raises:
        DecodeError: the file is truncated or damaged, or holds an array of another type or shape.
    """
    start = 10 if encoded[6:7] == b"\1" else 12  # version 1.0 has a length of two bytes, later ones of four
    offset = start + int.from_bytes(encoded[8:start], "little")
    header = encoded[start:offset].decode("latin-1")
    found = [re.search(field, header) for field in FIELDS]
    if "'descr'" in header and not found[0]:
        raise DecodeError("an array of several fields; save one uint8 or uint16 array per image")
    if None in found or found[0][1][:1] not in BYTE_ORDERS or not encoded.startswith(NPY_MARK):
        raise DecodeError("not an array, or its header is damaged")
    descr, fortran_order, axes = (match[1] for match in found)
    shape = tuple(int(axis) for axis in axes.split(",") if axis.strip())
    if descr[1:] not in ("u1", "u2"):
        raise DecodeError(_wrong_type(descr))
    channels_first = len(shape) == 3 and shape[0] <= MOST_CHANNELS < shape[2]
    if len(shape) not in (2, 3) or 0 in shape:
        raise DecodeError(f"an array of shape {shape}; images are (H, W), (H, W, C) or (C, H, W)")
    if len(shape) == 3 and not channels_first and shape[2] > MOST_CHANNELS:
        raise DecodeError(
            f"an array of shape {shape}, of which neither the first nor the last axis is at most {MOST_CHANNELS}; save "
            f"at most {MOST_CHANNELS} channels per image"
        )
    height, width = shape[1:] if channels_first else shape[:2]
    if height * width > LARGEST_PIXELS:
        raise DecodeError(TOO_LARGE)
    if offset + np.prod(shape, dtype=object) * int(descr[2]) != len(encoded):
        raise DecodeError("a damaged or truncated array")
    pixels = np.frombuffer(encoded, descr, offset=offset).reshape(shape, order="F" if fortran_order == "True" else "C")
    pixels = np.moveaxis(pixels, 0, 2) if channels_first else pixels.reshape(height, width, -1)
    return pixels.astype(f"u{descr[2]}", order="C")


def _wrong_type(descr: str) -> str:
    if descr[1:].startswith("O"):
        return "an array of Python objects, which are not read; save it as uint8 or uint16"
    kind = KINDS.get(descr[1:2], f"type {descr}")
    return (
        f"an array of {kind}, whose white level is unknown; scale it to uint16 by the same range for all images, as in "
        "np.clip((x - low) / (high - low) * 65535, 0, 65535).round().astype(np.uint16)"
    )


def npy_bytes(array: np.ndarray) -> bytes:
    """Content of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
