"""Indexes WebDataset tars from elsewhere."""

import json
import os
import posixpath
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from ..common import UserError
from ..images import DecodeError, inspect
from .archives import CLASS_LIMIT, NO_CLASS, CheckedMember, class_number, image_samples
from .cache import ShardCache
from .dataset import ShardSet, find_tars, open_shards
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
from .remote import RetryPolicy, WebFileSystem, filesystem, persistently


def index_shards(root: str, cache: ShardCache | None = None, image_extension: str | None = None) -> ShardSet:
    """Index the WebDataset tars in a folder or URL prefix; each is read once, from its beginning to its end.

    Every image is decoded once; those that can't be decoded are left out and listed. Where ROOT can't be written to,
    the index is stored in the cache. An existing index is replaced only after all tars have been read; name, split and
    classes are kept, and tars that differ from its checksums are listed.

    Args:
        image_extension: see `image_samples`.

    Raises:
        UserError: no tars, no readable image in them, a sample with two images, or they can't be fetched.
        OSError: a tar can't be read or an index can't be written.
    """
    cache = cache or ShardCache()
    fs, path = filesystem(root, cache.retry_policy)
    tars = find_tars(fs, path, cache.retry_policy)
    if not tars:
        raise UserError(
            f"There is no .tar in {root}: give the folder that holds the shards; a web server must list it."
        )
    home, folder = fs, path
    previous = _previous_manifest(fs, path, cache.retry_policy)
    if not _writable(fs, path):
        if previous is not None:  # it would hide an index in the cache
            raise UserError(
                f"{root}/dataset.json exists and can't be replaced; make the folder writable, or copy the tars to one "
                "that is."
            )
        home, folder = LocalFileSystem(), str(cache.index_folder(root))
        previous = _previous_manifest(home, folder, cache.retry_policy)
    previous = _known(previous or {})
    home.makedirs(folder, exist_ok=True)
    checksums = {str(shard.get("file")): shard.get("sha256") for shard in previous["shards"] if isinstance(shard, dict)}
    shards, left_out = [], []
    try:
        for name in tars:
            entry, refused = _index_tar(fs, f"{path}/{name}", cache, home, folder, image_extension)
            if checksums.get(name) not in (None, entry["sha256"]):
                reason = "no longer the file that it was: copy it again unless it was changed on purpose"
                refused.append({"name": name, "reason": reason})
            shards.append(entry)
            left_out += refused
        samples = sum(shard["samples"] for shard in shards)
        if not samples:
            raise UserError(
                f"No image could be read from the tars in {root}: they must hold <key>.jpg (and <key>.cls)."
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
            home.mv(f"{index}.partial", index)
        write_manifest(home, folder, manifest)
    except BaseException:
        for name in tars:
            with suppress(OSError):
                home.rm_file(f"{folder}/{index_name(name)}.partial")
        raise
    if len(shards) <= READ_WHOLE and home.exists(f"{folder}/index.npy"):
        home.rm_file(f"{folder}/index.npy")
    return open_shards(root, cache)


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
    """The manifest that lies there, empty if it is damaged; None if there is none."""
    try:
        name = f"{path}/dataset.json"
        found = json.loads(persistently(lambda: fs.cat_file(name), name, retry_policy))
    except (FileNotFoundError, PermissionError):
        return None
    except (ValueError, RecursionError):  # the second by brackets in brackets
        return {}
    return found if isinstance(found, dict) and found.get("format") == FORMAT else {}


def _known(manifest: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a manifest when the set is indexed again; empty values for what it lacks."""
    empty = {"name": "", "split": "", "classes": [], "shards": [], "made_by": {}}
    kept = {
        name: manifest[name] if isinstance(manifest.get(name), type(none)) else none for name, none in empty.items()
    }
    return kept if all(isinstance(name, str) for name in kept["classes"]) else kept | {"classes": []}


def _index_tar(
    fs: AbstractFileSystem, path: str, cache: ShardCache, home: AbstractFileSystem, folder: str, extension: str | None
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Index one tar to FOLDER/<index name>.partial; returns its entry for the manifest and what is left out."""
    name = posixpath.basename(path)
    try:
        with cache.whole_file(fs, path) as file:
            hashed = HashedFile(file)
            rows, refused = _rows(hashed, path, extension)
            hashed.drain()  # what a damaged tar has left unread
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a tar; rename it or move it away.") from error
    rows = index_rows(rows)
    index = npy_bytes(rows)
    home.pipe_file(f"{folder}/{index_name(name)}.partial", index)
    entry = shard_entry(name, rows, hashed.size, hashed.digest.hexdigest(), index)
    return entry, [{"name": f"{name}:{member}", "reason": reason} for member, reason in refused]


def _rows(file: HashedFile, path: str, extension: str | None) -> tuple[list[tuple], list[tuple[str, str]]]:
    """The index rows of the readable samples of one tar, and (member, why it is left out) of the others."""
    rows: dict[int, dict[str, Any]] = {}  # by the number of the sample
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
    cores = os.cpu_count() or 1
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
        except tarfile.TarError as error:  # the sample at the break may lack its class, so it is not taken
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
    """The members of a tar of so many bytes, until one ends beyond it."""
    for member in tar:
        yield member
        if tar.offset > size:  # tarfile would read the nothing behind the end, block by block
            raise tarfile.ReadError("unexpected end of data")
        tar.members = []  # which tarfile would otherwise keep
