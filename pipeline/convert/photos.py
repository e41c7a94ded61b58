"""A folder, zip or tar of images as `--data`: converted once, and used again as long as it does not change.

    CACHE/photos/<name>-<id>/lock                    held while one process converts and others wait for it
    CACHE/photos/<name>-<id>/<fingerprint>/train/    the shard sets, the same as those of `pipeline.convert folder`
    CACHE/photos/<name>-<id>/<fingerprint>/test/
    CACHE/photos/<name>-<id>/<fingerprint>/done.json what was found, written last

A conversion that was interrupted is resumed, unless the images have changed in the meantime. The shards of an older
version that no process reads are deleted before the next conversion.
"""

import fnmatch
import hashlib
import json
import os
import shlex
import shutil
import sys
from array import array
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from ..common import PIPELINE, UserError, available_cores, replacing
from ..shards.archives import COMPRESSED_TARS
from ..shards.cache import Lease, ShardCache
from ..shards.dataset import SPLIT_TARS, ShardSet
from ..shards.duplicates import shared_images
from ..shards.remote import disk_errors
from .base import Item, Source
from .folder import AmbiguousClasses, Listing, files_below, list_images, named, parts_of
from .writer import write_split

RULES = 4
"""Version of the rules below; another one converts again."""
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
"""Name of a folder -> split that it holds."""
HELD_OUT, MOST_HELD_OUT = 0.1, 10_000
"""Share of each class that is kept for evaluation if there is no test split, and about how many images at most."""
ARCHIVES = (".zip", ".tar", *COMPRESSED_TARS)
SHARD_BYTES_PER_IMAGE = 2560
"""Most bytes that a shard and its index add to an image and its class, for names of ordinary length."""

_leases: dict[Path, Lease] = {}
"""Versions that this process reads, held to its end."""


class Photos(NamedTuple):
    """Splits of a collection of images, and how they were found."""

    sources: dict[str, Source]
    notes: list[str]
    """Sentences for the user."""


def is_photos(data: str) -> bool:
    """Whether `data` is a local folder or archive that may hold images, rather than shards or a URL.

    Raises:
        UserError: a folder may not be read, or holds both images and tars without an index.
    """
    path = Path(data)
    try:
        if "://" in data or not path.exists():
            return False
        if path.is_dir():
            folders = path, path / "train"
            if not folders[1].exists() and any(path.glob(".*.partial/plan.json")):
                raise UserError(
                    f"{data} holds an unfinished conversion; run the same `python -m {PIPELINE}.convert` command again."
                )
            for split in ("test", "val"):
                if (path / split / "dataset.json").exists() and not (path / "train").exists():
                    raise UserError(
                        f"{data} holds the shards of {split}/, but no train/; convert the training split, or use "
                        f"{path / split}."
                    )
            tars = [tar.name for folder in folders for tar in folder.glob("*.tar")]
            if tars and any((folder / "dataset.json").exists() for folder in folders):
                return False
            unknown = tars and not fnmatch.filter(tars, SPLIT_TARS["train"])  # those are indexed on their first use
            if unknown and any(not name.endswith("index.npy") for name, _ in files_below(path, [], [])):
                raise UserError(
                    f"{data} holds images as well as {min(tars)}; move the tar out of it to use the images, or the "
                    "images out of it to index the tar."
                )
            return not tars
        name = path.name.lower()
        return name.endswith(ARCHIVES) and not (name.endswith(".tar") and (path.parent / "dataset.json").exists())
    except PermissionError as error:
        raise UserError(f"{data} can't be read ({error.strerror}); change its permissions.") from error


def fingerprint(path: Path) -> str:
    """32 hexadecimal digits that change with the name, size or modification time of an image, or of the archive."""
    digest = hashlib.sha256(str(RULES).encode())
    if path.is_dir():
        modified = array("q")
        for file in files_below(path, [], modified):
            digest.update(repr(file).encode())
        digest.update(modified.tobytes())
    else:
        status = path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def convert_photos(path: Path, cache: ShardCache, agree: Callable[[str], str] = lambda found: found) -> Path:
    """Convert a collection of images unless the cache holds it; returns the folder of its splits.

    Of several processes that call it, one converts and the others wait for it.

    Args:
        path: folder, zip or tar.
        cache: its folder holds the shards. They do not count toward its limit.
        agree: takes the fingerprint that this process found and returns the one that all ranks must see.

    Raises:
        UserError: the images can't be used, have changed during the conversion or differ between ranks, or the cache
            has no room.
    """
    found = fingerprint(path)
    if agree(found) != found:
        raise UserError(
            f"The images in {path} are not the same for all processes; wait until nothing writes to it, and copy it to "
            "several machines with `rsync -a`."
        )
    identity = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    name = os.fsencode(path.resolve().name)[:100].decode(errors="ignore")  # file systems limit names to 255 bytes
    home = cache.folder / "photos" / f"{name}-{identity}"
    version = home / found
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / "lock").acquire()
    with lock:
        done = version / "done.json"
        if done.exists() and not _has_whole_tars(version):
            shutil.rmtree(version)
        if not done.exists():
            _remove_old(home, version, cache)
            _convert(path, version, found)
        first = version not in _leases
        if first:
            _leases[version] = Lease(cache)
            _leases[version].hold([found])
    if first and os.environ.get("RANK", "0") == "0":
        notes = json.loads(done.read_text())["notes"]
        print(f"{path}: {' '.join(notes)} The shards are in {version}", file=sys.stderr)
    return version


def _has_whole_tars(version: Path) -> bool:
    """Whether all tars have their sizes, which a crash of the machine or a cleaned cache may have changed."""
    try:
        tars = [
            (split / shard["file"], shard["bytes"])
            for split in version.glob("[!.]*/")
            for shard in json.loads((split / "dataset.json").read_text())["shards"]
        ]
        return bool(tars) and all(tar.stat().st_size == size for tar, size in tars)
    except (OSError, ValueError, KeyError, TypeError):  # a file is missing or damaged
        return False


def _remove_old(home: Path, version: Path, cache: ShardCache) -> None:
    """Delete other versions, finished or not, that no process reads."""
    leased = cache.leased()
    for old in home.iterdir():
        if old.is_dir() and old != version and old.name not in leased:
            shutil.rmtree(old)


def _convert(path: Path, version: Path, found: str) -> None:
    listing = list_images(path)
    sources, notes = photo_sources(path, listing)
    if len(listing.files) == 1:
        raise UserError(f"{path} holds one image, but training compares images with each other; use more images.")
    needed = sum(address[-1] + SHARD_BYTES_PER_IMAGE for _, address in listing.files)
    with disk_errors(version):
        version.mkdir(exist_ok=True)
        free = shutil.disk_usage(version).free + sum(file.stat().st_size for file in version.rglob("*"))
    if needed > free:
        raise UserError(
            f"Converting {path} takes {_size(needed)}, but {version} has room for {_size(free)}; free some space, or "
            "set --loader.cache-dir or $STREAMCLR_CACHE to another disk."
        )
    print(
        f"{path}: converting {len(listing.files):,} images ({_size(needed)}) once, to {version}",
        file=sys.stderr,
        flush=True,
    )
    workers = available_cores() * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the other ranks wait
    splits = [write_split(source, version, split, workers=workers, threads=True) for split, source in sources.items()]
    if fingerprint(path) != found:
        shutil.rmtree(version)
        raise UserError(
            f"{path} changed during its conversion; wait until nothing writes to it, and run the same command again."
        )
    with replacing(version / "done.json") as file:
        file.write_text(json.dumps({"path": str(path.resolve()), "notes": [*_counts(path, splits), *notes]}, indent=1))


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _counts(path: Path, splits: list[ShardSet]) -> list[str]:
    """Sentences on the numbers of images that are used, left out, and present more than once."""
    train, *tests = splits
    kept = "".join(f" and {len(test):,} evaluation images" for test in tests)
    counts = [f"{len(train):,} training images{kept}."]
    if left_out := sum(shards.manifest["rejected"] for shards in splits):
        counts.append(f"Unreadable and left out: {left_out:,} (rejected.csv).")
    copies = sum(shards.manifest["statistics"]["duplicates"] for shards in splits)
    shared = sum(len(shared_images(test, train)) for test in tests)
    if copies:
        counts.append(f"{copies:,} are exact copies of others (duplicates.csv).")
    if shared:
        counts.append(f"{shared:,} evaluation images are also training images.")
    if copies or shared:
        command = f"python -m {PIPELINE}.convert folder {shlex.quote(str(path))} SHARDS --split auto --drop-duplicates"
        counts.append(f"`{command}` leaves copies out.")
    return counts


def photo_sources(path: Path, listing: Listing | None = None, class_level: str | None = None) -> Photos:
    """Splits of a collection of images.

    Folders called train and test (or val, and the like) are the splits; test is preferred if both have labels. Without
    a split of the same classes, a part of each class is kept as one. A single class, or nested folders of which it is
    unclear which ones are the classes, mean that there are no labels; then nothing is kept.

    Args:
        path: folder, zip or tar.
        listing: its images, if they have been listed.
        class_level: see `pipeline.convert.folder.named`.

    Raises:
        UserError: as `list_images`, or there are no images.
    """
    listing = listing or list_images(path)
    if not listing.files:
        first = f" (the first file that cannot be used: {': '.join(listing.left_out[0])})" if listing.left_out else ""
        raise UserError(
            f"No images in {path}{first}; use a folder, zip or tar with .jpg, .png or similar files, or shards."
        )
    notes: list[str] = []
    folders = _split_folders(listing.files, notes)
    files = folders.pop("train", listing.files)
    train = _named(files, class_level, notes)
    if len(classes := _classes(train)) == 1:
        notes.append(f"All labeled images are of class {classes.pop()}, so they count as unlabeled.")
        train = named(files, "none")
    parts = {"train": train}
    for split, files in folders.items():
        if len(parts) == 2:  # evaluation uses one
            notes.append(f"The {split} images are not used because there are test images.")
            break
        items = _named(files, class_level if classes else "none", notes)
        if foreign := sorted(_classes(items) - classes):
            notes.append(f"The {split} images are not used because no training image is of class {foreign[0]}.")
        elif classes and not _classes(items):
            notes.append(f"The {split} images are not used because they have no labels.")
        else:
            parts[split] = items
    if not classes:
        notes.append("Without labels there are no kNN scores.")
    elif len(parts) == 1 and (kept := held_out(train)).any():
        for split, wanted in ("train", False), ("test", True):
            parts[split] = [item for item, test in zip(train, kept, strict=True) if test == wanted]
        notes.append(
            f"The evaluation images are a tenth of each class (at most about {MOST_HELD_OUT:,} in all), chosen by name."
        )
    elif len(parts) == 1:
        notes.append("No class has two images, so none are kept for evaluation.")
    names = sorted(classes)
    return Photos({split: listing.source(items, split == "train", names) for split, items in parts.items()}, notes)


def _split_folders(files: list[tuple[str, tuple]], notes: list[str]) -> dict[str, list[tuple[str, tuple]]]:
    """Images of the train, test and val splits, by split, with paths inside it; {} without splits."""
    paths = [parts_of(name) for name, _ in files]
    low, high = (choose(path[:-1] for path in paths) for choose in (min, max))
    depth = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))))  # folders of all images
    inside: dict[str, list[tuple[str, tuple]]] = {}
    for path, (_, address) in zip(paths, files, strict=True):
        top = path[depth] if len(path) > depth + 1 else ""
        inside.setdefault(top, []).append(("/".join(path[depth + 1 :]), address))
    by_split: dict[str, str] = {}
    for folder in inside:
        by_split.setdefault(SPLITS.get(folder.lower(), ""), folder)
    used = {split: by_split[split] for split in ("train", "test", "val") if split in by_split}
    if "train" not in used or len(used) == 1:
        return {}
    if unused := [folder or "images outside of folders" for folder in inside if folder not in used.values()]:
        notes.append(f"Not used: {', '.join(unused[:5])}{' and more' if unused[5:] else ''}.")
    return {split: inside[folder] for split, folder in used.items()}


def _named(files: list[tuple[str, tuple]], class_level: str | None, notes: list[str]) -> list[Item]:
    """Items with classes, or without them if they are ambiguous."""
    try:
        return named(files, class_level)
    except AmbiguousClasses:
        notes.append(
            "It is ambiguous which nested folders are the classes, so the images count as unlabeled; use `python -m "
            "pipeline.convert folder` with --class-level first or last to label them."
        )
        return named(files, "none")


def _classes(items: list[Item]) -> set[str]:
    return {label for label, _, _ in items if label is not None}


def held_out(items: list[Item]) -> np.ndarray:
    """(N,) bool: the images to evaluate with, `HELD_OUT` of each class: at least one of several, and not all.

    The images of a class whose keys have the smallest SHA-256 are chosen, so that the choice is random but hardly
    changes when images are added.
    """
    by_class: dict[str, list[int]] = {}
    for place, (label, _, _) in enumerate(items):
        if label is not None:
            by_class.setdefault(label, []).append(place)
    share = min(HELD_OUT, MOST_HELD_OUT / max(sum(map(len, by_class.values())), 1))
    kept = np.zeros(len(items), bool)
    for places in by_class.values():
        count = min(max(int(share * len(places)), 1), len(places) - 1)
        kept[sorted(places, key=lambda place: hashlib.sha256(items[place][1].encode()).digest())[:count]] = True
    return kept
