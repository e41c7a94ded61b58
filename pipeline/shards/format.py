"""File format of a shard set, and the functions that write it: tars, their indexes, the common index, the manifest.

Tars and indexes are deterministic: the same samples give the same bytes. `pipeline.shards.dataset` lists the files.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fsspec.spec import AbstractFileSystem

from ..common import file_sha256
from ..images.arrays import npy_bytes

FORMAT = "streamclr-shards-1"
READ_WHOLE = 16
"""Maximum number of shards without a common index; their own indexes are read in parallel and joined."""
ROWS = 1 << 20
"""Index rows to process at a time, since an index may exceed the memory."""

SHORT_SIDE_PX = np.array([0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048])
"""Lower bounds of the ranges in which short sides are counted."""


def index_dtype(key_length: int) -> np.dtype:
    """Index row of one sample.

    Fields: `key` (bytes), `offset` and `size` of the encoded image in its tar in bytes, `height` and `width` in pixels,
    `label` (-1 for none) and `crc32` of the encoded image.
    """
    fields = [("key", f"S{max(key_length, 1)}"), ("offset", "<i8"), ("size", "<i8")]
    return np.dtype([*fields, ("height", "<i4"), ("width", "<i4"), ("label", "<i8"), ("crc32", "<u4")])


def index_name(tar_name: str) -> str:
    """File name of a tar's index."""
    return tar_name.removesuffix(".tar") + ".index.npy"


class Sample(NamedTuple):
    """One image to be written to a shard."""

    key: str
    form: tuple[str, int, int]
    """(file extension, height, width), with sizes in pixels."""
    encoded: bytes
    label: int
    """Class number, -1 for none."""


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write one tar and its index to `folder`; returns the shard's entry for the manifest."""
    rows = []
    with tarfile.open(folder / name, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for key, (extension, height, width), encoded, label in samples:
            offset = _add(tar, f"{key}.{extension}", encoded)
            if label >= 0:
                _add(tar, f"{key}.cls", str(label).encode())
            rows.append((key.encode(), offset, len(encoded), height, width, label, zlib.crc32(encoded)))
    rows = index_rows(rows)
    index = npy_bytes(rows)
    (folder / index_name(name)).write_bytes(index)  # last: an existing index implies a complete tar
    return shard_entry(name, rows, (folder / name).stat().st_size, file_sha256(folder / name), index)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a file; returns the offset of its content in the tar."""
    member = tarfile.TarInfo(name)  # its defaults for time, owner and mode are constant
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    tar.members = []  # tarfile would otherwise keep all members in memory
    return tar.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def shard_entry(name: str, rows: np.ndarray, size: int, sha256: str, index: bytes) -> dict[str, Any]:
    """Manifest entry of a shard.

    Args:
        rows: (N,) rows of its index.
        size, sha256: size in bytes and checksum of the tar.
        index: content of its index file.
    """
    index_sha256, top_label = hashlib.sha256(index).hexdigest(), int(rows["label"].max(initial=-1))
    entry = {"file": name, "samples": len(rows), "bytes": size, "sha256": sha256, "index_sha256": index_sha256}
    return entry | {"top_label": top_label}  # lets large sets open without reading every label


def index_rows(rows: list[tuple]) -> np.ndarray:
    """(N,) array of `index_dtype`, with the key field as wide as the longest key."""
    return np.array(rows, index_dtype(max((len(row[0]) for row in rows), default=1)))


def range_counts(values: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    """(R,) int64: how many of the values lie in each range, given the (R,) lower bounds of the ranges."""
    return np.bincount(np.searchsorted(lowest, values, side="right") - 1, minlength=len(lowest))


def short_side_counts(rows: np.ndarray) -> np.ndarray:
    """Number of images in each range of `SHORT_SIDE_PX`, from (N,) index rows."""
    return range_counts(np.minimum(rows["height"], rows["width"]), SHORT_SIDE_PX)


def write_manifest(fs: AbstractFileSystem, path: str, manifest: dict[str, Any]) -> None:
    """Write the common index, if the set has more than `READ_WHOLE` shards, and then `dataset.json`, atomically.

    A folder is a shard set once it has a `dataset.json`, so it must be written last.

    Args:
        path: folder in `fs` that holds the indexes.
        manifest: `shards` (entries of `write_shard`), `classes`, `samples`, `name`, `split` and other metadata.
    """
    manifest = {"format": FORMAT, **manifest}
    if len(manifest["shards"]) > READ_WHOLE:
        manifest["index"] = _write_index(fs, path, manifest["shards"])
    # one line per shard keeps a manifest of thousands of shards readable
    shards = ",\n".join(map(json.dumps, manifest.pop("shards")))
    text = json.dumps(manifest, indent=1).removesuffix("\n}") + f',\n "shards": [\n{shards}\n]\n}}\n'
    fs.pipe_file(f"{path}/dataset.json.partial", text.encode())
    fs.mv(f"{path}/dataset.json.partial", f"{path}/dataset.json")


def _write_index(fs: AbstractFileSystem, path: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the indexes of all shards in index.npy, one at a time; returns its size and checksum for the manifest."""

    def rows(shard: dict[str, Any]) -> np.ndarray:
        return np.load(io.BytesIO(fs.cat_file(f"{path}/{index_name(shard['file'])}")), allow_pickle=False)

    # two passes, the first for the width of the keys, so that only one shard's rows are in memory
    dtype = index_dtype(max(rows(shard).dtype["key"].itemsize for shard in shards))
    shape = (sum(shard["samples"] for shard in shards),)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    digest, size = hashlib.sha256(), 0
    with fs.open(f"{path}/index.npy.partial", "wb") as file:
        for block in chain([header.getvalue()], (rows(shard).astype(dtype).tobytes() for shard in shards)):
            file.write(block)
            digest.update(block)
            size += len(block)
    fs.mv(f"{path}/index.npy.partial", f"{path}/index.npy")
    return {"bytes": size, "sha256": digest.hexdigest()}
