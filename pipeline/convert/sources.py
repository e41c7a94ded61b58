"""Where images to convert come from: a `Source` lists them all and reads one by its address.

Here are the sources that consist of image files: a folder, a tar, WebDataset tars, and the built-in textures.
ImageNet's archives are in `imagenet.py`, CIFAR and STL-10 in `pixel_sets.py`.
"""

import errno
import os
import posixpath
import tarfile
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ..common import UserError
from ..shards.archives import (
    NO_CLASS,
    TOO_LONG,
    class_number,
    clean_key,
    image_members,
    image_samples,
    is_image,
    is_long,
    members,
    open_tar,
    refuse_url,
)
from ..shards.dataset import open_shards

Item = tuple[str | None, str, tuple]
"""(class or None, key, address of strings and integers) of one image."""


@dataclass(frozen=True)
class Source:
    """Images with their classes; a million items take about 0.3 GB."""

    name: str
    items: list[Item]
    read: Callable[..., bytes]
    """read(*address) -> the encoded image; pickled to be called in other processes."""
    classes: list[str] | None = None
    """In the order of their numbers; None: the classes of the items, sorted."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of what the listing met and refused."""
    encodes: bool = False
    """Whether `read` makes PNGs of pixels, of which another version of OpenCV may make other bytes."""
    scratch: tempfile.TemporaryDirectory | None = None
    """Holds what had to be unpacked; deleted together with the source."""
    modified: Sequence[int] = ()
    """Modification times (ns) of the files that hold the images: if one differs, so may the images."""


def folder_source(path: Path, class_level: str | None = None) -> Source:
    """Class folders below a folder, or in an uncompressed tar.

    Images at the top, in no folder, have no class. Links in a folder are followed, links in a tar refused.

    Args:
        class_level: see `named`.

    Raises:
        UserError: there is no such folder or tar, one that holds links or paths that lead out of it, classes are
            ambiguous, or two images would get the same key.
    """
    refuse_url(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give the folder or tar that holds the images.")
    left_out: list[tuple[str, str]] = []
    if path.is_dir():
        modified = array("q")
        items = named(files_below(path, left_out, modified), class_level)
        return Source(path.resolve().name, items, FolderReader(path), left_out=left_out, modified=modified)
    with open_tar(path) as tar:
        files = ((member.name, (member.offset_data, member.size)) for member in image_members(tar, path, left_out))
        items = named(files, class_level)
    return Source(path.stem, items, TarReader(path), left_out=left_out, modified=modified_ns([path]))


def webdataset_source(path: Path, image_extension: str | None = None) -> Source:
    """WebDataset tars in a folder, or one tar: the image of each sample and its class (`<key>.cls`), if it has one.

    Classes that are numbers keep them and, if `path` is one of our own shard sets, their names; other texts are taken
    for names. Members of other kinds are not carried over.

    Args:
        image_extension: see `image_samples`.

    Raises:
        UserError: no tars, one that is damaged or holds links or paths that lead out of it, a sample with two images,
            or a key that occurs twice in one tar.
    """
    refuse_url(path, "index it in place by `python -m pipeline.shards index`, or copy it to a folder first")
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not tars:
        raise UserError(f"There is no .tar in {path}: give the folder that holds the shards.")
    left_out: list[tuple[str, str]] = []
    found = [(tar, *sample) for tar in tars for sample in _webdataset_samples(tar, image_extension, left_out)]
    labels = {label for *_, label in found if label is not None}
    numbers = {label: class_number(label) for label in labels}
    numbered = None not in numbers.values()
    classes = _class_names(path, 1 + max(numbers.values(), default=-1)) if numbered else sorted(labels)
    names = {label: classes[number] if numbered else label for label, number in numbers.items()}
    repeated = len({key for _, key, *_ in found}) < len(found)  # tars that each begin at 000000
    items, taken = [], set()
    for tar, key, address, label in found:
        unique = clean_key(f"{tar.stem}/{key}") if repeated else key
        if unique in taken:
            raise UserError(f"{tar} holds the key {key} twice: rename one of the samples.")
        taken.add(unique)
        items.append((names.get(label), unique, (tar.name, *address)))
    folder = path if path.is_dir() else path.parent
    name = path.resolve().name.removesuffix(".tar")
    return Source(name, items, TarsReader(folder), classes, left_out, modified=modified_ns(tars))


def _webdataset_samples(
    path: Path, extension: str | None, left_out: list[tuple[str, str]]
) -> list[tuple[str, tuple[int, int], str | None]]:
    """(key, (offset, size), class or None) of the samples in one tar that have an image."""
    refused: list[tuple[str, str]] = []
    classes: dict[int, tuple[str, str]] = {}

    def place(member: tarfile.TarInfo) -> tuple[int, int]:
        return member.offset_data, member.size

    with open_tar(path) as tar:

        def content(member: tarfile.TarInfo) -> bytes:
            return tar.extractfile(member).read()

        found = list(image_samples(members(tar, path), path, place, content, extension, refused, classes))
    left_out += [(f"{path.name}:{name}", reason) for name, reason in refused]
    labels = {number: text for number, (_, text) in classes.items() if text not in NO_CLASS}
    return [(key, address, labels.get(number)) for number, (key, _, address) in enumerate(found)]


def _class_names(path: Path, count: int) -> list[str]:
    """The names in the manifest of a shard set of ours that `path` is or belongs to, and numbers for other classes.

    Raises:
        UserError: two classes have the same name.
    """
    folder = path if path.is_dir() else path.parent
    try:
        manifest = open_shards(str(folder)).manifest if (folder / "dataset.json").is_file() else {"classes": []}
    except UserError:
        manifest = {"classes": []}
    listed = path == folder or path.name in {shard["file"] for shard in manifest.get("shards", [])}
    names = manifest["classes"] if listed else []
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{folder}/dataset.json names two classes {twice[0]}; rename one of them.")
    return names + [str(number) for number in range(len(names), count)]


@dataclass(frozen=True)
class FolderReader:
    """Reads files by their path below `root`."""

    root: Path

    def __call__(self, name: str, size: int) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise_if_gone(self.root, error)
            raise


@dataclass(frozen=True)
class TarReader:
    """Reads members of a tar by the place of their content."""

    path: Path

    def __call__(self, offset: int, size: int) -> bytes:
        try:
            with open(self.path, "rb", buffering=0) as tar:  # opening costs 10 us; a file kept open must be closed
                tar.seek(offset)
                return tar.read(size)
        except OSError as error:
            raise_if_gone(self.path, error)
            raise


@dataclass(frozen=True)
class TarsReader:
    """Reads members of the tars in a folder."""

    folder: Path

    def __call__(self, tar: str, offset: int, size: int) -> bytes:
        return TarReader(self.folder / tar)(offset, size)


def raise_if_gone(path: Path, error: OSError) -> None:
    """One unreadable image is left out, but a source that has gone away must not leave out all the others."""
    try:
        with os.scandir(path) if path.is_dir() else open(path, "rb"):
            pass
    except OSError:
        raise UserError(
            f"{path} can no longer be read ({error.strerror}): see to the disk and run the same command again, "
            "which goes on where it stopped."
        ) from error


def modified_ns(files: Iterable[Path]) -> list[int]:
    return [file.stat().st_mtime_ns for file in files]


def files_below(
    folder: Path, left_out: list[tuple[str, str]], modified: MutableSequence[int]
) -> Iterator[tuple[str, tuple[str, int]]]:
    """(path below the folder, (the same, size)) of the images, sorted; links are followed, but not in circles.

    Args:
        modified: takes the modification time (ns) of each.
    """

    def walk(at: str | Path, prefix: str, above: frozenset) -> Iterator[tuple[str, tuple[str, int]]]:
        status = os.stat(at)
        identity = status.st_dev, status.st_ino
        if identity in above:
            return
        with os.scandir(at) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        for entry in inside:
            name = prefix + entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                is_folder = is_file = False  # a link to itself
            if not is_folder and not is_image(entry.name):
                continue
            if is_long(name):
                left_out.append((f"{name[:80]}...", TOO_LONG))
            elif is_folder:
                yield from walk(entry.path, f"{name}/", above | {identity})
            elif is_file:
                status = entry.stat()
                modified.append(status.st_mtime_ns)
                yield name, (name, status.st_size)
            else:
                left_out.append((name, "a link that leads nowhere, or not a plain file"))

    return walk(folder, "", frozenset())


CLASS_LEVELS = ("first", "last", "none")


def named(files: Iterable[tuple[str, tuple]], class_level: str | None = None) -> list[Item]:
    """(path, address) -> (class, key, address); a key has no dot and is unique, as WebDataset demands.

    Folders that all images share are disregarded; what lies directly below them are the class folders. Images at the
    top, in no folder, have no class.

    Args:
        class_level: which folder is the class where folders are nested: the "first", or the "last", which holds the
            image; "none" for no classes. Default: the first, which must then determine the others
            (<class>/images/*.jpg).

    Raises:
        UserError: the classes are ambiguous, or two images would get the same key.
    """
    found, shared = [], {}
    for name, address in files:
        *folders, file = (part for part in clean_key(name).split("/") if part not in ("", ".", ".."))
        folder = "/".join(folders)
        found.append((shared.setdefault(folder, folder), file, address))  # one string per folder, not one per image
    classes = _classes_of_folders([folder for folder in shared if folder], class_level)
    taken = set()
    for place, (folder, file, address) in enumerate(found):  # in place: there may be millions
        label = classes.get(folder)
        prefix = label or folder.rpartition("/")[2]
        stem = posixpath.splitext(file)[0].replace(".", "_")
        key = f"{prefix}/{stem}" if prefix else stem
        if key in taken:
            key = "/".join([*filter(None, [folder]), file.replace(".", "_")])
        if key in taken:
            raise UserError(f"Two images would get the key {key}: rename one of them.")
        taken.add(key)
        found[place] = label, key, address
    return found


def _classes_of_folders(folders: list[str], level: str | None) -> dict[str, str]:
    """Folder -> class; `folders` are the paths of those that hold images."""
    if not folders or level == "none":
        return {}
    paths = {folder: folder.split("/") for folder in folders}
    common = posixpath.commonpath(folders)
    shared = min(len(common.split("/")) if common else 0, min(map(len, paths.values())) - 1)
    first = {folder: path[shared] for folder, path in paths.items()}
    last = {folder: path[-1] for folder, path in paths.items()}
    if level is None and first != last and len(set(first.values())) < len(folders):
        one, other = next(pair for pair in pairwise(sorted(folders)) if first[pair[0]] == first[pair[1]])
        raise UserError(
            f"Images lie in {one} and in {other}, so their class is ambiguous; use `convert folder` with --class-level "
            "first, last or none."
        )
    classes = last if level == "last" else first
    names = {name: name for name in classes.values()}  # one string per class
    return {folder: names[name] for folder, name in classes.items()}
