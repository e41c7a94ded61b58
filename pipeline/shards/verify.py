"""What is in a shard set: whether every byte is as it was written; figures, classes and sizes as tables."""

import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from fsspec.spec import AbstractFileSystem
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..common import UserError
from .cache import ShardCache
from .dataset import ShardSet, find_tars, label_fault, open_shards, split_roots
from .format import ROWS, HashedFile, index_name
from .remote import filesystem

SHOWN = 20
BAR = 40
SHORT_SIDE_PX = np.array([0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048])
ENCODED_KB = np.array([0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096])


def verify(root: str) -> list[str]:
    """The problems of all splits of a folder, or of one shard set; says which has none."""
    problems, roots = [], split_roots(root)
    for split in roots:
        try:
            found = verify_shards(split)
        except UserError as error:  # the other split may be sound
            found = [str(error)]
        if not found:
            print("Every shard is as it was written." if len(roots) == 1 else f"{split}: every shard is as written.")
        problems += found
    return problems


def show(root: str) -> list[str]:
    """Print the tables of all splits of a folder, or of one shard set; why those are missing that can't be had."""
    problems = []
    for split in split_roots(root):
        try:
            Console().print(*summarize(open_shards(split)), sep="\n")
        except UserError as error:
            problems.append(str(error))
    return problems


def verify_shards(root: str, cache: ShardCache | None = None) -> list[str]:
    """Compare every byte of tars and indexes with the checksums in the manifest; one sentence per difference.

    Of a tar that differs, the samples are named whose own checksums do not fit either.

    Raises:
        UserError: there is no shard set, or it can't be read.
    """
    cache = cache or ShardCache()
    shards = open_shards(root, cache)
    fs, path = filesystem(root, cache.retry_policy)
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
    if fault := label_fault(shards.index, shards.classes):
        problems.append(f"{folder}/dataset.json is damaged ({fault}): copy it again or make the index anew.")
    known = {shard["file"] for shard in shards.manifest["shards"]}
    problems += [
        f"{path}/{name} is not in dataset.json: take it away or make the index anew."
        for name in find_tars(fs, path, cache.retry_policy)
        if name not in known
    ]
    return problems


def _compare(
    fs: AbstractFileSystem, name: str, size: int | None, sha256: str, cache: ShardCache, rows: np.ndarray | None = None
) -> list[str]:
    """What is wrong with a file of a shard set; `rows` are those of the samples in it."""
    try:
        with cache.whole_file(fs, name) as file:
            hashed = HashedFile(file)
            hashed.drain()
            if (size is None or hashed.size == size) and hashed.digest.hexdigest() == sha256:
                return []
            damaged = (
                [] if rows is None else [row["key"].decode(errors="replace") for row in rows if not _holds(file, row)]
            )
    except FileNotFoundError:
        return [f"{name} is missing: copy it again."]
    except OSError as error:
        return [f"{name} can't be read ({error}): see to its permissions and the disk."]
    samples = f" (damaged samples: {len(damaged)}, the first {', '.join(damaged[:3])})" if damaged else ""
    return [f"{name} is not the file that was written: copy it again{samples}."]


def _holds(file: BinaryIO, row: np.void) -> bool:
    """Whether a tar holds the sample of an index row unharmed."""
    file.seek(int(row["offset"]))
    return zlib.crc32(file.read(int(row["size"]))) == row["crc32"]


def summarize(shards: ShardSet) -> list[Table]:
    """A table of figures, one of the classes (the largest and the smallest), one each of short sides and file sizes.

    Raises:
        UserError: there are labels without a class.
    """
    if fault := label_fault(shards.index, shards.classes):
        raise UserError(f"{shards.index_root}/dataset.json is damaged ({fault}): copy it again or make the index anew.")
    classes = np.zeros(len(shards.classes) + 1, np.int64)  # the last one for unlabeled images
    sides, sizes = np.zeros(len(SHORT_SIDE_PX), np.int64), np.zeros(len(ENCODED_KB), np.int64)
    encoded_bytes = 0
    for rows in _parts(shards.index):
        classes += np.bincount(np.where(rows["label"] < 0, len(classes) - 1, rows["label"]), minlength=len(classes))
        short = np.minimum(rows["height"], rows["width"])
        sides += np.bincount(np.searchsorted(SHORT_SIDE_PX, short, side="right") - 1, minlength=len(sides))
        sizes += np.bincount(np.searchsorted(ENCODED_KB, rows["size"] / 1000, side="right") - 1, minlength=len(sizes))
        encoded_bytes += int(rows["size"].sum())
    return [
        _figures(shards, encoded_bytes, int(classes[-1])),
        _classes(shards.classes, classes[:-1]),
        _histogram("short side, px", SHORT_SIDE_PX, sides),
        _histogram("encoded image, kB", ENCODED_KB, sizes),
    ]


def _parts(index: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(index), ROWS):
        yield index[first : first + ROWS]


def _figures(shards: ShardSet, encoded_bytes: int, unlabeled: int) -> Table:
    manifest = shards.manifest
    left_out = manifest.get("rejected", len(manifest.get("left_out", [])))
    counts = np.diff(shards.shard_starts)
    table = Table("shard set", escape(shards.root))
    for name, value in {
        "name": " ".join(filter(None, (manifest.get("name"), manifest.get("split")))),
        "images": f"{len(shards):,}, {unlabeled:,} of them without a class; {left_out:,} were left out",
        "shards": f"{len(counts):,} of {counts.min():,} to {counts.max():,} images",
        "bytes": f"{sum(shard['bytes'] for shard in manifest['shards']) / 1e9:,.3f} GB, of which images "
        f"{encoded_bytes / 1e9:,.3f} GB ({encoded_bytes / max(len(shards), 1) / 1e3:,.1f} kB each)",
        "made by": ", ".join(f"{key} {value}" for key, value in manifest.get("made_by", {}).items()),
        "index": "" if shards.index_root == shards.root else shards.index_root,
    }.items():
        if value:
            table.add_row(name, escape(value))
    return table


def _classes(names: list[str], counts: np.ndarray) -> Table:
    table = Table("class", "images", "share")
    order = np.argsort(-counts, kind="stable")
    left = len(order) - SHOWN
    for place, label in enumerate(order):
        if left <= 0 or place < SHOWN // 2 or place >= len(order) - SHOWN // 2:
            _add_bar(table, names[label], counts[label], counts)
        elif place == SHOWN // 2:
            table.add_row(f"... {left} more", "", "")
    return table


def _histogram(title: str, edges: np.ndarray, counts: np.ndarray) -> Table:
    table = Table(title, "images", "share")
    (filled,) = np.nonzero(counts)
    for bin_ in range(filled.min(), filled.max() + 1) if len(filled) else ():
        upper = f"to {edges[bin_ + 1] - 1}" if bin_ + 1 < len(edges) else "and more"
        _add_bar(table, f"{edges[bin_]} {upper}", counts[bin_], counts)
    return table


def _add_bar(table: Table, name: str, count: int, counts: np.ndarray) -> None:
    bar = "█" * round(BAR * count / max(counts.max(), 1))
    table.add_row(escape(name), f"{count:,}", f"{count / max(counts.sum(), 1):6.1%} {bar}")
