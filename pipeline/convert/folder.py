"""Images in class folders: in a folder on disk, in an uncompressed tar, or in a zip."""

import errno
import os
import posixpath
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from ..common import UserError
from ..shards.archives import TOO_LONG, clean_key, image_members, is_hidden, is_image, is_long, open_tar, refuse_url
from .base import Item, Source, modified_ns, raise_if_gone, read_range
from .zips import is_zip, read_zipped, zip_images

CLASS_LEVELS = ("first", "last", "none")


class AmbiguousClasses(UserError):
    """Nested folders do not say which of them are the classes."""


@dataclass(frozen=True)
class Listing:
    """Images below a folder or in an archive, in the order of a walk through the folder."""

    name: str
    files: list[tuple[str, tuple]]
    """(POSIX path, address) of each image; an address ends with the size in bytes."""
    read: Callable[..., bytes]
    left_out: list[tuple[str, str]]
    modified: Sequence[int]
    """See `Source`."""

    def source(self, items: list[Item], with_left_out: bool = True, classes: list[str] | None = None) -> Source:
        """Source of some of the images, which lists the files that were left out or not."""
        left_out = self.left_out if with_left_out else []
        return Source(self.name, items, self.read, classes, left_out, modified=self.modified)


def folder_source(path: Path, class_level: str | None = None) -> Source:
    """Class folders below a folder, in an uncompressed tar, or in a zip.

    Images at the top level have no class. Links are followed in a folder and refused in an archive. The same images
    give the same shards in each form.

    Args:
        path: folder, tar or zip.
        class_level: see `named`.

    Raises:
        UserError: as `list_images`; the classes are ambiguous, or two images have the same key.
    """
    listing = list_images(path)
    return listing.source(named(listing.files, class_level))


def list_images(path: Path) -> Listing:
    """List the images in a folder, tar or zip.

    Raises:
        UserError: it does not exist, or can't be read; the archive is damaged, or holds links or paths that lead out
            of it.
    """
    refuse_url(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; use the folder, tar or zip that holds the images.")
    left_out: list[tuple[str, str]] = []
    if path.is_dir():
        modified = array("q")
        files = list(files_below(path, left_out, modified))
        return Listing(path.resolve().name, files, partial(read_file, path), left_out, modified)
    if is_zip(path):
        files, read = zip_images(path, left_out), partial(read_zipped, path)
    else:
        with open_tar(path) as tar:
            files = [(member.name, (member.offset_data, member.size)) for member in image_members(tar, path, left_out)]
        read = partial(read_range, path)
    # dict: of several members of one name, which `tar --append` writes, the last one counts
    files = sorted(dict(files).items(), key=lambda file: parts_of(file[0]))
    return Listing(path.stem, files, read, left_out, modified_ns([path]))


def parts_of(name: str) -> list[str]:
    """Folders and file of a POSIX path."""
    return [part for part in name.split("/") if part not in ("", ".", "..")]


def read_file(root: Path, name: str, size: int) -> bytes:
    """Read the file `name` below `root`, whatever its size.

    Raises:
        OSError, UserError: as in `read_range`; a UserError also if the file may not be read, because the shards would
            stay without it when its permissions are changed, which changes neither its size nor its time.
    """
    try:
        return (root / name).read_bytes()
    except OSError as error:
        raise_if_gone(root, error)
        if isinstance(error, PermissionError):
            raise unreadable_below(root, error) from error
        raise


def unreadable_below(folder: Path, error: PermissionError) -> UserError:
    """Error for a file or folder below `folder` that may not be read."""
    return UserError(
        f"{error.filename} can't be read ({error.strerror}); change its permissions, or move it out of {folder}."
    )


def files_below(
    folder: Path, left_out: list[tuple[str, str]], modified: MutableSequence[int]
) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield (relative path, (relative path, size in bytes)) of the images below a folder, in sorted order.

    Links are followed unless they lead back to a folder above them. `left_out` receives (name, reason) of images that
    cannot be used, `modified` the modification time (ns) of each image.

    Raises:
        UserError: a folder may not be listed.
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
            if is_hidden(entry.name) if is_folder else not is_image(entry.name):
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

    try:
        yield from walk(folder, "", frozenset())
    except PermissionError as error:
        raise unreadable_below(folder, error) from error


def named(files: Iterable[tuple[str, tuple]], class_level: str | None = None) -> list[Item]:
    """Turn (path, address) pairs into (class, key, address) items.

    Leading folders that all images share are ignored; the folders directly below them are the classes. Images at the
    top level have no class. Keys are unique, and their file names contain no dot, as WebDataset requires.

    Args:
        files: POSIX paths relative to the source, each with the address of the image.
        class_level: nested folder that names the class: "first"; "last", the folder that holds the image; or "none"
            for no classes. The default is the first folder, provided that it determines the folders below it
            (<class>/images/*.jpg).

    Raises:
        UserError: the classes are ambiguous, or two images have the same key.
    """
    items, folders = [], {}
    for name, address in files:
        *parents, file = parts_of(clean_key(name))
        folder = "/".join(parents)
        items.append((folders.setdefault(folder, folder), file, address))  # one string per folder saves memory
    classes = _classes_of_folders([folder for folder in folders if folder], class_level)
    taken = set()
    for place, (folder, file, address) in enumerate(items):  # replaced in place because there may be millions
        label = classes.get(folder)
        prefix = label or folder.rpartition("/")[2]
        stem = posixpath.splitext(file)[0].replace(".", "_")
        key = f"{prefix}/{stem}" if prefix else stem
        if key in taken:
            key = "/".join([*filter(None, [folder]), file.replace(".", "_")])
        if key in taken:
            raise UserError(f"Two images have the key {key}; rename one of them.")
        taken.add(key)
        items[place] = label, key, address
    return items


def _classes_of_folders(folders: list[str], level: str | None) -> dict[str, str]:
    """Map each folder that directly holds images to its class."""
    if not folders or level == "none":
        return {}
    paths = {folder: folder.split("/") for folder in folders}
    common = posixpath.commonpath(folders)
    shared = min(len(common.split("/")) if common else 0, min(map(len, paths.values())) - 1)
    first = {folder: path[shared] for folder, path in paths.items()}
    last = {folder: path[-1] for folder, path in paths.items()}
    if level is None and first != last and len(set(first.values())) < len(folders):
        ordered = sorted(folders, key=lambda folder: (first[folder], folder))
        one, other = next(pair for pair in pairwise(ordered) if first[pair[0]] == first[pair[1]])
        raise AmbiguousClasses(
            f"The class of the images in {one} and {other} is ambiguous; use `convert folder` with --class-level "
            "first, last or none."
        )
    classes = last if level == "last" else first
    return {folder: sys.intern(name) for folder, name in classes.items()}  # one string per class saves memory
