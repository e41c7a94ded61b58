"""Images in a zip, read one by one at their offset without unpacking it."""

import zipfile
import zlib
from pathlib import Path
from stat import S_ISLNK

from ..common import UserError
from ..images.files import DecodeError
from ..shards.archives import TOO_LONG, is_image, is_long, refuse_leading_out
from .base import read_range

HEADER_BYTES = 30
"""Size of a member's own header up to its name (section 4.3.7 of the format's specification, APPNOTE.TXT)."""
MARKS = (b"PK\3\4", b"PK\5\6")
"""First bytes of a zip with members and of an empty one."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
LARGEST_BYTES = 1 << 30
ENCRYPTED = 1


def is_zip(path: Path) -> bool:
    """Whether a file is a zip by its name or first bytes. Its last ones may be those of a zip at the end of a tar."""
    with open(path, "rb") as file:
        return path.suffix.lower() == ".zip" or file.read(4) in MARKS


def zip_images(path: Path, left_out: list[tuple[str, str]]) -> list[tuple[str, tuple[int, int, int, int, int]]]:
    """(name, address for `read_zipped`) of the images in a zip.

    Args:
        path: file.
        left_out: receives (name, reason) of images that cannot be used.

    Raises:
        UserError: the zip is damaged, or holds links or paths that lead out of it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:  # the last for a name
        raise UserError(f"{path} is not a whole zip ({error}); download, copy or pack it again.") from error
    found = []
    for member in members:
        name = member.filename.replace("\\", "/")  # written by some programs on Windows
        if S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{path} holds {name}, a link, and links in a zip are not followed: pack it without -y.")
        refuse_leading_out(name, path)
        if not is_image(name) or member.is_dir():  # is_dir fails for an empty name
            continue
        if is_long(name):
            left_out.append((f"{name[:80]}...", TOO_LONG))
        elif member.flag_bits & ENCRYPTED:
            left_out.append((name, "encrypted"))
        elif member.compress_type not in METHODS:
            left_out.append((name, "compressed by a method other than deflate"))
        elif member.file_size > LARGEST_BYTES:  # would be held in memory
            left_out.append((name, f"larger than {LARGEST_BYTES >> 30} GiB"))
        else:
            address = member.header_offset, member.compress_size, member.compress_type, member.CRC, member.file_size
            found.append((name, address))
    return found


def read_zipped(path: Path, offset: int, packed: int, method: int, crc32: int, size: int) -> bytes:
    """Read an image in a zip.

    Args:
        path: the zip.
        offset: position of the member's header.
        packed: compressed size in bytes.
        method: stored or deflated.
        crc32: checksum of the content.
        size: size of the content in bytes.

    Raises:
        DecodeError: the member is damaged.
        OSError, UserError: as `read_range`.
    """
    header = read_range(path, offset, HEADER_BYTES)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")  # name and extra fields
    content = read_range(path, offset + HEADER_BYTES + names, packed)
    if method == zipfile.ZIP_DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflate.decompress(content, size + 1)
        except zlib.error as error:
            raise DecodeError("damaged in the zip") from error
    if len(content) != size or zlib.crc32(content) != crc32:
        raise DecodeError("damaged in the zip")
    return content
