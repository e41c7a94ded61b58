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
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from errors import UserError
from pipeline.cache import ShardCache
from pipeline.images import IMAGE_SUFFIXES, DecodeError, inspect
from pipeline.remote import WebFileSystem, download, filesystem, is_local
from pipeline.shards import FORMAT, READ_WHOLE, ShardSet, find_tars, index_dtype, index_name, open_shards

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
    index = npy_bytes(index_rows(rows))
    (folder / index_name(name)).write_bytes(index)  # last: a shard with a whole index is a whole shard
    with open(folder / name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return shard_entry(name, len(rows), file.tell(), digest, index)


def shard_entry(name: str, samples: int, size: int, sha256: str, index: bytes) -> dict[str, Any]:
    """What the manifest says of a shard; `index` is its index file."""
    index_sha256 = hashlib.sha256(index).hexdigest()
    return {"file": name, "samples": samples, "bytes": size, "sha256": sha256, "index_sha256": index_sha256}


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def index_rows(rows: list[tuple]) -> np.ndarray:
    """(N,) structured array of `index_dtype`, its key just wide enough."""
    return np.array(rows, index_dtype(max((len(row[0]) for row in rows), default=1)))


def write_manifest(fs: AbstractFileSystem, path: str, manifest: dict[str, Any]) -> None:
    """Write `dataset.json` in one step: it is what makes a folder a shard set. Before it, the common index if due."""
    manifest = {"format": FORMAT, **manifest}
    if len(manifest["shards"]) > READ_WHOLE:
        manifest["index"] = _write_index(fs, path, manifest["shards"])
    # one line for each shard: to be read by people, and in seconds by the thousand
    shards = ",\n".join(map(json.dumps, manifest.pop("shards")))
    text = json.dumps(manifest, indent=1).removesuffix("\n}") + f',\n "shards": [\n{shards}\n]\n}}\n'
    fs.pipe_file(f"{path}/dataset.json.partial", text.encode())
    fs.mv(f"{path}/dataset.json.partial", f"{path}/dataset.json")


def _write_index(fs: AbstractFileSystem, path: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the indexes of all shards to ROOT/index.npy, one at a time; its size and checksum for the manifest."""

    def rows(shard: dict[str, Any]) -> np.ndarray:
        return np.load(io.BytesIO(fs.cat_file(f"{path}/{index_name(shard['file'])}")), allow_pickle=False)

    # twice over all of them: once for the longest key, and without holding the rows meanwhile
    dtype = index_dtype(max(rows(shard).dtype["key"].itemsize for shard in shards))
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with fs.open(f"{path}/index.npy.partial", "wb") as file:
        hashed = _HashedFile(file)
        np.lib.format.write_array_header_1_0(hashed, header | {"shape": (sum(s["samples"] for s in shards),)})
        for shard in shards:
            hashed.write(rows(shard).astype(dtype).tobytes())
    fs.mv(f"{path}/index.npy.partial", f"{path}/index.npy")
    return {"bytes": hashed.size, "sha256": hashed.digest.hexdigest()}


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
    tars = find_tars(fs, path)
    if not tars:
        raise UserError(f"There is no .tar in {root}: give the folder that holds the shards.")
    previous = _previous_manifest(fs, path)
    home, folder = (fs, path) if _writable(fs, path) else (LocalFileSystem(), str(cache.index_folder(root)))
    home.makedirs(folder, exist_ok=True)
    for name in ("dataset.json", "index.npy"):  # which must not vouch for half of the new indexes
        if home.exists(f"{folder}/{name}"):
            home.rm_file(f"{folder}/{name}")
    shards, left_out, top_label = [], [], -1
    for name in tars:
        with _whole_file(fs, f"{path}/{name}", cache) as file:
            hashed = _HashedFile(file)
            rows, refused = _index_tar(hashed)
            hashed.drain()  # what a damaged tar has left unread
        left_out += [{"name": f"{name}:{member}", "reason": reason} for member, reason in refused]
        rows = index_rows(rows)
        top_label = max(top_label, int(rows["label"].max(initial=-1)))
        index = npy_bytes(rows)
        home.pipe_file(f"{folder}/{index_name(name)}", index)
        shards.append(shard_entry(name, len(rows), hashed.size, hashed.digest.hexdigest(), index))
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


@contextmanager
def _whole_file(fs: AbstractFileSystem, path: str, cache: ShardCache) -> Iterator[BinaryIO]:
    """A file to be read once from its beginning; one from elsewhere is fetched first, past what breaks connections."""
    if is_local(fs):
        with open(path, "rb") as file:
            yield file
        return
    cache.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache.folder) as folder:
        copy = Path(folder, "copy")
        download(fs, path, copy, None, cache.patience)
        with open(copy, "rb") as file:
            yield file


def _previous_manifest(fs: AbstractFileSystem, path: str) -> dict[str, Any]:
    """The manifest of a set that is indexed anew, for its names of classes; empty if there is none to be read."""
    try:
        manifest = json.loads(fs.cat_file(f"{path}/dataset.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else {}


class _HashedFile:
    """A file that is read or written once from its beginning: takes the SHA-256 and the number of the bytes."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size, self.last = file, hashlib.sha256(), 0, b""

    def read(self, count: int) -> bytes:
        block = self.file.read(count)
        self._take(block)
        self.last = (self.last + block[-tarfile.BLOCKSIZE :])[-tarfile.BLOCKSIZE :]
        return block

    def write(self, block: bytes) -> None:
        self.file.write(block)
        self._take(block)

    def _take(self, block: bytes) -> None:
        self.digest.update(block)
        self.size += len(block)

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


def verify_shards(root: str, cache: ShardCache | None = None) -> list[str]:
    """Compare every byte of tars and indexes with the checksums in the manifest; one sentence per difference.

    Of a tar that differs, the samples are named whose own checksums do not fit either.

    Raises:
        UserError: there is no shard set, or it can't be read.
    """
    cache = cache or ShardCache()
    shards = open_shards(root, cache)
    fs, path = filesystem(root, cache.patience)
    home, folder = filesystem(shards.index_root)
    problems = []
    for number, shard in enumerate(shards.manifest["shards"]):
        rows = shards.index[shards.shard_starts[number] : shards.shard_starts[number + 1]]
        problems += _compare(fs, f"{path}/{shard['file']}", shard["bytes"], shard["sha256"], cache, rows)
        if "index_sha256" in shard:  # older sets have none
            index = f"{folder}/{index_name(shard['file'])}"
            problems += _compare(home, index, None, shard["index_sha256"], cache)
    if entry := shards.manifest.get("index"):
        problems += _compare(home, f"{folder}/index.npy", entry["bytes"], entry["sha256"], cache)
    known = {shard["file"] for shard in shards.manifest["shards"]}
    problems += [
        f"{path}/{name} is not in dataset.json: take it away or make the index anew."
        for name in find_tars(fs, path)
        if name not in known
    ]
    return problems


def _compare(
    fs: AbstractFileSystem, name: str, size: int | None, sha256: str, cache: ShardCache, rows: np.ndarray | None = None
) -> list[str]:
    """What is wrong with a file of a shard set; `rows` are those of the samples in it."""
    try:
        with _whole_file(fs, name, cache) as file:
            hashed = _HashedFile(file)
            hashed.drain()
            if (size is None or hashed.size == size) and hashed.digest.hexdigest() == sha256:
                return []
            damaged = [] if rows is None else [row["key"].decode() for row in rows if not _holds(file, row)]
    except FileNotFoundError:
        return [f"{name} is missing: copy it again."]
    samples = f" (damaged samples: {len(damaged)}, the first {', '.join(damaged[:3])})" if damaged else ""
    return [f"{name} is not the file that was written: copy it again{samples}."]


def _holds(file: BinaryIO, row: np.void) -> bool:
    """Whether a tar holds the sample of an index row unharmed."""
    file.seek(int(row["offset"]))
    return zlib.crc32(file.read(int(row["size"]))) == row["crc32"]
