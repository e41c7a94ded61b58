"""Verification of every byte of a shard set, and tables of its contents."""

import hashlib
import zlib
from typing import BinaryIO

import numpy as np
from fsspec.spec import AbstractFileSystem
from rich.markup import escape
from rich.table import Table

from ..common import UserError
from .cache import ShardCache
from .dataset import ShardSet, label_fault, list_tars, open_shards, split_roots
from .format import ROWS, index_name
from .remote import filesystem

SHOWN_CLASSES = 20
BAR_WIDTH = 40
SHORT_SIDE_PX = np.array([0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048])
REMEDY = "copy it again or run `python -m pipeline.shards index`"
ENCODED_KB = np.array([0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096])


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
    tables, problems = [], []
    for split in split_roots(root):
        try:
            tables += summarize(open_shards(split))
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
    fs, path = filesystem(root, cache.retry_policy)
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
        f"{path}/{name} is not in dataset.json; move it away or run `python -m pipeline.shards index`."
        for name in list_tars(fs, path, cache.retry_policy)
        if name not in known
    ]
    return problems


def _compare(
    fs: AbstractFileSystem, name: str, size: int | None, sha256: str, cache: ShardCache, rows: np.ndarray | None = None
) -> list[str]:
    """Compare a file with its checksum and, if known, its size; returns the problem, if any, as a list of one sentence.

    Args:
        rows: index rows of the samples in a tar, to count the damaged ones.
    """
    try:
        with cache.whole_file(fs, name) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if size in (None, file.tell()) and found == sha256:
                return []
            bad_rows = [] if rows is None else [row for row in rows if _is_bad(file, row)]
    except FileNotFoundError:
        return [f"{name} is missing; copy it again."]
    except OSError as error:
        return [f"{name} can't be read ({error}); check its permissions and the disk."]
    keys = ", ".join(row["key"].decode(errors="replace") for row in bad_rows[:3])
    samples = f" (damaged samples: {len(bad_rows)}, the first {keys})" if bad_rows else ""
    return [f"{name} does not match its checksum; copy it again{samples}."]


def _is_bad(file: BinaryIO, row: np.void) -> bool:
    file.seek(int(row["offset"]))
    return zlib.crc32(file.read(int(row["size"]))) != row["crc32"]


def summarize(shards: ShardSet) -> list[Table]:
    """Tables of totals, class counts (largest and smallest), short sides and encoded sizes.

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
        short = np.minimum(rows["height"], rows["width"])
        sides += np.bincount(np.searchsorted(SHORT_SIDE_PX, short, side="right") - 1, minlength=len(sides))
        sizes += np.bincount(np.searchsorted(ENCODED_KB, rows["size"] / 1000, side="right") - 1, minlength=len(sizes))
        encoded_bytes += int(rows["size"].sum())
    return [
        _totals(shards, encoded_bytes, int(classes[-1])),
        _classes(shards.classes, classes[:-1]),
        _histogram("short side, px", SHORT_SIDE_PX, sides),
        _histogram("encoded image, kB", ENCODED_KB, sizes),
    ]


def _totals(shards: ShardSet, encoded_bytes: int, unlabeled: int) -> Table:
    manifest = shards.manifest
    left_out = manifest.get("rejected", len(manifest.get("left_out", [])))
    counts = np.diff(shards.shard_starts)
    table = Table("shard set", escape(shards.root))
    for name, value in {
        "name": " ".join(filter(None, (manifest.get("name"), manifest.get("split")))),
        "images": f"{len(shards):,}, {unlabeled:,} of them unlabeled; {left_out:,} were left out",
        "shards": f"{len(counts):,} with {counts.min():,} to {counts.max():,} images",
        "bytes": f"{sum(shard['bytes'] for shard in manifest['shards']) / 1e9:,.3f} GB, of which "
        f"{encoded_bytes / 1e9:,.3f} GB are images ({encoded_bytes / max(len(shards), 1) / 1e3:,.1f} kB each)",
        "created by": ", ".join(f"{key} {value}" for key, value in manifest.get("made_by", {}).items()),
        "index": "" if shards.index_root == shards.root else shards.index_root,
    }.items():
        if value:
            table.add_row(name, escape(value))
    return table


def _classes(names: list[str], counts: np.ndarray) -> Table:
    table = Table("class", "images", "share")
    order = np.argsort(-counts, kind="stable")
    hidden = len(order) - SHOWN_CLASSES
    for place, label in enumerate(order):
        if hidden <= 0 or place < SHOWN_CLASSES // 2 or place >= len(order) - SHOWN_CLASSES // 2:
            _add_bar(table, names[label], counts[label], counts)
        elif place == SHOWN_CLASSES // 2:
            table.add_row(f"... {hidden} more", "", "")
    return table


def _histogram(title: str, edges: np.ndarray, counts: np.ndarray) -> Table:
    table = Table(title, "images", "share")
    (filled,) = np.nonzero(counts)
    for bin_ in range(filled.min(), filled.max() + 1) if len(filled) else ():
        upper = f"to {edges[bin_ + 1] - 1}" if bin_ + 1 < len(edges) else "and more"
        _add_bar(table, f"{edges[bin_]} {upper}", counts[bin_], counts)
    return table


def _add_bar(table: Table, name: str, count: int, counts: np.ndarray) -> None:
    bar = "█" * round(BAR_WIDTH * count / max(counts.max(), 1))
    table.add_row(escape(name), f"{count:,}", f"{count / max(counts.sum(), 1):6.1%} {bar}")
