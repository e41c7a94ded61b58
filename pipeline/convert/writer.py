"""Write a split as a shard set, in one call or in parts; an interrupted conversion resumes and writes the same bytes.

The plan (which images, in which order, how many per shard, how they are processed) is fixed before anything is written.
Shard k holds the readable images of the k-th slice of the planned order, so its content depends neither on which
process writes it nor on what was written before (see `pipeline.convert.shard_writer`). All files are written to a
hidden folder next to the split:

    OUT/.train.partial/plan.json               the plan; another plan is refused until the split is complete
    OUT/.train.partial/lock                    held while starting and completing the split
    OUT/.train.partial/work/train-000007.*     shard that a process is writing, and its lock
    OUT/.train.partial/work/train-000007.json  record of a finished shard: plan, manifest entry, rejected images
    OUT/.train.partial/shards/                 finished shards; renamed to OUT/train once it holds dataset.json
"""

import csv
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from ..common import UserError, progress_bar
from ..images.files import DecodeError
from ..images.pixel_format import PixelFormat
from ..images.prepare import QUALITY, prepare, read_format
from ..philox import uniforms
from ..shards.dataset import ShardSet, open_shards
from ..shards.duplicates import identical, size_and_crc
from ..shards.format import index_name, write_manifest
from ..shards.measure import MEASURED_IMAGES, measure, mixed_formats, short_sides
from .base import Source, read_range
from .shard_writer import MixedFormats, ShardWriter, write_shards

SAMPLES_PER_SHARD = 1024
WRITING_STREAM = 2**32 - 3
"""Random stream of the sample order; differs from those of the textures, the views and the training order."""


def write_split(
    source: Source,
    out: Path,
    split: str,
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    *,
    verify: bool = True,
    short_side: int | None = None,
    quality: int = QUALITY,
    bits: int | None = None,
    pages_as_channels: bool = False,
    workers: int = 1,
    threads: bool = False,
    part: tuple[int, int] = (1, 1),
) -> ShardSet | None:
    """Write OUT/<split>, or resume an interrupted call with the same arguments.

    The bytes are a function of the source, `seed`, `samples_per_shard` and the arguments of `prepare`.

    Args:
        source: images and their classes.
        out: folder that will hold the split.
        split: name of the split, such as "train".
        seed: seed of the sample order.
        samples_per_shard: number of source images per shard; unreadable ones are missing from the shard.
        verify, short_side, quality, bits, pages_as_channels: see `pipeline.images.prepare.prepare`.
        workers: number of processes; 1 uses the current process.
        threads: use threads instead of processes.
        part: (i, n) writes the i-th of n shares of the shards, i from 1. The call that finds all shards written
            verifies their checksums and completes the split.

    Returns:
        The shard set, or None while shards of other parts are missing.

    Raises:
        UserError: there is no readable image, no space or no permission; images differ in channels or bits; the plan
            differs from that of the existing or unfinished split; or the classes differ from those of another split in
            OUT.
    """
    target, unfinished = out / split, out / f".{split}.partial"
    if not split or split.startswith(".") or Path(split).name != split:
        raise UserError(f"{split!r} can't be the name of a split; use a plain name such as train.")
    if not source.items:
        first = f" (the first rejected file: {': '.join(source.left_out[0])})" if source.left_out else ""
        raise UserError(
            f"No images in {source.name}{first}; use a source that holds .jpg, .png or similar files in class folders."
        )
    made_by: dict[str, Any] = {"command": "pipeline.convert", "seed": seed, "samples_per_shard": samples_per_shard}
    if short_side is not None:
        made_by |= {"short_side": short_side, "quality": quality}
    if short_side is not None or source.encodes:  # another version may encode other bytes
        made_by["opencv"] = cv2.__version__
    if not verify:
        made_by["verify"] = False
    reading: dict[str, Any] = {}
    if bits is not None:
        reading["bits"] = bits
    if pages_as_channels:
        reading["pages_as_channels"] = True
    made_by |= reading
    try:
        plan = _plan(source, out, split, made_by)
        if _begin(target, unfinished, plan, source):
            process = partial(prepare, verify=verify, short_side=short_side, quality=quality, **reading)
            labels = {name: number for number, name in enumerate(plan["classes"])} | {None: -1}
            digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
            shards = -(-len(source.items) // samples_per_shard)
            measured = -(-MEASURED_IMAGES // shards)
            writer = ShardWriter(source.read, process, labels, unfinished, split, digest, measured)
            order = np.argsort(uniforms(seed, 0, np.arange(len(source.items)), WRITING_STREAM, 1)[:, 0], kind="stable")
            slices = (order[first : first + samples_per_shard] for first in range(0, len(order), samples_per_shard))
            tasks = [(number, [source.items[item] for item in chosen]) for number, chosen in enumerate(slices)]
            write_shards(writer, tasks[part[0] - 1 :: part[1]], workers, f"{source.name} {split}", threads=threads)
            if all(writer.entry(number) for number, _ in tasks):
                with FileLock(unfinished / "lock"):
                    if not target.exists():
                        # a crash or a failing disk may have damaged what other parts have written
                        others = [task for task in tasks if task[0] % part[1] != part[0] - 1]
                        title = f"{source.name} {split}: check"
                        write_shards(writer, others, workers, title, wait_for_others=True, threads=threads)
                        _finish(target, unfinished, plan, source, [writer.entry(number) for number, _ in tasks])
    except MixedFormats as error:
        if part == (1, 1):
            shutil.rmtree(unfinished, ignore_errors=True)
        counts = _count_formats(source, f"{source.name} {split}: count", reading)
        raise mixed_formats(f"{source.name} ({split})", counts, "pipeline.convert") from error
    except OSError as error:
        # otherwise another process has just completed it; Path.exists would raise in a folder that may not be entered
        if not os.path.exists(target):
            raise UserError(
                f"{out} can't be written ({error.strerror or error}); free some space or use a folder with write "
                "permission, and run the same command again, which keeps the finished shards."
            ) from error
    if not target.exists():
        return None
    # a process that waited for the lock while another completed the split has created its folder again
    shutil.rmtree(unfinished, ignore_errors=True)
    return open_shards(str(target))


def _count_formats(source: Source, title: str, reading: dict[str, Any]) -> Counter[PixelFormat]:
    """Number of images of each format, by their headers."""
    counts: Counter[PixelFormat] = Counter()
    with progress_bar(len(source.items), title) as update:
        for _, _, address in source.items:
            update(advance=1)
            with suppress(DecodeError, OSError):  # which the conversion would list
                counts[read_format(source.read(*address), **reading)] += 1
    return counts


def shards_written(out: Path, split: str) -> int:
    """Number of finished shards of an incomplete split."""
    return len(list((out / f".{split}.partial" / "work").glob("*.json")))


def _plan(source: Source, out: Path, split: str, made_by: dict[str, Any]) -> dict[str, Any]:
    """Everything that determines the bytes."""
    listing = hashlib.sha256()
    for item in (*source.items, *source.left_out):
        listing.update(repr(item).encode())
    return {
        "name": source.name,
        "split": split,
        "classes": _classes(source, out, split),
        "source_sha256": listing.hexdigest(),  # names, classes and sizes, not the images
        "made_by": made_by,
        "modified_sha256": hashlib.sha256(np.array(source.modified, "<i8").tobytes()).hexdigest(),
    }


def _classes(source: Source, out: Path, split: str) -> list[str]:
    """Classes of another split in OUT, finished or not, so that labels agree; otherwise those of the source."""
    names = source.classes
    if names is None:
        names = sorted({label for label, _, _ in source.items if label is not None})
    for folder, others in _other_classes(out, split):
        if foreign := sorted(set(names) - set(others)):
            delete = ", or delete the unfinished one" if folder.suffix == ".partial" else ""
            raise UserError(
                f"{split} has classes that {folder} does not have ({', '.join(foreign[:3])}); "
                f"convert the split with all classes first, use another folder{delete}."
            )
        return others
    return names


def _other_classes(out: Path, split: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, classes) of the other splits in OUT."""
    for manifest in sorted(out.glob("[!.]*/dataset.json")):
        if manifest.parent.name != split:
            yield manifest.parent, open_shards(str(manifest.parent)).classes
    for folder in sorted(out.glob(".*.partial")):
        plan = read_plan(folder)
        if plan and plan["split"] != split and not (out / plan["split"]).exists():
            yield folder, plan["classes"]


def _begin(target: Path, unfinished: Path, plan: dict[str, Any], source: Source) -> bool:
    """Write the plan or compare it with the existing one; return False if the split is complete."""
    if not target.exists():
        for folder in "work", "shards":
            (unfinished / folder).mkdir(parents=True, exist_ok=True)
        with FileLock(unfinished / "lock"):
            if not target.exists():  # another process may have completed it in the meantime
                _store_plan(unfinished, plan, source)
                return True
    try:
        found = open_shards(str(target)).manifest
    except UserError:
        found = {}
    if difference := _difference(plan, found):
        raise UserError(f"{target} exists already ({difference}); delete it or use another folder or --split.")
    shutil.rmtree(unfinished, ignore_errors=True)
    return False


def _store_plan(unfinished: Path, plan: dict[str, Any], source: Source) -> None:
    """Write the plan, or compare it with that of the unfinished conversion."""
    path, writing = unfinished / "plan.json", unfinished / "plan.json.writing"
    if existing := read_plan(unfinished):
        if difference := _difference(plan, existing):
            raise UserError(
                f"{unfinished} holds an unfinished conversion with another plan ({difference}); "
                "use the same options to resume it, or delete it to start again."
            )
        return
    # without a plan, the seed and source of finished shards are unknown
    if any((unfinished / "shards").iterdir()) or any((unfinished / "work").glob("*.json")):
        raise UserError(f"{path} can't be read, but shards have been written; delete {unfinished} to start again.")
    writing.write_text(json.dumps(plan))
    _to_disk(writing)  # shards without a plan are lost
    os.replace(writing, path)
    try:  # if another split was started at the same time, neither saw the classes of the other
        if _classes(source, unfinished.parent, plan["split"]) != plan["classes"]:
            raise UserError(
                f"Another split was started in {unfinished.parent} at the same time; run the same command again."
            )
    except UserError:
        path.unlink()
        raise


def read_plan(unfinished: Path) -> dict[str, Any] | None:
    """Plan of an unfinished conversion; None if it is missing or damaged."""
    try:
        plan = json.loads((unfinished / "plan.json").read_text())
    except (OSError, ValueError):
        return None
    kinds = {"name": str, "split": str, "classes": list, "made_by": dict}
    valid = isinstance(plan, dict) and all(isinstance(plan.get(name), kind) for name, kind in kinds.items())
    return plan if valid else None


DIFFERENCES = {
    "command": "it was not written by this converter",
    "classes": "it has other classes",
    "source_sha256": "its source lists other images",
    "modified_sha256": "the files of its source have other modification times",
}


def _difference(plan: dict[str, Any], found: dict[str, Any]) -> str:
    """Describe the first difference between two plans, or a plan and a manifest; empty if there is none."""
    here, there = ({**head.get("made_by", {}), **head} for head in (plan, found))
    for name in dict.fromkeys(["command", "name", *plan["made_by"], *found.get("made_by", {}), *DIFFERENCES]):
        # a manifest has no modification times: its bytes depend on the content of the source only
        if here.get(name) != there.get(name) and (name in there or name != "modified_sha256"):
            values = f"its {name.replace('_', ' ')} is {there.get(name)} instead of {here.get(name)}"
            return DIFFERENCES.get(name, values)
    return ""


def _finish(
    target: Path, unfinished: Path, plan: dict[str, Any], source: Source, entries: list[dict[str, Any] | None]
) -> None:
    """Write the manifest and move the shards into place, unless one of them has disappeared."""
    if not all(entries):
        return
    rejected = [*source.left_out, *(refused for entry in entries for refused in entry["rejected"])]
    shards = [entry["shard"] for entry in entries if entry["shard"]["samples"]]
    if not shards:
        shutil.rmtree(unfinished, ignore_errors=True)
        name, reason = rejected[0]
        raise UserError(f"No image of {source.name} could be read ({name}: {reason}); use another source.")
    formats = {PixelFormat(**found) for entry in entries for found in entry["pixels"]}
    if len(formats) > 1:
        raise MixedFormats
    (pixel_format,) = formats
    folder = unfinished / "shards"
    counts, parts = np.zeros(len(plan["classes"]), np.int64), []
    for entry in entries:
        tar, rows = entry["shard"]["file"], np.load(folder / index_name(entry["shard"]["file"]))
        labels = rows["label"]
        counts += np.bincount(labels[labels >= 0], minlength=len(counts))
        if len(rows):
            parts.append(rows)
        else:  # many readers fail on an empty tar
            (folder / tar).unlink()
            (folder / index_name(tar)).unlink()
    copies = _copies(folder, [shard["file"] for shard in shards], parts)
    _write_csv(folder / "rejected.csv", [("name", "reason"), *rejected])
    if copies:
        _write_csv(folder / "duplicates.csv", [("name", "copy of"), *copies])
    manifest = {name: value for name, value in plan.items() if name != "modified_sha256"} | {
        "class_counts": counts.tolist(),
        "samples": sum(shard["samples"] for shard in shards),
        "rejected": len(rejected),
        "pixels": pixel_format._asdict(),
        "statistics": {
            **measure([row for entry in entries for row in entry["moments"]], pixel_format),
            "short_side_px": short_sides(parts),
            "duplicates": len(copies),
        },
        "shards": shards,
    }
    write_manifest(LocalFileSystem(), str(folder), manifest)
    _to_disk(*folder.iterdir(), folder)  # at the end, because most of it is there by then
    os.replace(folder, target)
    _to_disk(target.parent)
    shutil.rmtree(unfinished, ignore_errors=True)


def _to_disk(*paths: Path) -> None:
    """Wait until files or folders are on the disk: after a crash of the machine, a renamed file might be empty."""
    for path in paths if os.name == "posix" else ():  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _copies(folder: Path, tars: list[str], parts: list[np.ndarray]) -> list[tuple[str, str]]:
    """(key, key of the first) of all images with the same bytes as an earlier one.

    Args:
        folder: folder of the tars.
        tars: names of the tars.
        parts: (n,) index rows of each.
    """
    starts = np.cumsum([0] + [len(rows) for rows in parts])

    def row(position: int) -> tuple[str, np.void]:
        shard = int(np.searchsorted(starts, position, side="right")) - 1
        return tars[shard], parts[shard][position - starts[shard]]

    def read(position: int) -> bytes:
        tar, found = row(position)
        return read_range(folder / tar, int(found["offset"]), int(found["size"]))

    def key(position: int) -> str:
        return row(position)[1]["key"].decode()

    groups = identical(np.concatenate([size_and_crc(rows) for rows in parts]), read)
    return [(key(copy), key(first)) for first, *copies in groups for copy in copies]


def _write_csv(file: Path, rows: list[tuple[str, str]]) -> None:
    with open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as out:
        csv.writer(out, lineterminator="\n").writerows(rows)
