"""DICOM images (.dcm) as levels of 8 or 16 bits, read by the package pydicom.

Rules, with the sections of DICOM PS3.3 (https://dicom.nema.org/medical/dicom/current/output/html/part03.html):

- CT: Hounsfield units + 1024, where units = Rescale Slope * stored value + Rescale Intercept (C.8.2.1, C.11.1),
  rounded and limited to 0..65535; air has -1000 units.
- Other images of one channel: the stored values (C.7.6.3.1), as 16 bits if more than 8 are allocated. Values below 0
  are refused, because nothing says which of them is black.
- MONOCHROME1, whose smallest value is white, is inverted: the largest value of Bits Stored minus the stored value
  (C.7.6.3.1.2).
- RGB and YBR_FULL of 8 bits: RGB (C.7.6.3.1.2).

Other images, among them those with several frames (C.7.6.6), are refused. Windows (C.11.2) and overlays are ignored.
"""

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from ..common import UserError
from .files import LARGEST_PIXELS, TOO_LARGE, DecodeError
from .pixel_format import RGB8, DeepImage, PixelFormat

if TYPE_CHECKING:
    from pydicom import Dataset

# pydicom warns about nonstandard values in headers, most of which have nothing to do with the pixels
warnings.filterwarnings("ignore", module="pydicom")

PREAMBLE, MARK = 128, b"DICM"
HU_OFFSET = 1024
COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422")


def is_dicom(encoded: bytes) -> bool:
    """Whether a file is DICOM: a preamble of 128 bytes and a mark (PS3.10, section 7.1)."""
    return encoded[PREAMBLE : PREAMBLE + 4] == MARK


def open_dicom(encoded: bytes) -> DeepImage:
    """Describe a DICOM image from its header; its pixels are read as the module states.

    Raises:
        DecodeError: it is damaged or of another kind.
        UserError: pydicom, or a package that decompresses the image, is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise UserError("Reading DICOM images requires the package pydicom: pip install pydicom.") from error
    try:
        data = pydicom.dcmread(io.BytesIO(encoded))
        height, width, frames = int(data.Rows), int(data.Columns), int(data.get("NumberOfFrames") or 1)
        kind, allocated = str(data.PhotometricInterpretation), int(data.BitsAllocated)
        depth = min(max(_gray_bits(data), 8), 16)
        rescale = ("RescaleSlope", "RescaleIntercept") if data.get("Modality") == "CT" else ()
        scale = [float(data[name].value) for name in rescale if data.get(name) is not None]
    except Exception as error:  # pydicom raises many types for damaged files
        raise DecodeError("not a DICOM image, or its header is damaged") from error
    if frames > 1:
        raise DecodeError(f"{frames} frames; save each as a file of its own")
    if height * width > LARGEST_PIXELS:
        raise DecodeError(TOO_LARGE)
    if kind in COLOR and allocated == 8:
        return DeepImage(RGB8, height, width, "", lambda: _stored_values(data))
    if kind not in ("MONOCHROME1", "MONOCHROME2") or allocated not in (8, 16):
        raise DecodeError(f"{kind} of {allocated} bits; images must be MONOCHROME of 8 or 16 bits or RGB of 8 bits")
    if len(scale) == 2:
        return DeepImage(PixelFormat(1, 16), height, width, "", lambda: _hounsfield(data, *scale))
    if allocated == 8:
        return DeepImage(RGB8, height, width, "", lambda: np.repeat(_gray(data), 3, 2))
    return DeepImage(PixelFormat(1, 16), height, width, "", lambda: _gray(data), depth)


def _stored_values(data: "Dataset") -> np.ndarray:
    """(H, W) or (H, W, 3) stored values, colors converted to RGB."""
    try:
        values, stored = data.pixel_array, int(data.BitsStored)
    except Exception as error:  # see open_dicom
        _require_decoder(data)
        cause = " ".join(str(error).split())
        raise DecodeError(f"damaged, or of an unusual kind ({cause})") from error
    unused = 8 * values.itemsize - stored  # bits that may hold an overlay
    return values << unused >> unused


def _require_decoder(data: "Dataset") -> None:
    """Raise UserError if a missing package would decompress the image, which must not be left out as damaged."""
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(data.file_meta.TransferSyntaxUID)
    except (NotImplementedError, AttributeError):  # a compression that no package reads, or an unknown one
        return
    if not decoder.is_available:
        packages = "; ".join(decoder.missing_dependencies)
        raise UserError(
            f"Reading DICOM images compressed by {decoder.UID.name} requires another package ({packages}); install one "
            "of them, or decompress the images."
        )


def _gray(data: "Dataset") -> np.ndarray:
    """(H, W, 1) unsigned stored values, in which the largest one is white."""
    values = _stored_values(data)[..., None]
    if values.min() < 0:
        raise DecodeError("values below 0 that are not Hounsfield units; save it as .npy with levels from 0")
    if data.PhotometricInterpretation == "MONOCHROME1":
        values = 2 ** _gray_bits(data) - 1 - values
    return values.astype(f"u{values.itemsize}")


def _gray_bits(data: "Dataset") -> int:
    return int(data.BitsStored) - int(data.PixelRepresentation)  # one bit of signed values is the sign


def _hounsfield(data: "Dataset", slope: float, intercept: float) -> np.ndarray:
    """(H, W, 1) Hounsfield units + 1024 in 0..65535."""
    units = _stored_values(data)[..., None] * slope + intercept
    return np.rint(units + HU_OFFSET).clip(0, 65535).astype(np.uint16)
