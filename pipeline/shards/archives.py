"""Safe reading of tars of images, refusing damage, links and paths out of the tar."""

import errno
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..common import PIPELINE, UserError
from ..images.files import IMAGE_SUFFIXES

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
NOT_PLAIN = "not a plain file"
LONGEST_NAME = 1024
"""Longest member name in bytes. An index stores all keys at the width of the longest, so one long name inflates it."""
TOO_LONG = f"its name is longer than {LONGEST_NAME} bytes"


def refuse_url(path: Path, remedy: str = "copy it to a folder first") -> None:
    """Refuse a URL where a local path is required."""
    if re.match(r"[a-z][a-z0-9+]+:/", str(path)):  # Path collapses the double slash
        raise UserError(f"{path} is a URL, but a local path is required; {remedy}.")


def is_image(name: str) -> bool:
    """Whether a POSIX path has an image extension and no part of it is hidden."""
    return posixpath.splitext(name)[1][1:].lower() in IMAGE_SUFFIXES and not any(map(is_hidden, name.split("/")))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is metadata or a copy by its name.

    Examples are `._photo.jpg` (macOS), `.ipynb_checkpoints` (Jupyter) and `@eaDir` (thumbnails of a Synology NAS).
    """
    return name == "@eaDir" or (name.startswith(".") and name not in (".", ".."))


def clean_key(name: str) -> str:
    """Escape bytes of a file name that are not valid UTF-8, which an index cannot store."""
    return name if name.isascii() else name.encode(errors="backslashreplace").decode()


def one_line(name: str) -> str:
    """Escape line breaks and terminal control codes, which a file name may contain."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def is_long(name: str) -> bool:
    """Whether a name exceeds `LONGEST_NAME`."""
    return len(clean_key(name).encode()) > LONGEST_NAME


class CheckedMember(tarfile.TarInfo):
    """Tar member header that raises tarfile.ReadError if it is damaged; pass it to `tarfile.open` as `tarinfo`.

    By default, tarfile treats any damaged or missing header except the first as the regular end of the tar.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        start = tar.offset
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.EmptyHeaderError as error:
            raise tarfile.ReadError("it ends before its end mark") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error
        if member.size < 0 or not start < tar.offset < 2**63:  # tarfile would seek backwards and loop
            raise tarfile.ReadError(f"an impossible size at byte {start}")
        return member


@contextmanager
def open_tar(path: Path, compressed: bool = False) -> Iterator[tarfile.TarFile]:
    """Open a tar, which may be compressed if the block reads it from front to back.

    Raises:
        UserError: there is no such file, or it is damaged (also while the block reads it).
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; use the path of the tar that holds the images.")
    try:
        with tarfile.open(path, "r" if compressed else "r:", tarinfo=CheckedMember, encoding="utf-8") as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        if getattr(error, "errno", None) is not None:  # bz2 reports damage as an OSError without a number
            raise
        cause = str(error).partition("\n")[0].rstrip(":")  # tarfile adds one line per compression format
        remedy = "" if compressed else "decompress it if it is a .gz or .xz, else "
        form = "whole archive" if compressed else "whole, uncompressed tar"
        raise UserError(f"{path} is not a {form} ({cause}); {remedy}download or copy it again.") from error


def forgetting(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, which tarfile would otherwise keep, 1 GB for a million images.

    Raises:
        tarfile.ReadError: the tar is damaged.
    """
    try:
        for member in tar:
            yield member
            tar.members = []
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise tarfile.ReadError("unexpected end of data") from error  # a seek beyond the maximum file size


def members(tar: tarfile.TarFile, path: Path | str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar.

    Args:
        path: name of the tar in errors.

    Raises:
        UserError: a member is a link, or its path leads out of the tar.
    """
    for member in forgetting(tar):
        _refuse_unsafe(member, path)
        yield member


def _refuse_unsafe(member: tarfile.TarInfo, path: Path | str) -> None:
    """Refuse links and paths out of the tar. Nothing is extracted under its own name, but such a tar is suspicious."""
    if member.issym() or member.islnk():
        raise UserError(
            f"{path} holds {member.name}, a link to {member.linkname}, and links in a tar are not followed: "
            "pack the files themselves with `tar --dereference --hard-dereference`."
        )
    refuse_leading_out(member.name, path)


def refuse_leading_out(name: str, path: Path | str) -> None:
    """Refuse the archive `path` if the name of a member is absolute or leads to a folder above."""
    if name.startswith("/") or re.match(r"[A-Za-z]:[\\/]", name) or ".." in name.split("/"):
        raise UserError(
            f"{path} holds {name}, a path that leads out of it: pack the folder again from inside, "
            "or download the archive from a trusted source."
        )


def image_members(tar: tarfile.TarFile, path: Path | str, left_out: list[tuple[str, str]]) -> Iterator[tarfile.TarInfo]:
    """Yield the images in a tar that are plain files.

    Args:
        path: name of the tar in errors.
        left_out: receives (name, reason) of images that are not plain files or have too long a name.

    Raises:
        UserError: as `members`, or it holds WebDataset samples with classes.
    """
    for member in members(tar, path):
        if member.name.endswith(".cls"):
            raise UserError(
                f"{path} holds {member.name}, the class of a WebDataset sample; use `python -m {PIPELINE}.convert "
                f"webdataset {path} SHARDS`, which keeps the classes."
            )
        if is_image(member.name) and not member.isdir():
            if fault := member_fault(member):
                left_out.append(fault)
            else:
                yield member


def member_fault(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """(name, reason) of a member that can't be used, whatever its content; None if it can."""
    if is_long(member.name):
        return f"{member.name[:80]}...", TOO_LONG
    return None if member.isfile() and not member.issparse() else (member.name, NOT_PLAIN)


def unpacked(path: Path, names: Iterable[str], scratch: Path) -> dict[str, Path]:
    """Find files by base name in a folder, or extract them from a tar, compressed or not.

    Args:
        path: folder or tar.
        names: base names of the files.
        scratch: existing folder for extracted files.

    Returns:
        Base name -> path of each file that was found.

    Raises:
        UserError: there is no such folder or tar, it is damaged, one of the files is a link or leads out of the tar, or
            the disk of `scratch` is full.
    """
    wanted = set(names)
    refuse_url(path)
    if path.is_dir():
        inside = sorted((file for file in path.rglob("*") if file.name in wanted and file.is_file()), reverse=True)
        return {file.name: file for file in inside}  # reversed, so that the first path wins
    if not path.is_file():
        raise UserError(f"{path} does not exist; use the downloaded archive or the folder unpacked from it.")
    found = {}
    with open_tar(path, compressed=True) as tar:
        for member in forgetting(tar):
            name = posixpath.basename(member.name)
            if name not in wanted:
                continue
            _refuse_unsafe(member, path)
            if member.isfile():
                found[name] = scratch / name
                try:
                    with open(found[name], "wb") as file:
                        file.writelines(_blocks(tar.extractfile(member)))
                except OSError as error:
                    remedy = "set TMPDIR to a folder with room for it"
                    raise UserError(f"{path} can't be unpacked to {scratch} ({error.strerror}); {remedy}.") from error
    return found


def _blocks(packed: IO[bytes]) -> Iterator[bytes]:
    """Content of a member; raises tarfile.ReadError if reading fails, to tell this from an error of writing it."""
    try:
        yield from iter(lambda: packed.read(1 << 20), b"")
    except OSError as error:
        raise tarfile.ReadError(error.strerror or str(error)) from error
