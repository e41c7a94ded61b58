"""Writes the files of a shard set, indexes tars from elsewhere, and compares a copy with its checksums."""

import hashlib
import io
import json
import os
import posixpath
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np

from errors import UserError
from pipeline.images import IMAGE_SUFFIXES, DecodeError, inspect
from pipeline.shards import FORMAT, ShardSet, filesystem, index_dtype, index_name, open_shards

BLOCK_BYTES = 1 << 20


class Sample(NamedTuple):
    """One image as it goes into a shard."""

    key: str
    form: tuple[str, int, int]
    """(file extension, height, width), as `inspect` gives them."""
    encoded: bytes
    label: int
    """-1 for none."""


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write one tar and its index, byte for byte the same for the same samples.

    Returns:
        The shard's entry for the manifest.
    """
    rows = []
    with tarfile.open(folder / name, "w", format=tarfile.GNU_FORMAT) as tar:

        def add(file_name: str, content: bytes) -> int:
            member = tarfile.TarInfo(file_name)  # time, owner and mode stay at their fixed defaults
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            return tar.offset - -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE  # where the content starts

        for key, (extension, height, width), encoded, label in samples:
            offset = add(f"{key}.{extension}", encoded)
            if label >= 0:
                add(f"{key}.cls", str(label).encode())
            rows.append((key.encode(), offset, len(encoded), height, width, label, zlib.crc32(encoded)))
            tar.members = []  # which tarfile would otherwise keep
    np.save(folder / index_name(name), index_rows(rows))
    with open(folder / name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": name, "samples": len(rows), "bytes": file.tell(), "sha256": digest}


def index_rows(rows: list[tuple]) -> np.ndarray:
    """(N,) structured array of `index_dtype`, its key just wide enough."""
    return np.array(rows, index_dtype(max((len(row[0]) for row in rows), default=1)))


def write_manifest(fs: fsspec.AbstractFileSystem, path: str, manifest: dict[str, Any]) -> None:
    """Write `dataset.json` in one step: it is what makes a folder a shard set."""
    fs.pipe_file(f"{path}/dataset.json.partial", json.dumps({"format": FORMAT, **manifest}, indent=1).encode())
    fs.mv(f"{path}/dataset.json.partial", f"{path}/dataset.json")


def index_shards(root: str) -> ShardSet:
    """Index the WebDataset tars in a folder or URL prefix; each is read once, from its beginning to its end.

    Every image is decoded once: one that can't be is left out and named.

    Raises:
        UserError: no tars, or no readable image in them.
        OSError: a tar can't be read or an index can't be written.
    """
    fs, path = filesystem(root)
    tars = sorted(posixpath.basename(name) for name in fs.glob(f"{path}/*.tar"))
    if not tars:
        raise UserError(f"There is no .tar in {root}: give the folder that holds the shards.")
    previous = _previous_manifest(fs, path)
    if fs.exists(f"{path}/dataset.json"):
        fs.rm_file(f"{path}/dataset.json")  # it must not vouch for half of the new indices
    shards, left_out, top_label = [], [], -1
    for name in tars:
        with fs.open(f"{path}/{name}", "rb") as file:
            hashed = _HashedFile(file)
            rows, refused = _index_tar(hashed)
            hashed.drain()  # what a damaged tar has left unread
        left_out += [{"name": f"{name}:{member}", "reason": reason} for member, reason in refused]
        index = index_rows(rows)
        top_label = max(top_label, int(index["label"].max(initial=-1)))
        shards.append({"file": name, "samples": len(rows), "bytes": hashed.size, "sha256": hashed.digest.hexdigest()})
        buffer = io.BytesIO()
        np.save(buffer, index)
        fs.pipe_file(f"{path}/{index_name(name)}", buffer.getvalue())
    samples = sum(shard["samples"] for shard in shards)
    if not samples:
        raise UserError(f"No image could be read from the tars in {root}: they must hold <key>.jpg (and <key>.cls).")
    classes = previous.get("classes", [])
    manifest = {
        "name": previous.get("name", posixpath.basename(path)),
        "split": previous.get("split", ""),
        "classes": classes if len(classes) > top_label else [str(label) for label in range(top_label + 1)],
        "samples": samples,
        "shards": shards,
        "left_out": left_out,
        "made_by": {"command": "pipeline.shards index"},
    }
    write_manifest(fs, path, manifest)
    return open_shards(root)


def _previous_manifest(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    """The manifest of a set that is indexed anew, for its names of classes; empty if there is none to be read."""
    try:
        manifest = json.loads(fs.cat_file(f"{path}/dataset.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else {}


class _HashedFile:
    """A file that is read once from its beginning: passes the bytes on and takes their SHA-256 and number."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size, self.last = file, hashlib.sha256(), 0, b""

    def read(self, count: int) -> bytes:
        block = self.file.read(count)
        self.digest.update(block)
        self.size += len(block)
        self.last = (self.last + block[-tarfile.BLOCKSIZE :])[-tarfile.BLOCKSIZE :]
        return block

    def drain(self) -> None:
        while self.read(BLOCK_BYTES):
            pass


def _index_tar(file: _HashedFile) -> tuple[list[tuple], list[tuple[str, str]]]:
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
            for key, members in groupby(_sample_files(file), key=lambda member: member[0]):
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


def _sample_files(file: _HashedFile) -> Iterator[tuple[str, str, str, int, bytes]]:
    """(key, extension, name, offset, content) of the images and classes in a tar."""
    with tarfile.open(fileobj=file, mode="r|", bufsize=BLOCK_BYTES) as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")  # WebDataset's rule: the key ends at the first dot
            if stem and member.isfile() and extension.lower() in IMAGE_SUFFIXES | {"cls"}:
                key = f"{folder}/{stem}" if folder else stem
                yield key, extension.lower(), member.name, member.offset_data, tar.extractfile(member).read()
            tar.members = []  # which tarfile would otherwise keep
    file.drain()
    if any(file.last):  # tarfile takes a cut between two members for the end
        raise tarfile.ReadError("the tar ends before its end mark")


def verify_shards(root: str) -> list[str]:
    """Compare every tar with the SHA-256 that the manifest recorded; return one sentence per difference."""
    shards = open_shards(root)
    fs, path = filesystem(root)
    problems = []
    for shard in shards.manifest["shards"]:
        name = f"{path}/{shard['file']}"
        if not fs.exists(name):
            problems.append(f"{name} is missing: copy it again.")
            continue
        with fs.open(name, "rb") as file:
            hashed = _HashedFile(file)
            hashed.drain()
        if hashed.digest.hexdigest() != shard["sha256"]:
            problems.append(f"{name} is not the file that was written: copy it again.")
    return problems
