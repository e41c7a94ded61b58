"""Images beyond 8-bit RGB as a shard holds them: formats, damage, depth, shrinking, and what is refused."""

import io
import struct
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from common import UserError
from pipeline.images.files import DecodeError
from pipeline.images.pixel_format import RGB8, PixelFormat, decode_pixels
from pipeline.images.prepare import prepare, read_format
from tests.pipeline.augment.reference_views import encode, smooth_field
from tests.pipeline.deep_images import dicom, levels, npy, png16, tiff_pages

GRAY16, RGB16 = PixelFormat(1, 16), PixelFormat(3, 16)
GRAY, COLOR, DEEP, SHALLOW = levels(20, 30), levels(20, 30, 3), levels(20, 30, 8), levels(20, 30, 5, bits=8)
ALPHA = np.concatenate([COLOR, GRAY], 2)
ORIENTATION = {274: 6}


def tiff16(pixels: np.ndarray, **options) -> bytes:
    return encode(Image.fromarray(pixels[..., 0]), "TIFF", **options)


KEPT = {
    "gray PNG": (png16(GRAY, 0), GRAY16, GRAY),
    "RGB PNG": (png16(COLOR, 2), RGB16, COLOR),
    "gray PNG with alpha": (png16(COLOR[..., :2], 4), GRAY16, COLOR[..., :1]),
    "RGB PNG with alpha": (png16(ALPHA, 6), RGB16, COLOR),
    "gray TIFF": (tiff16(GRAY), GRAY16, GRAY),
    "rotated, deflated TIFF": (tiff16(GRAY, tiffinfo=ORIENTATION, compression="tiff_adobe_deflate"), GRAY16, GRAY),
    "H W C array": (npy(DEEP), PixelFormat(8, 16), DEEP),
    "H W array of bytes": (npy(SHALLOW[..., 0]), PixelFormat(1, 8), SHALLOW[..., :1]),
    "C H W array": (npy(DEEP.transpose(2, 0, 1).copy()), PixelFormat(8, 16), DEEP),
    "Fortran order": (npy(np.asfortranarray(SHALLOW)), PixelFormat(5, 8), SHALLOW),
    "big endian": (npy(DEEP.astype(">u2")), PixelFormat(8, 16), DEEP),
    "two small axes": (npy(levels(16, 20, 2)), PixelFormat(2, 16), levels(16, 20, 2)),
}
"""Files that are stored as they are: content, format, pixels."""


@pytest.mark.parametrize("name", KEPT)
def test_files_that_decode_without_options_keep_their_bytes(name):
    encoded, pixel_format, pixels = KEPT[name]
    for verify in True, False:
        (extension, *size), stored, found = prepare(encoded, verify)
        assert stored is encoded and found == pixel_format == read_format(encoded) and size == [*pixels.shape[:2]]
    decoded = decode_pixels(encoded, pixel_format)
    assert decoded.dtype == pixel_format.dtype and decoded.flags.c_contiguous and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, pixels)
    assert extension == ("png" if "PNG" in name else "tif" if "TIFF" in name else "npy")
    other = PixelFormat(pixel_format.channels + 1, pixel_format.bits)
    assert decode_pixels(encoded, other) is None


ENCODED = {
    "three pages": (tiff_pages(COLOR), {"pages_as_channels": True}, "png", RGB16, COLOR),
    "eight pages": (tiff_pages(DEEP), {"pages_as_channels": True}, "npy", PixelFormat(8, 16), DEEP),
    "rotated pages": (
        tiff_pages(SHALLOW, tiffinfo=ORIENTATION),
        {"pages_as_channels": True},
        "npy",
        PixelFormat(5, 8),
        SHALLOW,
    ),
    "RGB array": (npy(SHALLOW[..., :3]), {}, "png", RGB8, SHALLOW[..., :3]),
    "reduced RGB array": (npy(COLOR), {"bits": 8}, "png", RGB8, COLOR >> 8),
    "reduced array": (npy(DEEP), {"bits": 8}, "npy", PixelFormat(8, 8), DEEP >> 8),
    "reduced gray PNG": (png16(GRAY, 0), {"bits": 8}, "png", RGB8, np.repeat(GRAY >> 8, 3, 2)),
    "reduced, rotated TIFF": (tiff16(GRAY, tiffinfo=ORIENTATION), {"bits": 8}, "tif", RGB8, np.repeat(GRAY >> 8, 3, 2)),
}
"""Content, options, extension, format and pixels of what a shard holds."""


@pytest.mark.parametrize("name", ENCODED)
def test_other_pixels_are_stored_without_loss(name):
    encoded, options, extension, pixel_format, pixels = ENCODED[name]
    form, stored, found = prepare(encoded, **options)
    assert form == (extension, 20, 30) and found == pixel_format
    assert prepare(stored, bits=options.get("bits")) == (form, stored, found)  # a stream is prepared twice
    np.testing.assert_array_equal(decode_pixels(stored, found), pixels)


def test_the_first_page_is_the_image_unless_pages_are_channels():
    assert decode_pixels(tiff_pages(DEEP), GRAY16)[..., 0].tolist() == DEEP[..., 0].tolist()
    assert prepare(encode(smooth_field(0, 0, 20, 30), "TIFF")).pixel_format == RGB8


@pytest.mark.parametrize("name", ["gray PNG", "rotated, deflated TIFF", "H W C array"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow
def test_truncated_images_are_refused_at_every_length(name):
    encoded, pixel_format, _ = KEPT[name]
    for length in range(0, len(encoded), 7):
        with pytest.raises(DecodeError):
            prepare(encoded[:length])
        # a TIFF ends with four bytes which say that there is no further page
        assert length >= len(encoded) - 4 or decode_pixels(encoded[:length], pixel_format) is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncated_pages_are_refused_at_every_length():
    """Pillow counts the pages in front of a truncated one."""
    encoded = tiff_pages(DEEP, compression="tiff_adobe_deflate")
    for length in range(0, len(encoded), 97):
        with pytest.raises(DecodeError):
            prepare(encoded[:length], pages_as_channels=True)


def test_flipped_bits_in_compressed_pixels_are_refused():
    for name in "gray PNG", "rotated, deflated TIFF":
        encoded = KEPT[name][0]
        for at in range(300, 900, 50):
            with pytest.raises(DecodeError):
                prepare(encoded[:at] + bytes([encoded[at] ^ 16]) + encoded[at + 1 :])


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((9, 9)), r"an array of floats, whose white level is unknown; scale it to uint16"),
        (np.zeros((9, 9), np.int16), "an array of signed integers, whose white level is unknown"),
        (np.zeros((9, 9), bool), "an array of booleans, whose white level is unknown"),
        (np.zeros((20, 30, 17), np.uint8), "neither the first nor the last axis is at most 16"),
        (np.zeros(9, np.uint8), r"an array of shape \(9,\); images are"),
        (np.zeros((0, 9), np.uint8), r"an array of shape \(0, 9\); images are"),
        (np.zeros((9, 9), [("a", "u1")]), "an array of several fields"),
        (np.zeros((1, 1_000_001, 3), np.uint8), "too long for a PNG: 1000001 x 1"),
        (np.array([{}]), "an array of Python objects, which are not read"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_the_remedy(array, reason):
    with pytest.raises(DecodeError, match=reason):
        prepare(npy(array, allow_pickle=True))


def test_an_array_of_unknown_byte_order_is_refused():
    with pytest.raises(DecodeError, match="not an array, or its header is damaged"):
        prepare(npy(GRAY).replace(b"'<u2'", b"'xu2'"))


def test_a_huge_header_allocates_nothing():
    header = npy(np.zeros((50, 50), np.uint16))[:128]
    for shape, reason in (b"(13377, 13377)", "a damaged or truncated array"), (b"(99999, 99999)", "too large"):
        with pytest.raises(DecodeError, match=reason):
            prepare(header.replace(b"(50, 50), }" + b" " * (len(shape) - 8), shape + b", }"))


def test_tiffs_that_are_no_channels_are_refused():
    other = Image.fromarray(GRAY[:10, :, 0])
    file = io.BytesIO()
    Image.fromarray(GRAY[..., 0]).save(file, "TIFF", save_all=True, append_images=[other])
    refused = {
        "page 2 differs from the first one in size or depth": file.getvalue(),
        "pages of mode RGB": encode(smooth_field(0, 0, 20, 30), "TIFF"),
        "more than 16 pages": tiff_pages(levels(4, 4, 17)),
    }
    for reason, encoded in refused.items():
        with pytest.raises(DecodeError, match=reason):
            prepare(encoded, pages_as_channels=True)


@pytest.mark.parametrize("pixels", [GRAY, COLOR, DEEP, SHALLOW], ids=lambda pixels: f"{pixels.shape[2]}x{pixels.dtype}")
def test_shrinking_keeps_the_depth(pixels):
    """To half the size, where the area filter is the mean of 2 x 2 pixels, rounded."""
    form, stored, pixel_format = prepare(npy(pixels), short_side=10)
    mean = pixels.reshape(10, 2, 15, 2, -1).astype(np.float64).mean((1, 3))
    decoded = decode_pixels(stored, pixel_format)
    assert form[1:] == (10, 15) and decoded.dtype == pixels.dtype
    assert np.abs(decoded - mean).max() <= 0.5
    assert prepare(npy(pixels), short_side=20).encoded == npy(pixels)
    _, stored, _ = prepare(npy(pixels), short_side=13)  # no whole scale, for which OpenCV takes at most four channels
    channels = [cv2.resize(channel, (20, 13), interpolation=cv2.INTER_AREA) for channel in pixels.transpose(2, 0, 1)]
    np.testing.assert_array_equal(decode_pixels(stored, pixel_format), np.stack(channels, 2))


# ---- TIFFs of several samples


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("order", "<>")
def test_tiffs_that_pillow_reduces_or_refuses(order, planar):
    tifffile = pytest.importorskip("tifffile")

    def written(pixels: np.ndarray, kind: str, **options) -> bytes:
        file, pixels = io.BytesIO(), np.moveaxis(pixels, 2, 0).copy() if planar == "separate" else pixels
        tifffile.imwrite(file, pixels, byteorder=order, photometric=kind, planarconfig=planar, **options)
        return file.getvalue()

    rotated = [(274, 3, 1, 6, True)]
    cases = [
        (written(COLOR, "rgb", extratags=rotated), "png", COLOR),
        (written(ALPHA, "rgb", extrasamples=["unassalpha"]), "png", COLOR),
        (written(ALPHA, "rgb", extrasamples=["unspecified"]), "npy", ALPHA),
        (written(DEEP, "minisblack", compression="zlib"), "npy", DEEP),
        (written(SHALLOW, "minisblack"), "npy", SHALLOW),
        (written(SHALLOW, "rgb", extrasamples=["unassalpha", "unspecified"]), "npy", SHALLOW[..., [0, 1, 2, 4]]),
    ]
    for encoded, extension, pixels in cases:
        form, stored, found = prepare(encoded)
        assert form == (extension, 20, 30) and found == PixelFormat(pixels.shape[2], 8 * pixels.itemsize)
        np.testing.assert_array_equal(decode_pixels(stored, found), pixels)
        with pytest.raises(DecodeError):
            prepare(encoded[:-100])
    assert prepare(written(COLOR, "rgb"), bits=8).pixel_format == RGB8
    with pytest.raises(DecodeError, match="17 channels; images may have at most 16"):
        prepare(written(levels(20, 30, 17), "minisblack"))


def test_a_missing_package_is_named(monkeypatch):
    for name in "tifffile", "pydicom":
        monkeypatch.setitem(sys.modules, name, None)
    rgb16 = cv2.imencode(".tif", COLOR)[1].tobytes()
    with pytest.raises(UserError, match=r"the package tifffile: pip install tifffile, or use --bits 8"):
        prepare(rgb16)
    assert prepare(rgb16, bits=8).pixel_format == RGB8
    with pytest.raises(UserError, match=r"requires the package pydicom: pip install pydicom\.$"):
        prepare(bytes(128) + b"DICM" + bytes(20))


def test_a_missing_codec_is_named_and_its_images_are_not_damaged(monkeypatch):
    """LZW needs imagecodecs, and JPEG-LS a package that pydicom names; without verification, too."""
    tifffile, pydicom = pytest.importorskip("tifffile"), pytest.importorskip("pydicom")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    monkeypatch.setattr("pipeline.images.tiff.find_spec", lambda name: None)
    file = io.BytesIO()
    tifffile.imwrite(file, COLOR, photometric="rgb")
    lzw = file.getvalue().replace(struct.pack("<HHII", 259, 3, 1, 1), struct.pack("<HHII", 259, 3, 1, 5))
    jpeg_ls = pydicom.dcmread(io.BytesIO(dicom(GRAY[..., 0])))
    jpeg_ls.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    jpeg_ls.PixelData = pydicom.encaps.encapsulate([b"damaged"])
    file = io.BytesIO()
    jpeg_ls.save_as(file)
    decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEGLSLossless)
    monkeypatch.setattr(decoder, "_available", {})
    for encoded, packages in (lzw, "requires the package imagecodecs"), (file.getvalue(), "JPEG-LS.*pyjpegls"):
        for verify in True, False:
            with pytest.raises(UserError, match=packages):
                prepare(encoded, verify)


# ---- DICOM


@pytest.fixture
def pydicom():
    return pytest.importorskip("pydicom")


TWELVE_BITS = GRAY[..., 0] >> 4
HOUNSFIELD = (GRAY[..., 0] >> 4).astype(np.int16) - 2048
CT = {"Modality": "CT", "RescaleSlope": "1", "RescaleIntercept": "0"}
DICOM = {
    "signed CT": (HOUNSFIELD, CT, (HOUNSFIELD + 1024).clip(0)),
    "scaled CT": (TWELVE_BITS, CT | {"RescaleSlope": "2", "RescaleIntercept": "-1000"}, 2 * TWELVE_BITS + 24),
    "MR": (TWELVE_BITS, {"Modality": "MR", "stored": 12}, TWELVE_BITS),
    "signed MR": (TWELVE_BITS.astype(np.int16), {"Modality": "MR", "stored": 13}, TWELVE_BITS),
    "signed MONOCHROME1": (TWELVE_BITS.astype(np.int16), {"kind": "MONOCHROME1", "stored": 13}, 4095 - TWELVE_BITS),
    "overlay bits": (TWELVE_BITS | 0x8000, {"Modality": "MR", "stored": 12}, TWELVE_BITS),
    "MONOCHROME1": (TWELVE_BITS, {"kind": "MONOCHROME1", "stored": 12}, 4095 - TWELVE_BITS),
}


@pytest.mark.parametrize("name", DICOM)
def test_levels_of_dicom_images(pydicom, name):
    pixels, tags, expected = DICOM[name]
    form, stored, found = prepare(dicom(pixels, **tags))
    assert form == ("png", 20, 30) and found == GRAY16
    np.testing.assert_array_equal(decode_pixels(stored, GRAY16)[..., 0], expected)


def test_dicom_images_of_8_bits_are_rgb(pydicom):
    for pixels, kind in (SHALLOW[..., :3], "RGB"), (SHALLOW[..., 0], "MONOCHROME2"):
        _, stored, found = prepare(dicom(pixels.copy(), kind))
        assert found == RGB8
        np.testing.assert_array_equal(decode_pixels(stored, RGB8), pixels.reshape(20, 30, -1) + np.zeros(3, np.uint8))
    for encoded in dicom(GRAY[..., 0]), dicom(TWELVE_BITS, stored=12), dicom(TWELVE_BITS.astype(np.int16), stored=13):
        reduced = prepare(encoded, bits=8)
        np.testing.assert_array_equal(decode_pixels(reduced.encoded, RGB8), np.repeat(GRAY >> 8, 3, 2))


def test_other_dicom_images_are_refused(pydicom):
    refused = {
        "2 frames; save each as a file of its own": dicom(TWELVE_BITS, NumberOfFrames=2),
        "values below 0 that are not Hounsfield units": dicom(HOUNSFIELD, Modality="MR"),
        "PALETTE COLOR of 16 bits": dicom(TWELVE_BITS, "PALETTE COLOR"),
        "damaged, or of an unusual kind": dicom(TWELVE_BITS)[:-10],
        "its header is damaged": dicom(TWELVE_BITS)[:200],
    }
    for reason, encoded in refused.items():
        with pytest.raises(DecodeError, match=reason):
            prepare(encoded)
