"""Keys and classes of images, derived from their paths."""

import posixpath
import sys
from collections.abc import Iterable
from itertools import pairwise

from ..common import UserError
from ..shards.archives import clean_key
from .base import Item

CLASS_LEVELS = ("first", "last", "none")


def named(files: Iterable[tuple[str, tuple]], class_level: str | None = None) -> list[Item]:
    """Turn (path, address) pairs into (class, key, address) items.

    Leading folders that all images share are ignored; the folders directly below them are the classes. Images at the
    top level have no class. Keys contain no dot and are unique, as WebDataset requires.

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
        *parents, file = (part for part in clean_key(name).split("/") if part not in ("", ".", ".."))
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
        one, other = next(pair for pair in pairwise(sorted(folders)) if first[pair[0]] == first[pair[1]])
        raise UserError(
            f"The class of the images in {one} and {other} is ambiguous; use `convert folder` with --class-level "
            "first, last or none."
        )
    classes = last if level == "last" else first
    return {folder: sys.intern(name) for folder, name in classes.items()}  # one string per class saves memory
