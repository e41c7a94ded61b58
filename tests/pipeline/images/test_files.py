"""Decoding on the CPU: supported formats, ignored properties, and detection of damage."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.images.files import (
    LARGEST_PIXELS,
    DecodeError,
    decode,
    decodes_alike,
    nvjpeg_decodes_alike,
)
from pipeline.images.pixel_format import RGB8
from pipeline.images.prepare import prepare
from tests.pipeline.augment.reference_views import encode, smooth_field
from tests.pipeline.image_sets import ROOT

ORIENTATION = 274
PICTURE = smooth_field(5, 0, 60, 90)
PIXELS = np.asarray(PICTURE)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "TIFF": {}, "BMP": {}}


def test_lossless_formats_decode_exactly():
    for form, options in LOSSLESS.items():
        np.testing.assert_array_equal(decode(encode(PICTURE, form, **options)), PIXELS, form)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_the_orientation_of_a_tiff_is_ignored(orientation, compression):
    encoded = encode(PICTURE, "TIFF", tiffinfo={ORIENTATION: orientation}, compression=compression)
    np.testing.assert_array_equal(decode(encoded), PIXELS)
    for verify in True, False:
        assert prepare(encoded, verify).form == ("tif", 60, 90)


def test_alpha_is_dropped_without_multiplication():
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 90).astype(np.uint8), (60, 1)))
    for mode, forms in (("RGBA", LOSSLESS), ("LA", ["PNG", "TIFF"])):
        opaque = PICTURE.convert(mode[:-1])
        transparent = opaque.copy()
        transparent.putalpha(alpha)
        for form in forms:
            decoded = decode(encode(transparent, form, **LOSSLESS[form]))
            np.testing.assert_array_equal(decoded, opaque.convert("RGB"), f"{form} {mode}")


def test_upper_byte_of_16_bit_values_is_kept():
    gray = np.asarray(PICTURE.convert("L"))
    deep = Image.fromarray(gray.astype(np.uint16) * 256 + 200)
    tiff16 = encode(deep, "TIFF")
    np.testing.assert_array_equal(decode(tiff16)[..., 1], gray)
    inverted = tiff16.replace(struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 0))
    np.testing.assert_array_equal(decode(inverted)[..., 1], 255 - gray)


def test_upper_eight_of_12_bits_are_kept():
    levels = np.random.default_rng(0).integers(0, 4096, (60, 45, 2))
    first, second = np.moveaxis(levels, 2, 0)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 2).astype(np.uint8).tobytes()
    encoded = tiff({258: 12, 262: 1, 277: 1, 278: 60}, [zlib.compress(packed)], 273, 279)
    np.testing.assert_array_equal(decode(encoded)[..., 0], levels.reshape(60, 90) >> 4)
    assert prepare(encoded, bits=8) == (("tif", 60, 90), encoded, RGB8)
    _, page, _ = prepare(encoded, bits=8, pages_as_channels=True)
    np.testing.assert_array_equal(decode(page), decode(encoded))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_tiffs_without_a_defined_white_level_are_refused(mode):
    with pytest.raises(DecodeError, match="of an unusual kind"):
        prepare(encode(PICTURE.convert(mode), "TIFF"))


JPEGS = {
    "4:2:0": encode(PICTURE, "JPEG", subsampling=2),
    "4:2:2": encode(PICTURE, "JPEG", subsampling=1),
    "4:4:4": encode(PICTURE, "JPEG", subsampling=0),
    "progressive 4:4:4": encode(PICTURE, "JPEG", subsampling=0, progressive=True),
    "gray": encode(PICTURE.convert("L"), "JPEG"),
    "RGB": encode(PICTURE, "JPEG", subsampling=0, keep_rgb=True),
    "CMYK": encode(PICTURE.convert("CMYK"), "JPEG", subsampling=0),
}


def test_jpegs_that_every_decoder_of_a_gpu_decodes_alike():
    """DALI interpolates chroma as the CPU does; nvJPEG without options repeats it."""
    assert [name for name, jpeg in JPEGS.items() if not decodes_alike(jpeg)] == ["CMYK"]
    assert [n for n, jpeg in JPEGS.items() if nvjpeg_decodes_alike(jpeg)] == ["4:4:4", "progressive 4:4:4", "gray"]


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_without_an_end_are_refused(name):
    jpeg = JPEGS[name]
    for length in range(len(jpeg)):
        part = jpeg[:length]
        assert decode(part) is None and not decodes_alike(part) and not nvjpeg_decodes_alike(part)
    with pytest.raises(DecodeError, match="a damaged or truncated JPEG"):
        prepare(jpeg[:-1])


def test_unusual_but_complete_jpegs_are_decoded():
    jpeg = JPEGS["4:4:4"]
    second = JPEGS["gray"]  # as in files of two pictures; only the first counts
    for complete in (jpeg + b"\0" * 40, jpeg[:-2] + b"\xff\xff\xff\xd9", jpeg + second, jpeg + second[:-9]):
        np.testing.assert_array_equal(decode(complete), decode(jpeg))
    between = jpeg[:2] + b"\xff\xfe\0\x06\xff\xd9\xff\xd8" + b"\1\2\3" + jpeg[2:]  # a comment like an end
    np.testing.assert_array_equal(decode(between), decode(jpeg))
    assert decode(between[:-1]) is None


def strips(encoded: bytes) -> list[tuple[int, int]]:
    """Return (offset, size) of the strips of a TIFF."""
    with Image.open(io.BytesIO(encoded)) as image:
        return list(zip(image.tag_v2[273], image.tag_v2[279], strict=True))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_damaged_strips_are_detected(compression):
    """60 bytes of 0xff are neither a code in the LZW table nor a valid deflate block."""
    encoded = encode(smooth_field(5, 1, 200, 300), "TIFF", compression=compression)
    assert len(strips(encoded)) > 1 and prepare(encoded).form == ("tif", 200, 300)
    for offset, size in strips(encoded):
        middle = offset + size // 2
        damaged = encoded[:middle] + b"\xff" * 60 + encoded[middle + 60 :]
        with pytest.raises(DecodeError, match="a damaged or truncated TIFF"):
            prepare(damaged)
        with pytest.raises(DecodeError, match="a damaged or truncated TIFF"):
            prepare(damaged, short_side=100)


def test_flipped_bits_in_deflated_strips_are_detected():
    """libtiff stops when a strip is complete, before the checksum."""
    encoded = encode(PICTURE, "TIFF", compression="tiff_adobe_deflate")
    (offset, size), *_ = strips(encoded)
    for at in np.random.default_rng(0).integers(offset, offset + size, 40):
        damaged = bytearray(encoded)
        damaged[at] ^= 16
        with pytest.raises(DecodeError):
            prepare(bytes(damaged))


def test_checksums_of_tiled_and_planar_tiffs():
    planes = [zlib.compress(PIXELS[..., channel].tobytes()) for channel in range(3)]
    planar = tiff({284: 2, 278: 60}, planes, 273, 279)
    padded = np.pad(PIXELS, ((0, 4), (0, 6), (0, 0)))
    corners = [(top, left) for top in range(0, 64, 16) for left in range(0, 96, 16)]
    tiles = [zlib.compress(padded[top : top + 16, left : left + 16].tobytes()) for top, left in corners]
    tiled = tiff({322: 16, 323: 16}, tiles, 324, 325)
    for encoded in planar, tiled:
        assert prepare(encoded).form == ("tif", 60, 90)
        np.testing.assert_array_equal(decode(encoded), PIXELS)
    with pytest.raises(DecodeError):
        prepare(tiff({322: 16, 323: 16}, [*tiles[:-1], tiles[-1][:-1] + b"?"], 324, 325))


def tiff(tags: dict[int, int], blocks: list[bytes], offsets_tag: int, sizes_tag: int) -> bytes:
    """A 60 x 90 RGB TIFF of deflated strips or tiles, in layouts that Pillow cannot write."""
    offsets = np.cumsum([8, *map(len, blocks)]).tolist()
    values = {256: [90], 257: [60], 258: [8] * 3, 259: [8], 262: [2], 277: [3]}
    values |= {tag: [value] for tag, value in tags.items()}
    values |= {offsets_tag: offsets[:-1], sizes_tag: [len(block) for block in blocks]}
    entries, beyond = b"", b""
    for tag, numbers in sorted(values.items()):
        content = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(content) > 4:
            place = struct.pack("<I", offsets[-1] + 2 + 12 * len(values) + 4 + len(beyond))
            beyond += content
        else:
            place = content
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + place
    head = b"II*\0" + struct.pack("<I", offsets[-1])
    return head + b"".join(blocks) + struct.pack("<H", len(values)) + entries + bytes(4) + beyond


def test_images_that_are_too_large_are_not_called_damaged():
    """A valid PNG of 1 bit per pixel."""
    side = 13_500
    assert side**2 > LARGEST_PIXELS

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(side * (1 + -(-side // 8))), 1)
    encoded = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    with pytest.raises(DecodeError, match="too large: more than 178,956,970 pixels"):
        prepare(encoded)


def test_pngs_with_long_comments_are_supported():
    """ImageMagick writes profiles as comments; Pillow refuses to open them."""
    comments = PngInfo()
    comments.add_text("Raw profile type xmp", " " * (2 << 20), zip=True)
    encoded = encode(PICTURE, "PNG", pnginfo=comments)
    for verify in True, False:
        assert prepare(encoded, verify).form == ("png", 60, 90)
    with pytest.raises(DecodeError, match="its header is damaged"):
        prepare(encoded[:18] + b"\1" + encoded[19:], verify=False)


def test_images_too_long_for_jpeg_are_refused():
    """JPEG allows at most 65,500 pixels per side."""
    encoded = encode(Image.new("RGB", (90_000, 4)), "PNG")
    with pytest.raises(DecodeError, match="too long for a JPEG whose short side has 3 pixels: 67500 x 3"):
        prepare(encoded, short_side=3)
    assert prepare(encoded, short_side=2)[0] == ("jpg", 2, 45_000)
    assert prepare(encoded, short_side=4) == (("png", 4, 90_000), encoded, RGB8)


def test_pillow_does_not_warn_about_large_images():
    size = struct.pack("<ii", 10_000, 10_000)
    bmp = encode(PICTURE, "BMP")
    program = (
        "import sys; from pipeline.images.prepare import prepare; print(prepare(sys.stdin.buffer.read(), False).form)"
    )
    command = [sys.executable, "-W", "default", "-c", program]
    result = subprocess.run(command, input=bmp[:18] + size + bmp[26:], cwd=ROOT, capture_output=True, timeout=60)
    assert (result.stdout, result.stderr) == (b"('bmp', 10000, 10000)\n", b"")
