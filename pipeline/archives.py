"""Tars of images and other archives as they are downloaded: whole, and with nothing in them that leads elsewhere."""

import posixpath
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError
from pipeline.images import IMAGE_SUFFIXES

NOT_PLAIN = "not a plain file"


def refuse_url(path: Path, cure: str = "copy it to a folder first") -> None:
    """Images are converted from the local disk; WebDataset tars elsewhere need not be converted."""
    if re.match(r"[a-z][a-z0-9+]+:/", str(path)):  # a Path has lost one of the slashes
        raise UserError(f"A URL ({path}) is not taken here: {cure}.")


def is_image(name: str) -> bool:
    return posixpath.splitext(name)[1][1:].lower() in IMAGE_SUFFIXES


class CheckedMember(tarfile.TarInfo):
    """Nothing but a block of zeros ends a tar: tarfile takes any damaged or missing header but the first for its end.

    To be given to `tarfile.open` as `tarinfo`; tarfile.ReadError is then raised at such a header.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.EmptyHeaderError as error:
            raise tarfile.ReadError("it ends before its end mark") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar; its damage is a UserError."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: give the tar that holds the images.")
    try:
        with tarfile.open(path, "r:", tarinfo=CheckedMember) as tar:
            yield tar
    except tarfile.TarError as error:
        cure = "unpack it first if it is a .gz or .xz, else download or copy it again"
        raise UserError(f"{path} is not a whole, uncompressed tar ({error}): {cure}.") from error


def members(tar: tarfile.TarFile, path: Path | str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, one after the other.

    Args:
        path: how to call the tar in an error.

    Raises:
        UserError: one is a link, or its path leads out of the tar.
    """
    for member in tar:
        _refuse_treachery(member, path)
        yield member
        tar.members = []  # which tarfile would otherwise keep: 1 GB for a million images


def _refuse_treachery(member: tarfile.TarInfo, path: Path | str) -> None:
    """Nothing is ever unpacked by its name, but whoever wrote such a tar meant other files than are in it."""
    if member.issym() or member.islnk():
        raise UserError(
            f"{path} holds {member.name}, a link to {member.linkname}, and links in a tar are not followed: "
            "pack the files themselves, by `tar --dereference --hard-dereference`."
        )
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(
            f"{path} holds {member.name}, a path that leads out of it: pack the folder anew from inside, "
            "or get the archive from where it can be trusted."
        )


def image_members(
    tar: tarfile.TarFile, path: Path | str, left_out: list[tuple[str, str]], others: list[str] | None = None
) -> Iterator[tarfile.TarInfo]:
    """The images in a tar that are plain files; other images go to `left_out`, other names to `others`.

    Raises:
        UserError: as `members`.
    """
    for member in members(tar, path):
        if is_image(member.name) and not member.isdir():
            if is_plain(member):
                yield member
            else:
                left_out.append((member.name, NOT_PLAIN))
        elif others is not None:
            others.append(member.name)


def is_plain(member: tarfile.TarInfo) -> bool:
    return member.isfile() and not member.issparse()


def unpacked(path: Path, names: Iterable[str], scratch: Path) -> dict[str, Path]:
    """Where the files of these base names lie: in a folder as they are, or unpacked from a tar, compressed or not.

    Raises:
        UserError: there is no such folder or tar, it is damaged, one of the files is a link or leads out of the tar, or
            the disk for temporary files is full.
    """
    wanted = set(names)
    refuse_url(path)
    if path.is_dir():
        inside = sorted((file for file in path.rglob("*") if file.name in wanted and file.is_file()), reverse=True)
        return {file.name: file for file in inside}  # reversed, so that the first in the order of paths stays
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the downloaded archive or the folder unpacked from it.")
    found = {}
    try:
        with tarfile.open(path, tarinfo=CheckedMember) as tar:
            for member in tar:
                name = posixpath.basename(member.name)
                if name in wanted:
                    _refuse_treachery(member, path)
                if name in wanted and member.isfile():
                    found[name] = scratch / name
                    with tar.extractfile(member) as packed, open(found[name], "wb") as file:
                        shutil.copyfileobj(packed, file, 1 << 20)
                tar.members = []
    except (tarfile.TarError, EOFError, zlib.error) as error:
        cause = str(error).partition("\n")[0].rstrip(":")  # tarfile goes on with a line for each way to compress
        raise UserError(f"{path} is not a whole archive ({cause}): download it again.") from error
    except OSError as error:
        cure = "download it again if it is damaged, else set TMPDIR to a folder with room for it"
        raise UserError(f"{path} can't be unpacked to {scratch} ({error.strerror or error}): {cure}.") from error
    return found
