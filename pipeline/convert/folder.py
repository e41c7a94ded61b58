"""Images in class folders, either in a folder on disk or in an uncompressed tar."""

import errno
import os
from array import array
from collections.abc import Iterator, MutableSequence
from functools import partial
from pathlib import Path

from ..common import UserError
from ..shards.archives import TOO_LONG, image_members, is_image, is_long, open_tar, refuse_url
from .base import Source, modified_ns, raise_if_gone, read_range
from .naming import named


def folder_source(path: Path, class_level: str | None = None) -> Source:
    """Class folders below a folder or in an uncompressed tar.

    Images at the top level have no class. Links are followed in a folder and refused in a tar.

    Args:
        path: folder or tar.
        class_level: see `named`.

    Raises:
        UserError: the folder or tar does not exist, the tar is damaged or holds links or paths that lead out of it,
            the classes are ambiguous, or two images have the same key.
    """
    refuse_url(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; use the folder or tar that holds the images.")
    left_out: list[tuple[str, str]] = []
    if path.is_dir():
        modified = array("q")
        items = named(_files_below(path, left_out, modified), class_level)
        return Source(path.resolve().name, items, partial(read_file, path), left_out=left_out, modified=modified)
    with open_tar(path) as tar:
        files = ((member.name, (member.offset_data, member.size)) for member in image_members(tar, path, left_out))
        items = named(files, class_level)
    return Source(path.stem, items, partial(read_range, path), left_out=left_out, modified=modified_ns([path]))


def read_file(root: Path, name: str, size: int) -> bytes:
    """Read the file `name` below `root`, whatever its size; errors as in `read_range`."""
    try:
        return (root / name).read_bytes()
    except OSError as error:
        raise_if_gone(root, error)
        raise


def _files_below(
    folder: Path, left_out: list[tuple[str, str]], modified: MutableSequence[int]
) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield (relative path, (relative path, size in bytes)) of the images below a folder, in sorted order.

    Links are followed unless they lead back to a folder above them. `left_out` receives (name, reason) of images that
    cannot be used, `modified` the modification time (ns) of each image.
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
