"""Safe reading of tars of images, refusing damage, links and paths out of the tar; grouping of WebDataset samples."""

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
"""Longest member name in bytes. An index stores all keys at the width of the longest, so one long name inflates it."""
TOO_LONG = f"its name is longer than {LONGEST_NAME} bytes"
CLASS_LIMIT = 10**6
"""Class numbers must be smaller, since a manifest lists the names of all classes up to the largest number."""
NO_CLASS = ("", "-1")
"""Contents of a class file that mean "unlabeled"."""

T = TypeVar("T")


def refuse_url(path: Path, remedy: str = "copy it to a folder first") -> None:
    """Refuse a URL where a local path is required."""
    if re.match(r"[a-z][a-z0-9+]+:/", str(path)):  # Path collapses the double slash
        raise UserError(f"{path} is a URL, but a local path is required; {remedy}.")


def is_image(name: str) -> bool:
    """Whether a file name has an image extension. `._photo.jpg` is macOS metadata of `photo.jpg`, not an image."""
    return posixpath.splitext(name)[1][1:].lower() in IMAGE_SUFFIXES and not posixpath.basename(name).startswith("._")


def clean_key(name: str) -> str:
    """Escape bytes of a file name that are not valid UTF-8, which an index cannot store."""
    return name if name.isascii() else name.encode(errors="backslashreplace").decode()


def one_line(name: str) -> str:
    """Escape line breaks and terminal control codes, which a file name may contain."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def is_long(name: str) -> bool:
    """Whether a name exceeds `LONGEST_NAME`."""
    return len(clean_key(name).encode()) > LONGEST_NAME


def class_number(text: str) -> int | None:
    """Parse a class number from 0 to CLASS_LIMIT - 1; None for any other text."""
    digits = text.lstrip("0") or "0"
    valid = text.isascii() and text.isdigit() and len(digits) < len(str(CLASS_LIMIT))
    return int(digits) if valid else None


class CheckedMember(tarfile.TarInfo):
    """Tar member header that raises tarfile.ReadError if it is damaged; pass it to `tarfile.open` as `tarinfo`.

    By default, tarfile treats any damaged or missing header except the first as the regular end of the tar.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        start = tar.offset
        try:
            member = super().fromtarfile(tar)
            if member.size < 0 or not start < tar.offset < 2**63:  # tarfile would seek backwards and loop
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
    """Open an uncompressed tar.

    Raises:
        UserError: there is no such file, or it is damaged (also while the block reads it).
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; use the path of the tar that holds the images.")
    try:
        with tarfile.open(path, "r:", tarinfo=CheckedMember) as tar:
            yield tar
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # EINVAL: a seek beyond the maximum file size
        cause = "unexpected end of data" if isinstance(error, OSError) else error
        remedy = "decompress it if it is a .gz or .xz, else download or copy it again"
        raise UserError(f"{path} is not a whole, uncompressed tar ({cause}); {remedy}.") from error


def members(tar: tarfile.TarFile, path: Path | str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar.

    Args:
        path: name of the tar in errors.

    Raises:
        UserError: a member is a link, or its path leads out of the tar.
    """
    for member in tar:
        _refuse_unsafe(member, path)
        yield member
        tar.members = []  # tarfile would otherwise keep them, 1 GB for a million images


def _refuse_unsafe(member: tarfile.TarInfo, path: Path | str) -> None:
    """Refuse links and paths out of the tar. Nothing is extracted under its own name, but such a tar is suspicious."""
    if member.issym() or member.islnk():
        raise UserError(
            f"{path} holds {member.name}, a link to {member.linkname}, and links in a tar are not followed: "
            "pack the files themselves with `tar --dereference --hard-dereference`."
        )
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(
            f"{path} holds {member.name}, a path that leads out of it: pack the folder again from inside, "
            "or download the archive from a trusted source."
        )


def image_members(
    tar: tarfile.TarFile, path: Path | str, left_out: list[tuple[str, str]], others: list[str] | None = None
) -> Iterator[tarfile.TarInfo]:
    """Yield the images in a tar that are plain files.

    Args:
        path: name of the tar in errors.
        left_out: receives (name, reason) of images that are not plain files or have too long a name.
        others: receives the names of members that are not images.

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
    """(name, reason) of a member that can't be used, whatever its content; None if it can."""
    if is_long(member.name):
        return f"{member.name[:80]}...", TOO_LONG
    return None if member.isfile() and not member.issparse() else (member.name, NOT_PLAIN)


def add_image_extension(parser: argparse.ArgumentParser) -> None:
    """Add the option --image-extension, see `image_samples`."""

    def extension(text: str) -> str:
        if not (cleaned := text.lower().removeprefix(".")) or cleaned == "cls" or "/" in cleaned:
            raise argparse.ArgumentTypeError(f"{text!r} is not an image extension, such as jpg")
        return cleaned

    parser.add_argument(
        "--image-extension",
        type=extension,
        metavar="EXTENSION",
        help="extension of the images to use, such as jpg, if WebDataset samples hold several images (default: the "
        "only image)",
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

    Members of one sample are normally adjacent. A class elsewhere in the tar is matched by its key.

    Args:
        tar: members in the order of the tar.
        path: name of the tar in errors.
        read_image, read_class: called with a member before the next one is taken from `tar`.
        extension: extension of the images, such as "jpg"; None accepts every image format.
        left_out: receives (member name, reason) of images and classes that are not used.
        classes: receives sample number -> (member name, text) of its class; complete only after the last sample.

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
            stem, _, suffix = base.partition(".")  # WebDataset keys end at the first dot
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
    finally:  # also if a damaged tar ends early
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
    """One entry for all members that are left out for the same reason."""
    return [(names[0], reason + (f", as {len(names) - 1:,} more in this tar" if names[1:] else ""))] if names else []


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
    try:
        with tarfile.open(path, tarinfo=CheckedMember) as tar:
            for member in tar:
                name = posixpath.basename(member.name)
                if name in wanted:
                    _refuse_unsafe(member, path)
                if name in wanted and member.isfile():
                    found[name] = scratch / name
                    with tar.extractfile(member) as packed, open(found[name], "wb") as file:
                        shutil.copyfileobj(packed, file, 1 << 20)
                tar.members = []
    except (tarfile.TarError, EOFError, zlib.error) as error:
        cause = str(error).partition("\n")[0].rstrip(":")  # tarfile adds one line per compression format
        raise UserError(f"{path} is not a whole archive ({cause}); download it again.") from error
    except OSError as error:
        remedy = "download it again if it is damaged, else set TMPDIR to a folder with room for it"
        raise UserError(f"{path} can't be unpacked to {scratch} ({error.strerror or error}); {remedy}.") from error
    return found
