"""WebDataset samples: the image and the class that belong together in a tar."""

import argparse
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ..common import UserError
from ..images.files import ARRAY_SUFFIX, IMAGE_SUFFIXES
from .archives import LONGEST_NAME, clean_key, is_image, member_fault

CLASS_LIMIT = 10**6
"""Class numbers must be smaller, since a manifest lists the names of all classes up to the largest number."""
NO_CLASS = ("", "-1")
"""Contents of a class file that mean "unlabeled"."""
LONGEST_JSON = 1 << 16
"""Larger .json members are not searched for a class."""


def class_number(text: str) -> int | None:
    """Parse a class number from 0 to CLASS_LIMIT - 1; None for any other text."""
    digits = text.lstrip("0") or "0"
    valid = text.isascii() and text.isdigit() and len(digits) < len(str(CLASS_LIMIT))
    return int(digits) if valid else None


def add_image_extension(parser: argparse.ArgumentParser) -> None:
    """Add the option --image-extension, see `paired`."""

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


def expand_braces(pattern: str) -> list[str]:
    """Names that a brace pattern stands for, each once.

    Raises:
        UserError: the braces are unbalanced.
    """
    if "{" not in pattern:
        return [pattern]
    from webdataset.shardlists import expand_urls

    try:
        return list(dict.fromkeys(expand_urls(pattern)))
    except ValueError as error:
        raise UserError(
            f"The braces in {pattern} are unbalanced; use a pattern such as data/{{000..146}}.tar."
        ) from error


class Part(NamedTuple):
    """A member of a WebDataset tar that is part of a sample: an image or a class."""

    key: str
    extension: str
    """In lower case, all behind the first dot of the name; "cls" for a class, also if a .json member holds it."""
    name: str
    offset: int
    """Offset of the content in the tar in bytes."""
    size: int
    """Size of the content in bytes."""
    text: str
    """Content of a class, without surrounding white space; "" for an image."""


def read_parts(
    tar: tarfile.TarFile, members: Iterable[tarfile.TarInfo], extension: str | None, left_out: list[tuple[str, str]]
) -> Iterator[Part]:
    """Yield the images and classes in a seekable tar: members <key>.cls, and numbers named "label" in <key>.json.

    Args:
        members: the members of `tar`, in order.
        extension: see `paired`.
        left_out: receives (member name, reason) of those that can't be used.
    """
    for member in members:
        folder, _, base = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = base.partition(".")  # WebDataset keys end at the first dot
        suffix = sys.intern(suffix.lower())
        if not stem or member.isdir() or not (suffix in ("cls", "json", extension) or is_image(member.name)):
            continue
        text = ""
        if suffix == "json" != extension:
            if (label := _json_label(tar, member)) is None:
                continue
            suffix, text = "cls", str(label)
        elif fault := member_fault(member):
            left_out.append(fault)
            continue
        elif suffix == "cls":
            if member.size > LONGEST_NAME:
                left_out.append((member.name, f"a class of more than {LONGEST_NAME} bytes"))
                continue
            text = tar.extractfile(member).read().decode(errors="replace").strip()
        key = clean_key(f"{folder}/{stem}" if folder else stem)
        yield Part(key, suffix, member.name, member.offset_data, member.size, text)


def _json_label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int | None:
    """Class number in a .json member; None if it has none."""
    if member_fault(member) or member.size > LONGEST_JSON:
        return None
    try:
        content = json.loads(tar.extractfile(member).read())
    except (ValueError, RecursionError):  # the second for deeply nested brackets
        return None
    label = content.get("label") if isinstance(content, dict) else None
    return label if type(label) is int else None


def paired(
    parts: list[Part], path: Path | str, extension: str | None, left_out: list[tuple[str, str]]
) -> list[tuple[Part, Part | None]]:
    """Pair the image of each sample in a WebDataset tar with its class, None if it has none.

    Parts of one sample are normally adjacent. A class elsewhere in the tar is matched by its key. Arrays (.npy) are
    images only in a tar without image files, since they may hold anything else that belongs to an image.

    Args:
        parts: all parts, in the order of the tar.
        path: name of the tar in errors.
        extension: extension of the images to use, such as "jpg"; None accepts every image format.
        left_out: receives (member name, reason) of images and classes that are not used.

    Raises:
        UserError: a sample has images of different extensions.
    """
    wanted = {extension} if extension else IMAGE_SUFFIXES - {ARRAY_SUFFIX}
    if not extension and not any(part.extension in wanted for part in parts):
        wanted = {ARRAY_SUFFIX}
    used: list[Part] = []
    others: dict[str, str] = {}  # key -> name of an image of another extension
    for part in parts:
        if part.extension in wanted or part.extension == "cls":
            used.append(part)
        else:
            others.setdefault(part.key, part.name)
    pairs: list[tuple[Part, Part | None]] = []
    extensions: dict[str, str] = {}  # key -> extension of its images
    unlabeled: dict[str, list[int]] = {}  # key -> numbers of the samples without a class next to the image
    orphans: dict[str, list[Part]] = {}  # key -> classes without an image next to them
    for key, group in groupby(used, key=lambda part: part.key):
        image, classes = None, []
        for part in group:
            if part.extension == "cls":
                classes.append(part)
            elif (known := extensions.setdefault(key, part.extension)) != part.extension:
                raise UserError(
                    f"Sample {key} of {path} has two images, {key}.{known} and {key}.{part.extension}; use "
                    f"--image-extension {known} or --image-extension {part.extension} to choose."
                )
            elif image:
                left_out.append((part.name, "a second image of this name, of which the first is used"))
            else:
                image = part
        classes = [part for part in classes if not part.name.lower().endswith(".json")] or classes
        if not image:
            orphans.setdefault(key, []).extend(classes)
            continue
        if not classes:
            unlabeled.setdefault(key, []).append(len(pairs))
        left_out += [(part.name, "a second class of its image") for part in classes if part.text != classes[0].text]
        pairs.append((image, classes[0] if classes else None))
    bare: list[str] = []
    for key, classes in orphans.items():
        numbers = unlabeled.get(key, [])
        if len(numbers) == 1 and len({part.text for part in classes}) == 1:
            pairs[numbers[0]] = pairs[numbers[0]][0], classes[0]
        elif key in extensions:
            reason = "which image it belongs to is ambiguous, so it is not used"
            left_out += [(part.name, reason) for part in classes]
        else:
            bare += [part.name for part in classes]
    skipped = [name for key, name in others.items() if key not in extensions]
    dotted = "its extension, all behind the first dot, is unknown; use --image-extension or rename it"
    left_out += _first_of(bare, "its sample has no image")
    left_out += _first_of(skipped, f"its sample has no .{extension}" if extension else dotted)
    return pairs


def _first_of(names: list[str], reason: str) -> list[tuple[str, str]]:
    """One entry for all members that are left out for the same reason."""
    return [(names[0], reason + (f", as {len(names) - 1:,} more in this tar" if names[1:] else ""))] if names else []
