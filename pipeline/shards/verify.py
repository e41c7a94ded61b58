"""Verification of every byte of a shard set, and tables of its contents."""

import hashlib
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from fsspec.spec import AbstractFileSystem
from rich.markup import escape
from rich.table import Table

from ..common import PIPELINE, UserError
from ..images.pixel_format import PixelFormat
from .cache import ShardCache
from .dataset import ShardSet, folder_and_tars, label_fault, list_tars, open_shards, split_roots
from .duplicates import shared_images
from .format import ROWS, SHORT_SIDE_PX, index_name, range_counts, short_side_counts
from .remote import filesystem

SHOWN_ROWS = 20
BAR_WIDTH = 40
ENCODED_KB = np.array([0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096])
REMEDY = f"copy it again or run `python -m {PIPELINE}.shards index`"


def verify(root: str) -> dict[str, list[str]]:
    """Problems of each split of a folder, or of one shard set, by its root."""
    problems = {}
    for split in split_roots(root):
        try:
            problems[split] = verify_shards(split)
        except UserError as error:  # the other split may be intact
            problems[split] = [str(error)]
    return problems


def show(root: str) -> tuple[list[Table], list[str]]:
    """Tables of all splits of a folder, or of one shard set, and the problems of those that can't be opened."""
    tables, problems, train = [], [], None
    for split in split_roots(root):
        try:
            shards = open_shards(split)
            tables += summarize(shards, train)
            train = train or shards
        except UserError as error:
            problems.append(str(error))
    return tables, problems


def verify_shards(root: str, cache: ShardCache | None = None) -> list[str]:
    """Compare every byte of tars and indexes with the checksums in the manifest; returns one sentence per difference.

    The sentence on a tar that differs counts its damaged samples and names the first ones.

    Raises:
        UserError: there is no shard set, or it can't be read.
    """
    cache = cache or ShardCache()
    shards = open_shards(root, cache)
    fs, path = filesystem(shards.root, cache.retry_policy)
    index_fs, folder = filesystem(shards.index_root)
    problems = []
    for number, shard in enumerate(shards.manifest["shards"]):
        rows = shards.index[shards.shard_starts[number] : shards.shard_starts[number + 1]]
        problems += _compare(fs, f"{path}/{shard['file']}", shard["bytes"], shard["sha256"], cache, rows)
        if "index_sha256" in shard:  # sets written by older versions have none
            index = f"{folder}/{index_name(shard['file'])}"
            problems += _compare(index_fs, index, None, shard["index_sha256"], cache)
    if entry := shards.manifest.get("index"):
        problems += _compare(index_fs, f"{folder}/index.npy", entry["bytes"], entry["sha256"], cache)
    if fault := label_fault(shards.index, shards.classes):
        problems.append(f"{folder}/dataset.json is damaged ({fault}); {REMEDY}.")
    known = {shard["file"] for shard in shards.manifest["shards"]}
    problems += [
        f"{path}/{name} is not in dataset.json; move it away or run `python -m {PIPELINE}.shards index`."
        for name in list_tars(fs, path, cache.retry_policy, folder_and_tars(root)[1])
        if name not in known
    ]
    return problems


def _compare(
    fs: AbstractFileSystem, name: str, size: int | None, sha256: str, cache: ShardCache, rows: Sequence[np.void] = ()
) -> list[str]:
    """Compare a file with its checksum and known size; at most one sentence, which counts the damaged `rows`."""
    try:
        with cache.whole_file(fs, name) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if size in (None, file.tell()) and found == sha256:
                return []
            damaged = [row["key"].decode(errors="replace") for row in rows if _is_bad(file, row)]
    except FileNotFoundError:
        return [f"{name} is missing; copy it again."]
    except OSError as error:
        return [f"{name} can't be read ({error}); check its permissions and the disk."]
    samples = f" (damaged samples: {len(damaged)}, the first {', '.join(damaged[:3])})" if damaged else ""
    return [f"{name} does not match its checksum; copy it again{samples}."]


def _is_bad(file: BinaryIO, row: np.void) -> bool:
    file.seek(int(row["offset"]))
    return zlib.crc32(file.read(int(row["size"]))) != row["crc32"]


def summarize(shards: ShardSet, train: ShardSet | None = None) -> list[Table]:
    """Tables of totals, class counts (largest and smallest), short sides and encoded sizes.

    Args:
        shards: the set.
        train: train split of a test split, whose images are looked for in it.

    Raises:
        UserError: there are labels without a class.
    """
    if fault := label_fault(shards.index, shards.classes):
        raise UserError(f"{shards.index_root}/dataset.json is damaged ({fault}); {REMEDY}.")
    classes = np.zeros(len(shards.classes) + 1, np.int64)  # the last entry counts unlabeled images
    sides, sizes = np.zeros(len(SHORT_SIDE_PX), np.int64), np.zeros(len(ENCODED_KB), np.int64)
    encoded_bytes = 0
    for first in range(0, len(shards), ROWS):
        rows = shards.index[first : first + ROWS]
        classes += np.bincount(np.where(rows["label"] < 0, len(classes) - 1, rows["label"]), minlength=len(classes))
        sides += short_side_counts(rows)
        sizes += range_counts(rows["size"] / 1000, ENCODED_KB)
        encoded_bytes += int(rows["size"].sum())
    order = np.argsort(-classes[:-1], kind="stable")
    return [
        _totals(shards, encoded_bytes, classes, train),
        _table("class", [shards.classes[label] for label in order], classes[order]),
        _histogram("short side, px", SHORT_SIDE_PX, sides),
        _histogram("encoded image, kB", ENCODED_KB, sizes),
    ]


def _totals(shards: ShardSet, encoded_bytes: int, classes: np.ndarray, train: ShardSet | None) -> Table:
    """Table of totals; the last of `classes` counts unlabeled images."""
    manifest, statistics = shards.manifest, shards.manifest.get("statistics", {})
    *classes, unlabeled = classes.tolist()
    left_out = manifest.get("rejected", len(manifest.get("left_out", [])))
    counts = np.diff(shards.shard_starts)
    per_shard = " to ".join(f"{count:,}" for count in sorted({counts.min(), counts.max()}))
    tar_bytes = sum(shard["bytes"] for shard in manifest["shards"])
    table = Table("shard set", escape(shards.root))
    for name, value in {
        "name": " ".join(dict.fromkeys(filter(None, (manifest.get("name"), manifest.get("split"))))),
        "images": f"{len(shards):,}, {unlabeled:,} of them unlabeled; {left_out:,} were left out",
        "shards": f"{len(counts):,} with {per_shard} images",
        "bytes": f"{tar_bytes / 1e9:,.3f} GB, of which {encoded_bytes / 1e9:,.3f} GB are images "
        f"({encoded_bytes / max(len(shards), 1) / 1e3:,.1f} kB each)",
        "classes": f"{len(classes)} with {min(classes):,} to {max(classes):,} images" if classes else "",
        "pixels": str(shards.pixel_format),
        **_measured(statistics, shards.pixel_format),
        "also in train": "" if train is None else f"{len(shared_images(shards, train)):,} images, byte for byte",
        "created by": ", ".join(f"{key} {value}" for key, value in manifest.get("made_by", {}).items()),
        "index": "" if shards.index_root == shards.root else shards.index_root,
    }.items():
        if value:
            table.add_row(name, escape(value))
    return table


def _measured(statistics: dict[str, Any], pixel_format: PixelFormat) -> dict[str, str]:
    """Rows of the statistics that the conversion or indexing stored; older versions stored none."""
    channels, digits = "RGB in 0..1" if pixel_format.channels == 3 else "in 0..1", pixel_format.bits // 2
    rows = {"copies": f"{statistics['duplicates']:,} images, byte for byte" if "duplicates" in statistics else ""}
    for name in "mean", "std":
        if name in statistics:
            values = ", ".join(f"{value:.{digits}f}" for value in statistics[name])
            rows[name] = f"{values} ({channels}, {statistics['measured_images']:,} images)"
    return rows


def _histogram(title: str, edges: np.ndarray, counts: np.ndarray) -> Table:
    ranges = [f"{low} to {high - 1}" for low, high in pairwise(edges)] + [f"{edges[-1]} and more"]
    filled = np.flatnonzero(counts)
    shown = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0)
    return _table(title, ranges[shown], counts[shown])


def _table(title: str, names: list[str], counts: np.ndarray) -> Table:
    """Table of counts with bars; only the first and last of many rows."""
    table = Table(title, "images", "share")
    hidden = range(SHOWN_ROWS // 2, len(names) - SHOWN_ROWS // 2)
    for place, (name, count) in enumerate(zip(names, counts, strict=True)):
        if place not in hidden:
            bar = "█" * round(BAR_WIDTH * count / max(counts.max(), 1))
            table.add_row(escape(name), f"{count:,}", f"{count / max(counts.sum(), 1):6.1%} {bar}")
        elif place == hidden.start:
            table.add_row(f"... {len(hidden)} more", "", "")
    return table
