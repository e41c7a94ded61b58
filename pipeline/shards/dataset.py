"""The shard set: plain WebDataset tars, one index per tar, and a `dataset.json` that is written last.

    ROOT/dataset.json            name, split, classes, counts, channels, bits, checksums, creation options
    ROOT/train-000000.tar        <key>.jpg and <key>.cls pairs, compatible with the webdataset library
    ROOT/train-000000.index.npy  one `index_dtype` row per sample, so that any sample is one read at a known offset
    ROOT/index.npy               the rows of all shards, in sets of more than `READ_WHOLE`; memory-mapped

A folder without `dataset.json` is not a shard set, so an interrupted conversion is never mistaken for a complete one.
The index of a set in a read-only location, such as an http:// address, is in the cache of the machine that created it.

Sets on the Hugging Face Hub often keep the tars of all splits in one folder, as NAME-train-0000.tar and
NAME-validation-00.tar. Such a split has the root FOLDER/*-train-*.tar, and its index is always in the cache.
"""

import fnmatch
import hashlib
import io
import json
import os
import posixpath
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from ..common import PIPELINE, UserError
from ..images.arrays import MOST_CHANNELS
from ..images.pixel_format import RGB8, PixelFormat
from .cache import ShardCache
from .format import FORMAT, READ_WHOLE, ROWS, index_dtype, index_name
from .remote import HUB, PERMANENT_ERRORS, RetryPolicy, filesystem, is_local, read_file, unreadable, with_retries
from .threads import DaemonThreads

SMALLEST = {"samples": 0, "bytes": 0, "top_label": -1}  # integers of a shard's manifest entry
FILE_NAME = re.compile(r"(?!\.\.?$)[^/\\\0]+")
ALL_TARS = "*.tar"
SPLIT_TARS = {"train": "*-train-*.tar", "val": "*-validation-*.tar", "test": "*-test-*.tar"}
"""Split -> names of its tars in a folder that holds the tars of all splits."""
OPTIONAL_KEYS = {"name": str, "split": str, "made_by": dict, "left_out": list, "rejected": int, "statistics": dict}


@dataclass(frozen=True)
class ShardSet:
    """An opened shard set. `index` holds every sample of every shard, in the order of the manifest."""

    root: str
    """Folder or URL of the tars."""
    manifest: dict[str, Any]
    """Content of `dataset.json`."""
    index: np.ndarray
    """(N,) structured rows of `index_dtype`; memory-mapped in large sets, so read slices of it."""
    index_root: str
    """Folder of `dataset.json` and the indexes: `root`, or a folder in the cache if `root` is read-only."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def classes(self) -> list[str]:
        """Class names by class number."""
        return self.manifest["classes"]

    @property
    def pixel_format(self) -> PixelFormat:
        """Channels and bits of all images; 8-bit RGB in sets written by versions that knew no other."""
        return PixelFormat(**self.manifest.get("pixels", {}))

    @property
    def checksum(self) -> str:
        """SHA-256 over the checksums of all shards, as 64 hexadecimal digits."""
        return hashlib.sha256("".join(shard["sha256"] for shard in self.manifest["shards"]).encode()).hexdigest()

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """(S + 1,) int64: sample i is in shard s where shard_starts[s] <= i < shard_starts[s + 1]."""
        return np.cumsum([0] + [shard["samples"] for shard in self.manifest["shards"]])


def open_shards(root: str, cache: ShardCache | None = None) -> ShardSet:
    """Open a shard set in a folder or at any URL that fsspec supports.

    The common index of a remote set is downloaded to the cache and memory-mapped.

    Raises:
        UserError: there is no shard set, it is empty or can't be read, or its index does not belong to it.
    """
    cache = cache or ShardCache()
    fs, folder, index_root, content = _find_manifest(root, cache)
    index_again = f"run `python -m {PIPELINE}.shards index {root}` to create it again"

    def damaged(fault: object) -> UserError:
        return UserError(f"{root}/dataset.json is damaged ({fault}); copy it again, or {index_again}.")

    try:
        manifest = _parsed(content)
    except (ValueError, RecursionError) as error:  # the second for deeply nested brackets
        raise damaged(error) from error
    rows = (_map_index if "index" in manifest else _join_indexes)(fs, folder, manifest, cache, index_again)
    # a large index is not read to check its labels, unless an older version wrote the set and did not record them
    known = [shard.get("top_label") for shard in manifest["shards"]] if "index" in manifest else [None]
    top = _top_label(rows) if None in known else max(known)
    if fault := _top_fault(top, manifest["classes"]):
        raise damaged(fault)
    return ShardSet(folder_and_tars(root)[0], manifest, rows, index_root)


def folder_and_tars(root: str) -> tuple[str, str]:
    """Folder or URL of a shard set, and the pattern of its tars' names, which is one of `SPLIT_TARS` or `ALL_TARS`."""
    folder, name = posixpath.split(root)
    return (folder, name) if name in SPLIT_TARS.values() else (root, ALL_TARS)


def cached_index(root: str, cache: ShardCache) -> Path:
    """Folder in the cache for the index of a set in a read-only location, or of one of several splits in a folder."""
    folder, tars = folder_and_tars(root)
    fs, path = filesystem(folder, cache.retry_policy)  # an absolute path, also of a relative folder
    path = os.path.normpath(path) if is_local(fs) else path
    if tars == ALL_TARS:
        return cache.index_folder(path if is_local(fs) else root)
    return cache.index_folder(f"{fs.unstrip_protocol(path)}/{tars}")


def _find_manifest(root: str, cache: ShardCache) -> tuple[AbstractFileSystem, str, str, bytes]:
    """File system and folder of the indexes, the folder as a root, and the content of its `dataset.json`."""
    location, tars = folder_and_tars(root)
    fs, path = filesystem(location, cache.retry_policy)
    missing = None
    if tars == ALL_TARS:
        try:
            return fs, path, root, read_file(fs, f"{path}/dataset.json", cache.retry_policy)
        except NotADirectoryError as error:
            parent = posixpath.dirname(root) or "."
            raise UserError(f"{root} is a file, not a folder of shards; use its folder, {parent}.") from error
        except (FileNotFoundError, PermissionError) as error:  # S3 answers 403 for missing objects
            missing = error
        except OSError as error:
            raise unreadable(root, error) from error
    folder = cached_index(root, cache)
    with suppress(OSError):
        return LocalFileSystem(), str(folder), str(folder), (folder / "dataset.json").read_bytes()
    if list_tars(fs, path, cache.retry_policy, tars):
        remedy = f"run `python -m {PIPELINE}.shards index {location}` first"
        raise UserError(f"The tars in {root} have no index; {remedy}.") from missing
    denied = f" or no permission to read them ({missing})" if isinstance(missing, PermissionError) else ""
    remedy = f"create them with `python -m {PIPELINE}.convert` or correct the path"
    if root.startswith(HUB):
        remedy = "correct the name, or log in with `hf auth login` if the data set is private or gated"
    raise UserError(f"No shards at {root}{denied}; {remedy}.") from missing


def _parsed(content: bytes) -> dict[str, Any]:
    """Parse `dataset.json`; a ValueError names the first malformed field among all that are used later."""
    manifest = json.loads(content)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"it is not in format {FORMAT}")
    classes, shards, index = manifest.get("classes"), manifest.get("shards"), manifest.get("index")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("no list of classes")
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise ValueError("no list of shards")
    if not shards:
        raise ValueError("it lists no shards")
    for number, shard in enumerate(shards):
        shard = {"index_sha256": "", "top_label": -1, **shard}  # sets written by older versions lack these
        invalid = [key for key in ("file", "sha256", "index_sha256") if type(shard.get(key)) is not str]
        for key, smallest in SMALLEST.items():
            if type(shard.get(key)) is not int or not smallest <= shard[key] < 2**63:
                invalid.append(key)
        if invalid or not FILE_NAME.fullmatch(shard["file"]):
            raise ValueError(f"no valid {(invalid or ['file'])[0]!r} of shard {number}")
    if "index" in manifest:
        sized = isinstance(index, dict) and type(index.get("bytes")) is int and type(index.get("sha256")) is str
        if not sized or type(manifest.get("samples")) is not int:
            raise ValueError("no sizes and checksum of the index")
    pixels = manifest.get("pixels", RGB8._asdict())
    if not isinstance(pixels, dict) or pixels not in [
        PixelFormat(channels, bits)._asdict() for channels in range(1, MOST_CHANNELS + 1) for bits in (8, 16)
    ]:
        raise ValueError("no valid 'pixels'")
    if wrong := [key for key, kind in OPTIONAL_KEYS.items() if not isinstance(manifest.get(key), kind | None)]:
        raise ValueError(f"{wrong[0]!r} has the wrong type")
    return manifest


def list_files(fs: AbstractFileSystem, path: str, retry_policy: RetryPolicy) -> list[str]:
    """Sorted names of the files in a folder; empty if the folder does not exist or may not be listed."""
    try:  # not glob, which would treat brackets in the folder's name as a pattern
        found = with_retries(lambda: fs.ls(path, detail=False), path, retry_policy)
    except PERMANENT_ERRORS:
        return []
    names = (name.rstrip("/") for name in found if name.strip("/") != path.strip("/"))  # a file lists itself
    return sorted(posixpath.basename(name) for name in names)


def list_tars(fs: AbstractFileSystem, path: str, retry_policy: RetryPolicy, tars: str = ALL_TARS) -> list[str]:
    """Sorted names of the tars in a folder that match a pattern; empty as in `list_files`."""
    return [name for name in list_files(fs, path, retry_policy) if fnmatch.fnmatchcase(name, tars)]


def _map_index(
    fs: AbstractFileSystem, path: str, manifest: dict[str, Any], cache: ShardCache, index_again: str
) -> np.ndarray:
    """(N,) memory-mapped rows of index.npy: the time to open a set does not grow with its samples."""
    name, entry = f"{path}/index.npy", manifest["index"]
    with _index_errors(name, index_again):
        rows = _load_index(fs, name, entry, cache)
    samples = sum(shard["samples"] for shard in manifest["shards"])
    if samples != manifest["samples"] or not _is_index(rows, samples) or rows.offset + rows.nbytes != entry["bytes"]:
        raise UserError(f"{name} disagrees with dataset.json; {index_again}.")
    return np.asarray(rows)  # np.memmap adds overhead to every indexing operation


def _load_index(fs: AbstractFileSystem, name: str, entry: dict[str, Any], cache: ShardCache) -> np.memmap:
    for attempts_left in (0,) if is_local(fs) else (2, 1, 0):
        file = Path(name) if is_local(fs) else cache.fetch(fs, name, entry["bytes"], entry["sha256"])
        if not file:
            raise UserError(
                f"The cache {cache.folder} has no room for {name} ({entry['bytes'] / 1e9:.1f} GB); raise its limit of "
                f"{cache.limit_bytes / 1e9:.1f} GB."
            )
        try:
            if not cache.is_intact(file, entry["bytes"], entry["sha256"]):
                raise ValueError("checksum")
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (FileNotFoundError, ValueError):  # evicted by another process, or damaged since it was fetched
            if not attempts_left:
                raise
            cache.drop_damaged(entry["sha256"])


@contextmanager
def _index_errors(name: str, index_again: str) -> Iterator[None]:
    """Turn errors of reading an index file into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{name} is missing; {index_again}.") from error
    except OSError as error:
        raise unreadable(name, error) from error
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        raise UserError(f"{name} is damaged; {index_again}.") from error


def _join_indexes(
    fs: AbstractFileSystem, path: str, manifest: dict[str, Any], cache: ShardCache, index_again: str
) -> np.ndarray:
    """(N,) rows of the shards' own indexes, requested in parallel because object stores have a high latency."""
    names = [f"{path}/{index_name(shard['file'])}" for shard in manifest["shards"]]
    policy = replace(cache.retry_policy, stop=threading.Event())
    parts, threads = [], DaemonThreads(min(len(names), READ_WHOLE), "index")
    contents = threads.map(read_file, ((fs, name, policy) for name in names), policy.stop)
    try:
        # fetched by many threads but parsed by one: numpy parses the header with Python's parser, which in Python 3.11
        # occasionally fails if two threads use it at once
        for name, shard in zip(names, manifest["shards"], strict=True):
            with _index_errors(name, index_again):
                content = next(contents)
                sha256 = hashlib.sha256(content).hexdigest()
                if shard.get("index_sha256", sha256) != sha256:
                    raise ValueError("checksum")
                parts.append(np.load(io.BytesIO(content), allow_pickle=False))
            if not _is_index(parts[-1], shard["samples"]) or not _fits(parts[-1], shard["bytes"]):
                raise UserError(f"{name} disagrees with dataset.json; {index_again}.")
    finally:  # after Ctrl-C or an error, do not wait for the other requests
        policy.stop.set()
        threads.close()
    return np.concatenate(parts)


def label_fault(rows: np.ndarray, classes: list[str]) -> str:
    """Description of a label that has no class; "" if every label has one."""
    return _top_fault(_top_label(rows), classes)


def _top_label(rows: np.ndarray) -> int:
    return max((int(rows["label"][first : first + ROWS].max()) for first in range(0, len(rows), ROWS)), default=-1)


def _top_fault(top: int, classes: list[str]) -> str:
    return f"{len(classes)} classes, but an image with label {top}" if top >= len(classes) else ""


def _is_index(rows: np.ndarray, samples: int) -> bool:
    fields = rows.dtype.fields or {}
    return rows.shape == (samples,) and "key" in fields and rows.dtype == index_dtype(rows.dtype["key"].itemsize)


def _fits(rows: np.ndarray, tar_bytes: int) -> bool:
    """Whether every row has a valid byte range, image size and label."""
    valid = (rows["height"] > 0) & (rows["width"] > 0) & (rows["label"] >= -1)
    return bool((valid & lies_inside(rows, tar_bytes)).all())


def lies_inside(rows: np.ndarray, tar_bytes: int) -> np.ndarray:
    """(n,) bool: the sample's byte range lies inside its tar. A flipped bit in a size could exhaust the memory."""
    return (rows["offset"] >= 0) & (rows["size"] >= 0) & (rows["size"] <= tar_bytes - rows["offset"])


def open_splits(root: str, cache: ShardCache | None = None) -> tuple[ShardSet, ShardSet | None]:
    """Open the train split of a folder or URL and its test (or val) split, None if it has none.

    A shard set without splits counts as a train split. A test split without labels gives way to a val split with them.
    Of splits whose tars are in one folder, the val split is preferred, since published test splits often lack labels.

    Raises:
        UserError: as `open_shards`, and if the classes, channels or bits of the splits differ.
    """
    cache = cache or ShardCache()
    roots = split_roots(root, cache)
    train = open_shards(roots[0], cache)
    if len(roots) == 1:
        return train, None
    root, test = roots[1], open_shards(roots[1], cache)
    if len(roots) == 3 and folder_and_tars(root)[1] == ALL_TARS and _top_label(test.index) < 0:
        with suppress(UserError):  # a folder that holds something else
            val = open_shards(roots[2], cache)
            if _top_label(val.index) >= 0 and val.classes == train.classes:
                root, test = roots[2], val
    if test.classes != train.classes:
        raise UserError(
            f"{root} has other classes than {roots[0]}; convert both again, train first, "
            f"or run `python -m {PIPELINE}.shards index` on their folder."
        )
    if test.pixel_format != train.pixel_format:
        raise UserError(
            f"The images of {root} are {test.pixel_format}, but those of {roots[0]} are {train.pixel_format}; "
            "convert both from images of one kind, or with --bits 8."
        )
    return train, test


def split_roots(root: str, cache: ShardCache | None = None) -> list[str]:
    """Roots of the train, test and val splits of a folder or URL, or the root itself if it has no train split.

    If the tars of all splits are in one folder without a `dataset.json`, the roots end with patterns of `SPLIT_TARS`.

    Raises:
        UserError: the folder or URL can't be read.
    """
    cache = cache or ShardCache()
    fs, path = filesystem(root, cache.retry_policy)

    def exists(name: str) -> bool:
        try:
            return with_retries(lambda: fs.exists(name), name, cache.retry_policy)
        except OSError as error:
            raise unreadable(name, error) from error

    def has(split: str) -> bool:
        # object stores have no folders, and a folder may still lack its dataset.json
        return exists(f"{path}/{split}/dataset.json") or exists(f"{path}/{split}")

    if has("train"):
        return [posixpath.join(root, split) for split in ("train", *filter(has, ("test", "val")))]
    names = [] if exists(f"{path}/dataset.json") else list_tars(fs, path, cache.retry_policy)
    tars = [pattern for pattern in SPLIT_TARS.values() if fnmatch.filter(names, pattern)]
    return [posixpath.join(root, pattern) for pattern in tars] if SPLIT_TARS["train"] in tars else [root]
