"""Indexes WebDataset tars from elsewhere."""

import json
import os
import posixpath
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from errors import UserError
from pipeline.archives import NOT_PLAIN, CheckedMember, is_plain
from pipeline.cache import ShardCache
from pipeline.images import IMAGE_SUFFIXES, DecodeError, inspect
from pipeline.remote import Patience, WebFileSystem, filesystem, persistently
from pipeline.shard_files import BLOCK_BYTES, HashedFile, index_rows, npy_bytes, shard_entry, write_manifest
from pipeline.shards import FORMAT, ShardSet, find_tars, index_dtype, index_name, open_shards


def index_shards(root: str, cache: ShardCache | None = None) -> ShardSet:
    """Index the WebDataset tars in a folder or URL prefix; each is read once, from its beginning to its end.

    Every image is decoded once: one that can't be is left out and named. Where ROOT can't be written to, the index goes
    to the cache.

    Raises:
        UserError: no tars, or no readable image in them, or they can't be fetched.
        OSError: a tar can't be read or an index can't be written.
    """
    cache = cache or ShardCache()
    fs, path = filesystem(root, cache.patience)
    tars = find_tars(fs, path, cache.patience)
    if not tars:
        raise UserError(
            f"There is no .tar in {root}: give the folder that holds the shards; a web server must list it."
        )
    previous = _previous_manifest(fs, path, cache.patience)
    home, folder = (fs, path) if _writable(fs, path) else (LocalFileSystem(), str(cache.index_folder(root)))
    home.makedirs(folder, exist_ok=True)
    for name in ("dataset.json", "index.npy"):  # which must not vouch for half of the new indexes
        if home.exists(f"{folder}/{name}"):
            home.rm_file(f"{folder}/{name}")
    vouched = {shard.get("file"): shard.get("sha256") for shard in previous["shards"] if isinstance(shard, dict)}
    shards, left_out = [], []
    for name in tars:
        with cache.whole_file(fs, f"{path}/{name}") as file:
            hashed = HashedFile(file)
            rows, refused = _index_tar(hashed)
            hashed.drain()  # what a damaged tar has left unread
        left_out += [{"name": f"{name}:{member}", "reason": reason} for member, reason in refused]
        if vouched.get(name) not in (None, hashed.digest.hexdigest()):
            left_out.append(
                {
                    "name": name,
                    "reason": "no longer the file that it was: copy it again unless it was changed on purpose",
                }
            )
        rows = index_rows(rows)
        index = npy_bytes(rows)
        home.pipe_file(f"{folder}/{index_name(name)}", index)
        shards.append(shard_entry(name, rows, hashed.size, hashed.digest.hexdigest(), index))
    samples = sum(shard["samples"] for shard in shards)
    if not samples:
        raise UserError(f"No image could be read from the tars in {root}: they must hold <key>.jpg (and <key>.cls).")
    count = 1 + max(shard["top_label"] for shard in shards)
    manifest = {
        "name": previous["name"] or posixpath.basename(path),
        "split": previous["split"],
        "classes": previous["classes"] if len(previous["classes"]) >= count else [str(i) for i in range(count)],
        "samples": samples,
        "shards": shards,
        "left_out": left_out,
        "made_by": previous["made_by"] or {"command": "pipeline.shards index"},
    }
    write_manifest(home, folder, manifest)
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


def _previous_manifest(fs: AbstractFileSystem, path: str, patience: Patience) -> dict[str, Any]:
    """What is kept of the manifest of a set that is indexed anew; empty where there is none or it is damaged."""
    try:
        name = f"{path}/dataset.json"
        found = json.loads(persistently(lambda: fs.cat_file(name), name, patience))
    except (FileNotFoundError, PermissionError, ValueError):
        found = {}
    found = found if isinstance(found, dict) and found.get("format") == FORMAT else {}
    empty = {"name": "", "split": "", "classes": [], "shards": [], "made_by": {}}
    kept = {name: found[name] if isinstance(found.get(name), type(none)) else none for name, none in empty.items()}
    return kept if all(isinstance(name, str) for name in kept["classes"]) else kept | {"classes": []}


def _index_tar(file: HashedFile) -> tuple[list[tuple], list[tuple[str, str]]]:
    """The index rows of the readable samples of one tar, and (member, why it is left out) of the others."""
    rows, refused = [], []

    def finish(waiting) -> None:
        member, row, inspected = waiting
        try:
            _, row["height"], row["width"] = inspected.result()
        except DecodeError as error:
            refused.append((member, str(error)))
        else:
            rows.append(tuple(row[name] for name in index_dtype(1).names))

    ahead: deque = deque()
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        try:
            # members of one sample follow each other: WebDataset's rule, which spares a tar's worth of memory
            for key, members in groupby(_sample_files(file, refused), key=lambda member: member[0]):
                image, label = None, -1
                for _, extension, name, offset, content in members:
                    if extension != "cls":
                        image = (name, offset, content)
                    elif content.strip().isdigit():
                        label = int(content)
                    else:
                        refused.append((name, "the class is not a number, so the image counts as unlabelled"))
                if image:
                    name, offset, encoded = image
                    row = {"key": key.encode(), "offset": offset, "size": len(encoded), "label": label}
                    ahead.append((name, row | {"crc32": zlib.crc32(encoded)}, pool.submit(inspect, encoded)))
                if len(ahead) > 4 * cores:
                    finish(ahead.popleft())
        except tarfile.TarError as error:  # the sample at the break may lack its class, so it is not taken
            refused.append(("the rest of the tar", str(error)))
        while ahead:
            finish(ahead.popleft())
    return rows, refused


def _sample_files(file: HashedFile, refused: list) -> Iterator[tuple[str, str, str, int, bytes]]:
    """(key, extension, name, offset, content) of the images and classes in a tar; links and the like are refused."""
    with tarfile.open(fileobj=file, mode="r|", bufsize=BLOCK_BYTES, tarinfo=CheckedMember) as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")  # WebDataset's rule: the key ends at the first dot
            if not stem or member.isdir() or extension.lower() not in IMAGE_SUFFIXES | {"cls"}:
                pass
            elif not is_plain(member):
                refused.append((member.name, NOT_PLAIN))
            else:
                key = f"{folder}/{stem}" if folder else stem
                yield key, extension.lower(), member.name, member.offset_data, tar.extractfile(member).read()
            tar.members = []  # which tarfile would otherwise keep
