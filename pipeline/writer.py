"""Writes a split as a shard set: in parts, and once more after an interruption, to the same bytes.

The plan (which images, in which order, how many to a shard, how they are treated) is settled before anything is
written. Shard k holds the readable ones among the k-th slice of the plan's order, so what it holds depends neither on
who writes it nor on what was written before (see `pipeline.shard_writer`). All of it happens in a hidden folder beside
the split:

    OUT/.train.partial/plan.json               what is being written; anything else is refused until this is done
    OUT/.train.partial/lock                    held to begin and to complete the split
    OUT/.train.partial/work/train-000007.*     the shard that a process is writing, and its lock
    OUT/.train.partial/work/train-000007.json  the shard is whole: its entry for the manifest, and what it left out
    OUT/.train.partial/shards/                 whole shards; becomes OUT/train by a rename when dataset.json is in it
"""

import csv
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from errors import UserError
from pipeline.images import QUALITY
from pipeline.philox import uniforms
from pipeline.shard_files import write_manifest
from pipeline.shard_writer import ShardWriter, write_shards
from pipeline.shards import ShardSet, index_name, open_shards
from pipeline.sources import Source

SAMPLES_PER_SHARD = 1024
WRITING_STREAM = 2**32 - 3  # of random numbers: apart from those of the textures, the views and the training order


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
    workers: int = 1,
    part: tuple[int, int] = (1, 1),
) -> ShardSet | None:
    """Write OUT/<split>, or go on with it where a former call with the same arguments was interrupted.

    The bytes are a function of the source, `seed`, `samples_per_shard`, `verify`, `short_side` and `quality`.

    Args:
        samples_per_shard: of the source: a shard with unreadable ones among them holds fewer.
        verify, short_side, quality: see `pipeline.images.prepare`.
        workers: processes; 1 stays in this one.
        part: (i, n) writes the i-th of n shares of the shards, i from 1. Whoever finds all shards whole completes
            the split.

    Returns:
        The shard set; None while shards of other parts are missing.

    Raises:
        UserError: no readable image, no space or permission, another plan than that of the split or of what an
            interrupted call left, or its classes differ from those of another split in OUT.
    """
    target, partial = out / split, out / f".{split}.partial"
    if not split or split.startswith(".") or Path(split).name != split:
        raise UserError(f"{split!r} can't be the name of a split: choose a plain one, such as train.")
    if not source.items:
        first = f"; the first that was refused: {': '.join(source.left_out[0])}" if source.left_out else ""
        raise UserError(
            f"No images in {source.name}: a source holds .jpg, .png or similar files in class folders{first}."
        )
    try:
        plan = _plan(source, out, split, seed, samples_per_shard, verify, short_side, quality)
        if not _begin(target, partial, plan):
            return open_shards(str(target))
        labels = {name: number for number, name in enumerate(plan["classes"])} | {None: -1}
        writer = ShardWriter(source.read, labels, partial, split, verify, short_side, quality)
        order = np.argsort(uniforms(seed, 0, np.arange(len(source.items)), WRITING_STREAM, 1)[:, 0], kind="stable")
        slices = [order[first : first + samples_per_shard] for first in range(0, len(order), samples_per_shard)]
        mine = [number for number in range(part[0] - 1, len(slices), part[1]) if writer.entry(number) is None]
        tasks = [(number, [source.items[item] for item in slices[number]]) for number in mine]
        write_shards(writer, tasks, workers, f"{source.name} {split}")
        finished = _finish(target, partial, plan, source, [writer.entry(number) for number in range(len(slices))])
    except OSError as error:
        if not target.exists():  # else another process has just completed it
            raise _unwritable(out, error) from error
        finished = True
    return open_shards(str(target)) if finished else None


def shards_written(out: Path, split: str) -> int:
    """How many shards of an incomplete split are whole."""
    return len(list((out / f".{split}.partial" / "work").glob("*.json")))


def _plan(
    source: Source,
    out: Path,
    split: str,
    seed: int,
    samples_per_shard: int,
    verify: bool,
    short_side: int | None,
    quality: int,
) -> dict[str, Any]:
    """The head of the manifest: all that the bytes depend on."""
    made_by: dict[str, Any] = {"command": "pipeline.convert", "seed": seed, "samples_per_shard": samples_per_shard}
    if short_side is not None:
        made_by |= {"short_side": short_side, "quality": quality}
    if short_side is not None or source.encodes:  # another version may encode other bytes
        made_by["opencv"] = cv2.__version__
    if not verify:
        made_by["verify"] = False
    listing = hashlib.sha256()
    for item in (*source.items, *source.left_out):
        listing.update(repr(item).encode())
    return {
        "name": source.name,
        "split": split,
        "classes": _classes(source, out, split),
        "source_sha256": listing.hexdigest(),  # of names, classes and sizes, not of the images
        "made_by": made_by,
    }


def _classes(source: Source, out: Path, split: str) -> list[str]:
    """Those of the source; those of a split that is already there, so that a label means the same in both."""
    names = source.classes
    if names is None:
        names = sorted({label for label, _, _ in source.items if label is not None})
    for manifest in sorted(out.glob("[!.]*/dataset.json")):  # not the hidden folder of an unfinished conversion
        if manifest.parent.name == split:
            continue
        others = open_shards(str(manifest.parent)).classes
        if foreign := sorted(set(names) - set(others)):
            raise UserError(
                f"{split} has classes that {manifest.parent} has not ({', '.join(foreign[:3])}): "
                "convert the split with all classes first, or into another folder."
            )
        return others
    return names


def _begin(target: Path, partial: Path, plan: dict[str, Any]) -> bool:
    """Lay down the plan, or compare with what is there already; False if the split is complete."""
    if not target.exists():
        (partial / "work").mkdir(parents=True, exist_ok=True)
        with FileLock(partial / "lock"):
            if not target.exists():  # which another process may have completed meanwhile
                _lay_down(partial, plan)
                return True
    try:
        found = open_shards(str(target)).manifest
    except UserError:
        found = {}
    if difference := _difference(plan, found):
        raise UserError(f"{target} exists already: delete it or choose another folder ({difference}).")
    shutil.rmtree(partial, ignore_errors=True)
    return False


def _lay_down(partial: Path, plan: dict[str, Any]) -> None:
    (partial / "shards").mkdir(exist_ok=True)
    path = partial / "plan.json"
    try:
        begun = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        begun = None
    if not isinstance(begun, dict) or not isinstance(begun.get("made_by"), dict):  # cut short when it was written
        path.write_text(json.dumps(plan))
        return
    if difference := _difference(plan, begun):
        raise UserError(
            f"{partial} holds an unfinished conversion with another plan ({difference}): "
            "repeat its options to go on with it, or delete it to begin anew."
        )


def _difference(plan: dict[str, Any], found: dict[str, Any]) -> str:
    """In words, the first thing in which two plans differ; empty if in nothing."""
    here, there = ({**head.get("made_by", {}), **head} for head in (plan, found))
    if here["command"] != there.get("command"):
        return "it was not made by this converter"
    for name in dict.fromkeys(["name", *plan["made_by"], *found["made_by"]]):
        if here.get(name) != there.get(name):
            return f"its {name.replace('_', ' ')} is {there.get(name)} instead of {here.get(name)}"
    if here["classes"] != there["classes"]:
        return "it has other classes"
    return "" if here["source_sha256"] == there.get("source_sha256") else "its source lists other images"


def _finish(
    target: Path, partial: Path, plan: dict[str, Any], source: Source, entries: list[dict[str, Any] | None]
) -> bool:
    """Complete the split if every shard is whole; of several processes one does and the others find it done."""
    if any(entry is None for entry in entries):
        return target.exists()
    with FileLock(partial / "lock"):
        if target.exists():
            return True
        rejected = [*source.left_out, *(refused for entry in entries for refused in entry["rejected"])]
        shards = [entry["shard"] for entry in entries if entry["shard"]["samples"]]
        if not shards:
            shutil.rmtree(partial, ignore_errors=True)
            name, reason = rejected[0]
            raise UserError(f"No image of {source.name} could be read; the first: {name} ({reason}).")
        folder = partial / "shards"
        counts = np.zeros(len(plan["classes"]), np.int64)
        for shard in (entry["shard"] for entry in entries):
            index = folder / index_name(shard["file"])
            if shard["samples"]:
                labels = np.load(index)["label"]
                counts += np.bincount(labels[labels >= 0], minlength=len(counts))
            else:  # an empty tar would be a trap for every reader
                for file in folder / shard["file"], index:
                    file.unlink(missing_ok=True)
        with open(folder / "rejected.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file, lineterminator="\n").writerows([("name", "reason"), *rejected])
        manifest = plan | {
            "class_counts": counts.tolist(),
            "samples": sum(shard["samples"] for shard in shards),
            "rejected": len(rejected),
            "shards": shards,
        }
        write_manifest(LocalFileSystem(), str(folder), manifest)
        os.replace(folder, target)
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _unwritable(out: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        cure = "free some space and run the same command again, which keeps the finished shards"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        cure = "choose a folder that you may write to"
    else:
        cure = "choose another folder, or see to the disk and run the same command again"
    return UserError(f"{out} can't be written ({error.strerror or error}): {cure}.")
