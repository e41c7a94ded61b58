"""Indexing of WebDataset tars that were not written by this project.

The tars are read in place and stay unchanged. Compressed tars have no seekable samples, so they must be converted.
"""

import json
import os
import posixpath
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from ..common import UserError, available_cores
from ..images import DecodeError, inspect
from .archives import CLASS_LIMIT, NO_CLASS, CheckedMember, class_number, image_samples
from .cache import ShardCache
from .dataset import ShardSet, list_files, open_shards
from .format import (
    BLOCK_BYTES,
    FORMAT,
    READ_WHOLE,
    HashedFile,
    index_dtype,
    index_name,
    index_rows,
    npy_bytes,
    shard_entry,
    write_manifest,
)
from .remote import RetryPolicy, filesystem, with_retries
from .web import WebFileSystem

COMPRESSED_TAR = re.compile(r"\.(tgz|txz|tbz2?|tar\.(gz|xz|bz2|zst))$")

KEPT = {"name": "", "split": "", "classes": [], "shards": [], "made_by": {}}
"""Fields of an existing manifest that indexing keeps, with their values for a new one."""


def index_shards(root: str, cache: ShardCache | None = None, image_extension: str | None = None) -> ShardSet:
    """Index the WebDataset tars of a folder or URL prefix; each is read once, sequentially.

    Every image is decoded once; unreadable ones are left out and listed in the manifest. If the location is read-only,
    the index is kept in the cache. An existing index is replaced only after all tars have been read; its name, split
    and classes are kept, and tars that do not match its checksums are listed.

    Args:
        root: folder or URL prefix of the tars, or their names in brace notation, such as
            "https://host/folder/train-{000..146}.tar", for servers that do not list their files.
        image_extension: see `image_samples`.

    Raises:
        UserError: there are no tars, they hold no readable image or a sample with two images, or a download fails.
        OSError: a tar can't be read or an index can't be written.
    """
    cache = cache or ShardCache()
    root, tars = _find_tars(root, cache.retry_policy)
    fs, path = filesystem(root, cache.retry_policy)
    index_fs, folder = fs, path
    previous = _previous_manifest(fs, path, cache.retry_policy)
    if not _writable(fs, path):
        if previous is not None:  # it would take precedence over an index in the cache
            raise UserError(
                f"{root}/dataset.json exists and can't be replaced; make the folder writable, or copy the tars to one "
                "that is."
            )
        index_fs, folder = LocalFileSystem(), str(cache.index_folder(root))
        previous = _previous_manifest(index_fs, folder, cache.retry_policy)
    previous = previous or KEPT
    index_fs.makedirs(folder, exist_ok=True)
    checksums = {str(shard.get("file")): shard.get("sha256") for shard in previous["shards"] if isinstance(shard, dict)}
    shards, left_out = [], []
    try:
        for name in tars:
            rows, tar, refused = _read_tar(fs, f"{path}/{name}", cache, image_extension)
            index = npy_bytes(rows)
            index_fs.pipe_file(f"{folder}/{index_name(name)}.partial", index)
            shards.append(shard_entry(name, rows, tar.size, tar.digest.hexdigest(), index))
            left_out += [{"name": f"{name}:{member}", "reason": reason} for member, reason in refused]
            if checksums.get(name) not in (None, shards[-1]["sha256"]):
                reason = "differs from its recorded checksum; copy it again unless it was changed on purpose"
                left_out.append({"name": name, "reason": reason})
        samples = sum(shard["samples"] for shard in shards)
        if not samples:
            raise UserError(
                f"No image could be read from the tars in {root}; they must hold <key>.jpg (and <key>.cls)."
            )
        known, count = previous["classes"], 1 + max(shard["top_label"] for shard in shards)
        manifest = {
            "name": previous["name"] or posixpath.basename(path),
            "split": previous["split"],
            "classes": known + [str(number) for number in range(len(known), count)],
            "samples": samples,
            "shards": shards,
            "left_out": left_out,
            "made_by": previous["made_by"] or {"command": "pipeline.shards index"},
        }
        for shard in shards:
            index = f"{folder}/{index_name(shard['file'])}"
            index_fs.mv(f"{index}.partial", index)
        write_manifest(index_fs, folder, manifest)
    except BaseException:
        for name in tars:
            with suppress(OSError):
                index_fs.rm_file(f"{folder}/{index_name(name)}.partial")
        raise
    if len(shards) <= READ_WHOLE and index_fs.exists(f"{folder}/index.npy"):
        index_fs.rm_file(f"{folder}/index.npy")
    return open_shards(root, cache)


def _find_tars(root: str, retry_policy: RetryPolicy) -> tuple[str, list[str]]:
    """Resolve the argument of `index_shards` to a folder or URL prefix and the names of the tars in it.

    Raises:
        UserError: there are no tars, they are compressed, or a brace pattern names several folders.
    """
    names: list[str] = []
    if "{" in root:
        from webdataset.shardlists import expand_urls

        folders, expanded = zip(*map(posixpath.split, expand_urls(root)), strict=True)
        if all(name.endswith(".tar") or COMPRESSED_TAR.search(name) for name in expanded):
            if len(set(folders)) > 1:
                raise UserError(f"{root} names tars in several folders; index each folder separately.")
            root, names = folders[0] or ".", list(expanded)
    if not names:
        fs, path = filesystem(root, retry_policy)
        names = list_files(fs, path, retry_policy)
    if tars := [name for name in names if name.endswith(".tar")]:
        return root, tars
    if compressed := next(filter(COMPRESSED_TAR.search, names), ""):
        raise UserError(
            f"{root}/{compressed} is a compressed tar, which can't be indexed in place; use "
            "`python -m pipeline.convert webdataset` instead."
        )
    raise UserError(
        f"There is no .tar in {root}; use the folder that holds the shards. If a web server does not list its files, "
        "use a pattern such as https://host/folder/train-{000..146}.tar."
    )


def _writable(fs: AbstractFileSystem, path: str) -> bool:
    if isinstance(fs, WebFileSystem):
        return False
    try:
        fs.pipe_file(f"{path}/dataset.json.partial", b"")
        fs.rm_file(f"{path}/dataset.json.partial")
    except (OSError, NotImplementedError):
        return False
    return True


def _previous_manifest(fs: AbstractFileSystem, path: str, retry_policy: RetryPolicy) -> dict[str, Any] | None:
    """Fields of a folder's manifest that are kept when it is indexed again, empty where missing or malformed.

    None if there is no manifest.
    """
    try:
        name = f"{path}/dataset.json"
        found = json.loads(with_retries(lambda: fs.cat_file(name), name, retry_policy))
    except (FileNotFoundError, PermissionError):
        return None
    except (ValueError, RecursionError):  # the second for deeply nested brackets
        found = {}
    found = found if isinstance(found, dict) and found.get("format") == FORMAT else {}
    kept = KEPT | {name: found[name] for name in KEPT if isinstance(found.get(name), type(KEPT[name]))}
    return kept if all(isinstance(name, str) for name in kept["classes"]) else kept | {"classes": []}


def _read_tar(
    fs: AbstractFileSystem, path: str, cache: ShardCache, extension: str | None
) -> tuple[np.ndarray, HashedFile, list[tuple[str, str]]]:
    """Read one tar; returns its index rows, the completely read file, and (member, reason) of what is left out."""
    try:
        with cache.whole_file(fs, path) as file:
            hashed = HashedFile(file)
            rows, refused = _rows(hashed, path, extension)
            hashed.drain()  # the rest of a damaged tar
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a tar; rename it or move it away.") from error
    return index_rows(rows), hashed, refused


def _rows(file: HashedFile, path: str, extension: str | None) -> tuple[list[tuple], list[tuple[str, str]]]:
    """Index rows of the readable samples of one tar, and (member, reason) of what is left out."""
    rows: dict[int, dict[str, Any]] = {}  # by sample number
    refused: list[tuple[str, str]] = []
    classes: dict[int, tuple[str, str]] = {}

    def finish(number: int, member: str, row: dict[str, Any], inspected: Future) -> None:
        try:
            _, row["height"], row["width"] = inspected.result()
        except DecodeError as error:
            refused.append((member, str(error)))
        else:
            rows[number] = row

    ahead: deque = deque()
    cores = available_cores()
    with ThreadPoolExecutor(cores) as pool:
        try:
            with tarfile.open(fileobj=file, mode="r|", bufsize=BLOCK_BYTES, tarinfo=CheckedMember) as tar:
                samples = image_samples(
                    _whole_members(tar, os.fstat(file.file.fileno()).st_size),
                    path,
                    lambda member: (member.offset_data, tar.extractfile(member).read()),
                    lambda member: tar.extractfile(member).read(),
                    extension,
                    refused,
                    classes,
                )
                for number, (key, member, (offset, encoded)) in enumerate(samples):
                    row = {"key": key.encode(), "offset": offset, "size": len(encoded), "crc32": zlib.crc32(encoded)}
                    ahead.append((number, member, row, pool.submit(inspect, encoded)))
                    if len(ahead) > 4 * cores:
                        finish(*ahead.popleft())
        except tarfile.TarError as error:  # the last sample may lack its class, so it is not used
            refused.append(("the rest of the tar", str(error)))
        while ahead:
            finish(*ahead.popleft())
    for number, row in rows.items():
        member, text = classes.get(number, ("", ""))
        label = class_number(text)
        row["label"] = -1 if label is None else label
        if label is None and text not in NO_CLASS:
            refused.append((member, f"the class is not a number below {CLASS_LIMIT}, so the image counts as unlabeled"))
    return [tuple(row[name] for name in index_dtype(1).names) for row in rows.values()], refused


def _whole_members(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar of `size` bytes.

    Raises:
        tarfile.ReadError: a member extends beyond the end.
    """
    for member in tar:
        yield member
        if tar.offset > size:  # tarfile would try to read up to there, block by block
            raise tarfile.ReadError("unexpected end of data")
        tar.members = []  # tarfile would otherwise keep all members in memory
