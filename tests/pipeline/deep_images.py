"""Images beyond 8-bit RGB: files that the tests write without the code under test."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def levels(height: int, width: int, channels: int = 1, bits: int = 16, seed: int = 0) -> np.ndarray:
    """(H, W, C) noise of all levels."""
    random = np.random.default_rng((seed, height, width, channels, bits))
    return random.integers(0, 2**bits, (height, width, channels), f"u{bits // 8}")


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def png16(pixels: np.ndarray, color_type: int) -> bytes:
    """PNG of (H, W, C) uint16; color type 0: gray, 2: RGB, 4: gray and alpha, 6: RGB and alpha."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_pages(pixels: np.ndarray, **options) -> bytes:
    """TIFF whose pages are the channels of (H, W, C) pixels."""
    file = io.BytesIO()
    first, *others = (Image.fromarray(np.ascontiguousarray(pixels[..., channel])) for channel in range(pixels.shape[2]))
    first.save(file, "TIFF", save_all=True, append_images=others, **options)
    return file.getvalue()


def dicom(pixels: np.ndarray, kind: str = "MONOCHROME2", stored: int | None = None, **tags) -> bytes:
    """DICOM file of (H, W) or (H, W, 3) pixels with `stored` bits, uncompressed."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1 if pixels.ndim == 2 else 3, kind
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored = stored or data.BitsAllocated
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OW"
    for name, value in tags.items():
        setattr(data, name, value)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()
