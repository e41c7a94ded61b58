"""Writes the files of a shard set: tars with an index each, the common index, and the manifest."""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from fsspec.spec import AbstractFileSystem

BLOCK_BYTES = 1 << 20


FORMAT = "streamclr-shards-1"


READ_WHOLE = 16
"""Sets of at most so many shards have no common index: theirs are read at once and joined."""


ROWS = 1 << 20
"""Of an index at a time: it may be larger than the memory."""


def index_dtype(key_length: int) -> np.dtype:
    """One index row: where the encoded image lies in its tar, its size in pixels, its label and its CRC-32."""
    fields = [("key", f"S{max(key_length, 1)}"), ("offset", "<i8"), ("size", "<i8")]
    return np.dtype([*fields, ("height", "<i4"), ("width", "<i4"), ("label", "<i8"), ("crc32", "<u4")])


def index_name(tar_name: str) -> str:
    return tar_name.removesuffix(".tar") + ".index.npy"


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
    with open(folder / name, "wb") as file:
        tar = HashedFile(file)

        def add(file_name: str, content: bytes) -> int:
            member = tarfile.TarInfo(file_name)  # time, owner and mode stay at their fixed defaults
            member.size = len(content)
            tar.write(member.tobuf(tarfile.GNU_FORMAT))
            offset = tar.size
            tar.write(content)
            tar.write(bytes(-tar.size % tarfile.BLOCKSIZE))
            return offset

        for key, (extension, height, width), encoded, label in samples:
            offset = add(f"{key}.{extension}", encoded)
            if label >= 0:
                add(f"{key}.cls", str(label).encode())
            rows.append((key.encode(), offset, len(encoded), height, width, label, zlib.crc32(encoded)))
        tar.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar, filled up to a record
        tar.write(bytes(-tar.size % tarfile.RECORDSIZE))
    rows = index_rows(rows)
    index = npy_bytes(rows)
    (folder / index_name(name)).write_bytes(index)  # last: a shard with a whole index is a whole shard
    return shard_entry(name, rows, tar.size, tar.digest.hexdigest(), index)


def shard_entry(name: str, rows: np.ndarray, size: int, sha256: str, index: bytes) -> dict[str, Any]:
    """What the manifest says of a shard; `rows` are those of `index`, its index file."""
    index_sha256, top_label = hashlib.sha256(index).hexdigest(), int(rows["label"].max(initial=-1))
    entry = {"file": name, "samples": len(rows), "bytes": size, "sha256": sha256, "index_sha256": index_sha256}
    return entry | {"top_label": top_label}  # so that a large set can be opened without a look at all labels


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
        hashed = HashedFile(file)
        np.lib.format.write_array_header_1_0(hashed, header | {"shape": (sum(s["samples"] for s in shards),)})
        for shard in shards:
            hashed.write(rows(shard).astype(dtype).tobytes())
    fs.mv(f"{path}/index.npy.partial", f"{path}/index.npy")
    return {"bytes": hashed.size, "sha256": hashed.digest.hexdigest()}


class HashedFile:
    """A file that is read or written once from its beginning: takes the SHA-256 and the number of the bytes."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def read(self, count: int) -> bytes:
        block = self.file.read(count)
        self._take(block)
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
