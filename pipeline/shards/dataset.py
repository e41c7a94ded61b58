"""The shard set: plain WebDataset tars, an index beside each, and one `dataset.json` written last.

    ROOT/dataset.json            name, split, classes, counts, checksums, how it was made
    ROOT/train-000000.tar        <key>.jpg, <key>.cls pairs, as the webdataset library writes and reads them
    ROOT/train-000000.index.npy  one `index_dtype` row per sample, so that any sample is one read at a known offset
    ROOT/index.npy               the rows of all shards, if they are more than a few: memory-mapped instead of read

A folder without `dataset.json` is not a shard set, so one that was interrupted while being written is never trusted.
Opening a set compares the indexes with their checksums; see `ShardCache.is_intact` for when a large one is read again.

    python -m pipeline.shards index ROOT    make the index of WebDataset tars from elsewhere
    python -m pipeline.shards verify ROOT   compare every file with the checksums of the original
    python -m pipeline.shards show ROOT     what is in it: classes, sizes

The index of a set that can't be written to, at an http:// address say, is kept in the cache, $STREAMCLR_CACHE or
~/.cache/streamclr, of the machine that made it.
"""

import hashlib
import io
import json
import posixpath
import threading
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from ..common import UserError
from .cache import ShardCache
from .format import FORMAT, READ_WHOLE, ROWS, index_dtype, index_name
from .remote import FINAL, DaemonThreads, RetryPolicy, filesystem, is_local, persistently, result

SHARD_KEYS = {"file": str, "samples": int, "bytes": int, "sha256": str}


@dataclass(frozen=True)
class ShardSet:
    """An opened shard set. `index` holds every sample of every shard, in the order of the manifest."""

    root: str
    manifest: dict[str, Any]
    index: np.ndarray
    """(N,) structured rows of `index_dtype`; mapped into memory if they are many, so read by parts."""
    index_root: str
    """Where `dataset.json` and the indexes are: ROOT, or a folder in the cache if ROOT can't be written to."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def classes(self) -> list[str]:
        return self.manifest["classes"]

    @property
    def checksum(self) -> str:
        """One SHA-256 over those of all shards, 64 hexadecimal digits."""
        return hashlib.sha256("".join(shard["sha256"] for shard in self.manifest["shards"]).encode()).hexdigest()

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """(S + 1,) int64: sample i lies in shard s where shard_starts[s] <= i < shard_starts[s + 1]."""
        return np.cumsum([0] + [shard["samples"] for shard in self.manifest["shards"]])


def open_shards(root: str, cache: ShardCache | None = None) -> ShardSet:
    """Open a shard set, local or at any URL that fsspec knows; a common index of a remote one goes to the cache.

    Raises:
        UserError: there is none, it is empty or can't be read, or its index does not belong to it.
    """
    cache = cache or ShardCache()
    fs, path = filesystem(root, cache.retry_policy)
    again = f"run `python -m pipeline.shards index {root}` to make it anew"
    where, index_root = (fs, path), root
    try:
        content = persistently(lambda: fs.cat_file(f"{path}/dataset.json"), f"{root}/dataset.json", cache.retry_policy)
    except NotADirectoryError as error:
        cure = f"give the folder that it lies in, {posixpath.dirname(root) or '.'}"
        raise UserError(f"{root} is a file, not a folder of shards: {cure}.") from error
    except (FileNotFoundError, PermissionError) as error:  # S3 forbids to ask for what is not there
        index_root = str(cache.index_folder(root))
        where = (LocalFileSystem(), index_root)
        try:
            content = Path(index_root, "dataset.json").read_bytes()
        except OSError:
            if find_tars(fs, path, cache.retry_policy):
                cure = f"run `python -m pipeline.shards index {root}` first"
                raise UserError(f"The tars in {root} have no index: {cure}.") from error
            cure = "make them with `python -m pipeline.convert`, or correct the path"
            forbidden = f" that may be read ({error})" if isinstance(error, PermissionError) else ""
            raise UserError(f"No shards at {root}{forbidden}: {cure}.") from error
    except OSError as error:
        raise UserError(f"{root} can't be read ({error}): see to the connection and the permissions.") from error
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise UserError(f"{root}/dataset.json is damaged: {again}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{root}/dataset.json is not of format {FORMAT}: {again}.")
    if manifest.get("shards") == []:
        raise UserError(f"{root} lists no shards: convert the images again.")
    if fault := _manifest_fault(manifest):
        raise UserError(f"{root}/dataset.json is damaged ({fault}): copy it again, or {again}.")
    read = _map_index if "index" in manifest else _join_indexes
    return ShardSet(root, manifest, read(*where, manifest, cache, again), index_root)


def _manifest_fault(manifest: dict[str, Any]) -> str:
    """What a manifest lacks of all that is read from it later; empty if nothing."""
    classes, shards, index = manifest.get("classes"), manifest.get("shards"), manifest.get("index")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return "no list of classes"
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return "no list of shards"
    for number, shard in enumerate(shards):
        for key, kind in SHARD_KEYS.items():
            if type(shard.get(key)) is not kind or (kind is int and not 0 <= shard[key] < 2**63):
                return f"no {key!r} of shard {number}"
        name = shard["file"]
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            return f"{name!r} is not the name of a file"
        if type(shard.get("index_sha256", "")) is not str:
            return f"no 'index_sha256' of shard {number}"
        if type(shard.get("top_label", -1)) is not int:
            return f"no 'top_label' of shard {number}"
    if "index" in manifest:
        if not isinstance(index, dict) or type(index.get("bytes")) is not int or type(index.get("sha256")) is not str:
            return "no size and checksum of the index"
        if type(manifest.get("samples")) is not int:
            return "no number of samples"
    for key, kind in (("name", str), ("split", str), ("made_by", dict), ("left_out", list), ("rejected", int)):
        if not isinstance(manifest.get(key), kind | None):
            return f"{key!r} of the wrong kind"
    return ""


def find_tars(fs: Any, path: str, retry_policy: RetryPolicy) -> list[str]:
    """Names of the tars in a folder, sorted; none if there is no such folder, or one that may not be listed."""
    try:  # not a glob, in which a bracket of the folder's name would be a pattern
        found = persistently(lambda: fs.ls(path, detail=False), path, retry_policy)
    except FINAL:
        return []
    names = (name.rstrip("/") for name in found if name.strip("/") != path.strip("/"))  # a file lists itself
    return sorted(posixpath.basename(name) for name in names if name.endswith(".tar"))


def _map_index(fs: Any, path: str, manifest: dict[str, Any], cache: ShardCache, again: str) -> np.ndarray:
    """(N,) rows of ROOT/index.npy, mapped into memory: opening takes as long for many samples as for few."""
    name, entry = f"{path}/index.npy", manifest["index"]
    try:
        rows = _load_local(Path(name), entry, cache) if is_local(fs) else _load_cached(fs, name, entry, cache)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{name} is missing: {again}.") from error
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        raise UserError(f"{name} is damaged: {again}.") from error
    samples = sum(shard["samples"] for shard in manifest["shards"])
    if samples != manifest["samples"] or not _is_index(rows, samples) or rows.offset + rows.nbytes != entry["bytes"]:
        raise UserError(f"{name} disagrees with dataset.json: {again}.")
    rows = np.asarray(rows)  # a plain array on the mapping: np.memmap does more on every indexing
    known = [shard.get("top_label") for shard in manifest["shards"]]
    # older sets do not say: then all rows are looked at
    fault = label_fault(rows, manifest["classes"]) if None in known else _top_fault(max(known), manifest["classes"])
    if fault:
        raise UserError(f"{path}/dataset.json is damaged ({fault}): copy it again, or {again}.")
    return rows


def _load_local(file: Path, entry: dict[str, Any], cache: ShardCache) -> np.ndarray:
    if not cache.is_intact(file, entry["bytes"], entry["sha256"]):
        raise ValueError("checksum")
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _load_cached(fs: Any, name: str, entry: dict[str, Any], cache: ShardCache) -> np.ndarray:
    for attempts_left in (2, 1, 0):
        file = cache.fetch(fs, name, entry["bytes"], entry["sha256"])
        if not file:
            raise UserError(
                f"The cache {cache.folder} has no room for {name} ({entry['bytes'] / 1e9:.1f} GB): raise its limit of "
                f"{cache.limit_bytes / 1e9:.1f} GB."
            )
        try:
            return _load_local(file, entry, cache)
        except (FileNotFoundError, ValueError):  # evicted by another process, or damaged since it was fetched
            if not attempts_left:
                raise
            cache.drop_damaged(entry["sha256"])


def _join_indexes(fs: Any, path: str, manifest: dict[str, Any], cache: ShardCache, again: str) -> np.ndarray:
    """(N,) rows of the shards' own indexes, read all at once: one after the other takes long from an object store."""
    names = [f"{path}/{index_name(shard['file'])}" for shard in manifest["shards"]]
    retry_policy = replace(cache.retry_policy, stop=threading.Event())

    def fetch(name: str) -> bytes:
        try:
            return persistently(lambda: fs.cat_file(name), name, retry_policy)
        except FileNotFoundError as error:
            raise UserError(f"{name} is missing: {again}.") from error
        except OSError as error:
            raise UserError(f"{name} can't be read ({error}): see to the connection and the permissions.") from error

    parts, threads = [], DaemonThreads(min(len(names), READ_WHOLE), "index")
    contents = [threads.submit(fetch, name) for name in names]
    try:
        # fetched by many threads but parsed by one: numpy has Python parse the header, and Python 3.11's parser fails
        # now and then where two threads are in it
        for name, content, shard in zip(names, contents, manifest["shards"], strict=True):
            content = result(content, retry_policy.stop)
            sha256 = hashlib.sha256(content).hexdigest()
            if shard.get("index_sha256", sha256) != sha256:  # older sets have none
                raise UserError(f"{name} is damaged: {again}.")
            try:
                parts.append(np.load(io.BytesIO(content), allow_pickle=False))
            except Exception as error:  # as above
                raise UserError(f"{name} is damaged: {again}.") from error
            if not _is_index(parts[-1], shard["samples"]) or not _fits(parts[-1], shard["bytes"]):
                raise UserError(f"{name} disagrees with dataset.json: {again}.")
    finally:  # after Ctrl-C or an error: do not wait for the others
        retry_policy.stop.set()
        for content in contents:
            content.cancel()
        threads.close()
    rows = np.concatenate(parts)
    if fault := label_fault(rows, manifest["classes"]):
        raise UserError(f"{path}/dataset.json is damaged ({fault}): copy it again, or {again}.")
    return rows


def label_fault(rows: np.ndarray, classes: list[str]) -> str:
    """Empty if every label has a class."""
    tops = (int(rows["label"][first : first + ROWS].max(initial=-1)) for first in range(0, len(rows), ROWS))
    return _top_fault(max(tops, default=-1), classes)


def _top_fault(top: int, classes: list[str]) -> str:
    return f"{len(classes)} classes, but an image of label {top}" if top >= len(classes) else ""


def _is_index(rows: np.ndarray, samples: int) -> bool:
    fields = rows.dtype.fields or {}
    return rows.shape == (samples,) and "key" in fields and rows.dtype == index_dtype(rows.dtype["key"].itemsize)


def _fits(rows: np.ndarray, tar_bytes: int) -> bool:
    """Whether every sample lies inside its tar and has a size in pixels and a label: what reading relies on."""
    sound = (rows["height"] > 0) & (rows["width"] > 0) & (rows["label"] >= -1)
    return bool((sound & lies_inside(rows, tar_bytes)).all())


def lies_inside(rows: np.ndarray, tar_bytes: int) -> np.ndarray:
    """(n,) whether each sample lies inside its tar: a flipped bit in a size would ask for more than the memory."""
    return (rows["offset"] >= 0) & (rows["size"] >= 0) & (rows["size"] <= tar_bytes - rows["offset"])


def open_splits(root: str, cache: ShardCache | None = None) -> tuple[ShardSet, ShardSet | None]:
    """The train split of a folder or URL and its test (or val) split if it has one; or one shard set by itself.

    Raises:
        UserError: as `open_shards`, and if the splits' classes differ.
    """
    cache = cache or ShardCache()
    roots = split_roots(root, cache)
    train = open_shards(roots[0], cache)
    if len(roots) == 1:
        return train, None
    test = open_shards(roots[1], cache)
    if test.classes != train.classes:
        raise UserError(f"{test.root} has other classes than {train.root}: convert both again.")
    return train, test


def split_roots(root: str, cache: ShardCache | None = None) -> list[str]:
    """The shard sets of a folder or URL: those of its train, test and val splits, or itself if it has no train split.

    Raises:
        UserError: it can't be read.
    """
    cache = cache or ShardCache()
    fs, path = filesystem(root, cache.retry_policy)

    def exists(name: str) -> bool:
        try:
            return persistently(lambda: fs.exists(name), name, cache.retry_policy)
        except OSError as error:
            raise UserError(f"{name} can't be read ({error}): see to the connection and the permissions.") from error

    def has(split: str) -> bool:  # an object store knows no folders, and a folder may still lack its dataset.json
        return exists(f"{path}/{split}/dataset.json") or exists(f"{path}/{split}")

    if not has("train"):
        return [root]
    return [posixpath.join(root, split) for split in ("train", *filter(has, ("test", "val")))]
