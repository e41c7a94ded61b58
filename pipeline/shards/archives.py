"""Tars of images and other archives as they are downloaded: whole, and with nothing in them that leads elsewhere."""

import argparse
import errno
import posixpath
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from ..common import UserError
from ..images import IMAGE_SUFFIXES

NOT_PLAIN = "not a plain file"
LONGEST_NAME = 1024
"""In bytes. An index stores all keys at the width of the longest one, so a single long name would blow it up."""
TOO_LONG = f"its name is longer than {LONGEST_NAME} bytes"
CLASS_LIMIT = 10**6
"""Class numbers lie below it: a manifest lists the names of all classes up to the largest number."""
NO_CLASS = ("", "-1")
"""Texts of a class file that stand for no class."""

T = TypeVar("T")


def refuse_url(path: Path, cure: str = "copy it to a folder first") -> None:
    """Images are converted from the local disk; WebDataset tars elsewhere need not be converted."""
    if re.match(r"[a-z][a-z0-9+]+:/", str(path)):  # a Path has lost one of the slashes
        raise UserError(f"A URL ({path}) is not taken here: {cure}.")


def is_image(name: str) -> bool:
    """By the extension; macOS's `._photo.jpg` is not one, but the metadata of `photo.jpg`."""
    return posixpath.splitext(name)[1][1:].lower() in IMAGE_SUFFIXES and not posixpath.basename(name).startswith("._")


def clean_key(name: str) -> str:
    """Escape the bytes of a file name that are not valid UTF-8, which an index could not store."""
    return name if name.isascii() else name.encode(errors="backslashreplace").decode()


def one_line(name: str) -> str:
    """Escape line breaks and terminal control codes, which a file name may contain."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def is_long(name: str) -> bool:
    return len(clean_key(name).encode()) > LONGEST_NAME


def class_number(text: str) -> int | None:
    """The number of a class, from 0 to CLASS_LIMIT - 1; None for any other text."""
    digits = text.lstrip("0") or "0"
    if not (text.isascii() and text.isdigit()) or len(digits) > len(str(CLASS_LIMIT - 1)):
        return None
    return int(digits)


class CheckedMember(tarfile.TarInfo):
    """Nothing but a block of zeros ends a tar: tarfile takes any damaged or missing header but the first for its end.

    To be given to `tarfile.open` as `tarinfo`; tarfile.ReadError is then raised at such a header.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        start = tar.offset
        try:
            member = super().fromtarfile(tar)
            if member.size < 0 or not start < tar.offset < 2**63:  # tarfile would go back and read the same again
                raise tarfile.ReadError(f"an impossible size at byte {start}")
            return member
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
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # EINVAL: a seek beyond what the file system can hold
        cause = "unexpected end of data" if isinstance(error, OSError) else error
        cure = "unpack it first if it is a .gz or .xz, else download or copy it again"
        raise UserError(f"{path} is not a whole, uncompressed tar ({cause}): {cure}.") from error


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
            if fault := member_fault(member):
                left_out.append(fault)
            else:
                yield member
        elif others is not None:
            others.append(member.name)


def member_fault(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """(name, reason) of a member that can't be taken, whatever it holds."""
    if is_long(member.name):
        return f"{member.name[:80]}...", TOO_LONG
    return None if member.isfile() and not member.issparse() else (member.name, NOT_PLAIN)


def add_image_extension(parser: argparse.ArgumentParser) -> None:
    """Add the option for `extension` of `image_samples`."""

    def extension(text: str) -> str:
        if not (cleaned := text.lower().removeprefix(".")) or cleaned == "cls" or "/" in cleaned:
            raise argparse.ArgumentTypeError(f"{text!r} is not the extension of an image, such as jpg")
        return cleaned

    parser.add_argument(
        "--image-extension",
        type=extension,
        metavar="EXTENSION",
        help="extension of the image in each WebDataset sample, such as jpg, where samples have several images "
        "(default: the only image)",
    )


def image_samples(
    tar: Iterable[tarfile.TarInfo],
    path: Path | str,
    read_image: Callable[[tarfile.TarInfo], T],
    read_class: Callable[[tarfile.TarInfo], bytes],
    extension: str | None,
    left_out: list[tuple[str, str]],
    classes: dict[int, tuple[str, str]],
) -> Iterator[tuple[str, str, T]]:
    """Yield (key, member name, content) of the image of each sample in a WebDataset tar.

    Members of one sample normally follow each other. A class that lies elsewhere in the tar is matched by its key.

    Args:
        tar: the members in their order.
        path: how to call the tar in an error.
        read_image, read_class: called with a member before the next one is taken from `tar`.
        extension: of the images, such as "jpg"; None takes every image format.
        left_out: receives (member name, reason) of images and classes that are not used.
        classes: receives number of the sample -> (member name, text) of its class. Complete only after the last sample.

    Raises:
        UserError: a sample has images of different extensions.
    """
    wanted = {extension} if extension else IMAGE_SUFFIXES
    images: dict[str, str] = {}  # key -> extension
    ignored: dict[str, str] = {}  # key -> name of an image of another extension
    unlabeled: dict[str, list[int]] = {}  # key -> samples without a class next to the image
    orphans: dict[str, list[tuple[str, str]]] = {}  # key -> (name, text) of classes without an image next to them
    number = 0

    def parts() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        for member in tar:
            folder, _, base = member.name.removeprefix("./").rpartition("/")
            stem, _, suffix = base.partition(".")  # WebDataset's rule: the key ends at the first dot
            suffix = suffix.lower()
            used = suffix in wanted or suffix == "cls"
            if not stem or member.isdir() or not (used or is_image(member.name)):
                continue
            key = clean_key(f"{folder}/{stem}" if folder else stem)
            if fault := member_fault(member):
                left_out.append(fault)
            elif used:
                yield key, suffix, member
            else:
                ignored.setdefault(key, member.name)

    try:
        for key, group in groupby(parts(), key=lambda part: part[0]):
            image, texts = None, []
            for _, suffix, member in group:
                if suffix in wanted:
                    known = images.setdefault(key, sys.intern(suffix))
                    if known != suffix:
                        raise UserError(
                            f"Sample {key} of {path} has two images, {key}.{known} and {key}.{suffix}; use "
                            f"--image-extension {known} or --image-extension {suffix} to choose."
                        )
                    if image is None:
                        image = member.name, read_image(member)
                    else:
                        left_out.append((member.name, "a second image of this name, of which the first is used"))
                elif member.size > LONGEST_NAME:
                    left_out.append((member.name, f"a class of more than {LONGEST_NAME} bytes"))
                else:
                    texts.append((member.name, read_class(member).decode(errors="replace").strip()))
            if image is None:
                orphans.setdefault(key, []).extend(texts)
                continue
            if texts:
                classes[number] = texts[0]
                left_out += [(name, "a second class of its image") for name, text in texts if text != texts[0][1]]
            else:
                unlabeled.setdefault(key, []).append(number)
            yield key, *image
            number += 1
    finally:  # also where a damaged tar ends early
        bare: list[str] = []
        for key, texts in orphans.items():
            samples = unlabeled.get(key, [])
            if len(samples) == 1 and len({text for _, text in texts}) == 1:
                classes[samples[0]] = texts[0]
            elif key in images:
                left_out += [(name, "which image it belongs to is ambiguous, so it is not used") for name, _ in texts]
            else:
                bare += [name for name, _ in texts]
        skipped = [name for key, name in ignored.items() if key not in images]
        left_out += _first_of(bare, "its sample has no image")
        dotted = "its extension, all behind the first dot, is unknown; use --image-extension or rename it"
        left_out += _first_of(skipped, f"its sample has no .{extension}" if extension else dotted)


def _first_of(names: list[str], reason: str) -> list[tuple[str, str]]:
    """One entry for many members that are left out for the same reason."""
    return [(names[0], reason + (f", as {len(names) - 1:,} more in this tar" if names[1:] else ""))] if names else []


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
