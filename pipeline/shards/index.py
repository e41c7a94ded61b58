"""Indexing of WebDataset tars that were not written by this project.

The tars are read in place and stay unchanged. Compressed tars have no seekable samples, so they must be converted.
"""

import hashlib
import json
import posixpath
import re
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from ..common import UserError, available_cores
from ..images import DecodeError, inspect
from .archives import CheckedMember, forgetting
from .cache import ShardCache
from .dataset import ShardSet, list_files, open_shards
from .format import FORMAT, READ_WHOLE, index_name, index_rows, npy_bytes, shard_entry, write_manifest
from .remote import RetryPolicy, filesystem, read_file
from .samples import CLASS_LIMIT, NO_CLASS, Part, class_number, paired, read_parts
from .web import WebFileSystem

IMAGES_PER_CORE = 16
"""Number of images that are in memory per core, while they are decoded in parallel."""
COMPRESSED_TAR = re.compile(r"\.(tgz|txz|tbz2?|tar\.(gz|xz|bz2|zst))$")

KEPT = {"name": "", "split": "", "classes": [], "shards": [], "made_by": {}}
"""Fields of an existing manifest that indexing keeps, with their values for a new one."""


def index_shards(root: str, cache: ShardCache | None = None, image_extension: str | None = None) -> ShardSet:
    """Index the WebDataset tars of a folder or URL prefix; a remote one is downloaded once.

    Every image is decoded once; unreadable ones are left out and listed in the manifest. If the location is read-only,
    the index is kept in the cache. An existing index is replaced only after all tars have been read; its name, split
    and classes are kept, and tars that do not match its checksums are listed.

    Args:
        root: folder or URL prefix of the tars, or their names in brace notation, such as
            "https://host/folder/train-{000..146}.tar", for servers that do not list their files.
        image_extension: see `paired`.

    Raises:
        UserError: there are no tars, they hold no readable image or a sample with two images, or a download fails.
        OSError: a tar can't be read or an index can't be written.
    """
    cache = cache or ShardCache()
    root, tars = _find_tars(root, cache.retry_policy)
    fs, path = index_fs, folder = filesystem(root, cache.retry_policy)
    previous = _previous_manifest(fs, path, cache.retry_policy)
    if not _writable(fs, path):
        if previous is not None:  # it would take precedence over an index in the cache
            remedy = "make the folder writable, or copy the tars to one that is"
            raise UserError(f"{root}/dataset.json exists and can't be replaced; {remedy}.")
        index_fs, folder = LocalFileSystem(), str(cache.index_folder(root))
        previous = _previous_manifest(index_fs, folder, cache.retry_policy)
    previous = previous or KEPT
    index_fs.makedirs(folder, exist_ok=True)
    checksums = {str(shard.get("file")): shard.get("sha256") for shard in previous["shards"] if isinstance(shard, dict)}
    shards, left_out = [], []
    try:
        for name in tars:
            rows, size, sha256, refused = _read_tar(fs, f"{path}/{name}", cache, image_extension)
            index = npy_bytes(rows)
            index_fs.pipe_file(f"{folder}/{index_name(name)}.partial", index)
            shards.append(shard_entry(name, rows, size, sha256, index))
            left_out += [{"name": f"{name}:{member}", "reason": reason} for member, reason in refused]
            if checksums.get(name) not in (None, shards[-1]["sha256"]):
                reason = "differs from its recorded checksum; copy it again unless it was changed on purpose"
                left_out.append({"name": name, "reason": reason})
        samples = sum(shard["samples"] for shard in shards)
        if not samples:
            raise UserError(f"No image could be read from the tars in {root}; they must hold <key>.jpg and <key>.cls.")
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
        for name in tars:
            index_fs.mv(f"{folder}/{index_name(name)}.partial", f"{folder}/{index_name(name)}")
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
    """Resolve the argument of `index_shards` to a folder or URL prefix and the names of the tars in it."""
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
    """The fields `KEPT` of a folder's manifest, empty where missing or malformed; None if there is no manifest."""
    try:
        found = json.loads(read_file(fs, f"{path}/dataset.json", retry_policy))
    except (FileNotFoundError, PermissionError):
        return None
    except (ValueError, RecursionError):  # the second for deeply nested brackets
        found = {}
    found = found if isinstance(found, dict) and found.get("format") == FORMAT else {}
    kept = KEPT | {name: found[name] for name in KEPT if isinstance(found.get(name), type(KEPT[name]))}
    return kept if all(isinstance(name, str) for name in kept["classes"]) else kept | {"classes": []}


def _read_tar(
    fs: AbstractFileSystem, path: str, cache: ShardCache, extension: str | None
) -> tuple[np.ndarray, int, str, list[tuple[str, str]]]:
    """Read one tar; returns its index rows, size in bytes and SHA-256, and (member, reason) of what is left out."""
    try:
        with cache.whole_file(fs, path) as file:
            # first, because it reads sequentially and leaves the tar in the system's file cache
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            file.seek(0)
            rows, left_out = _rows(file, path, extension)
            return index_rows(rows), size, sha256, left_out
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a tar; rename it or move it away.") from error


def _rows(file: BinaryIO, path: str, extension: str | None) -> tuple[list[tuple], list[tuple[str, str]]]:
    parts: list[Part] = []
    left_out: list[tuple[str, str]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=CheckedMember) as tar:
            for part in read_parts(tar, forgetting(tar), extension, left_out):
                parts.append(part)  # kept if the tar turns out to be damaged
    except tarfile.TarError as error:
        left_out.append(("the rest of the tar", str(error)))
        last = parts[-1].key if parts else ""
        while parts and parts[-1].key == last:  # it may lack its class
            parts.pop()
    pairs = paired(parts, path, extension, left_out)
    rows, cores = [], available_cores()
    with ThreadPoolExecutor(cores) as pool:
        for first in range(0, len(pairs), IMAGES_PER_CORE * cores):
            part = pairs[first : first + IMAGES_PER_CORE * cores]
            encoded = [_read_at(file, image.offset, image.size) for image, _ in part]
            for (image, label), content, form in zip(part, encoded, pool.map(_inspected, encoded), strict=True):
                if isinstance(form, DecodeError):
                    left_out.append((image.name, str(form)))
                    continue
                number = class_number(label.text) if label else None
                if label and number is None and label.text not in NO_CLASS:
                    reason = f"the class is not a number below {CLASS_LIMIT}, so the image counts as unlabeled"
                    left_out.append((label.name, reason))
                number = -1 if number is None else number
                rows.append((image.key.encode(), image.offset, image.size, *form[1:], number, zlib.crc32(content)))
    return rows, left_out


def _inspected(encoded: bytes) -> tuple[str, int, int] | DecodeError:
    try:
        return inspect(encoded)
    except DecodeError as error:
        return error


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
