"""Writes a split as a shard set, in parts or in one go; an interrupted conversion resumes and gives the same bytes.

The plan (which images, in which order, how many per shard, how they are processed) is fixed before anything is written.
Shard k holds the readable images of the k-th slice of the plan's order, so its content depends neither on which process
writes it nor on what was written before (see `pipeline.convert.shard_writer`). All files are written to a hidden folder next to
the split:

    OUT/.train.partial/plan.json               what is being written; any other plan is refused until the split is done
    OUT/.train.partial/lock                    held to start and to complete the split
    OUT/.train.partial/work/train-000007.*     the shard that a process is writing, and its lock
    OUT/.train.partial/work/train-000007.json  record of a finished shard: plan, manifest entry, images left out
    OUT/.train.partial/shards/                 finished shards; renamed to OUT/train once it holds dataset.json
"""

import csv
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from ..common import UserError
from ..images import QUALITY
from ..philox import uniforms
from ..shards.dataset import ShardSet, open_shards
from ..shards.format import index_name, write_manifest
from .shard_writer import ShardWriter, write_shards
from .sources import Source

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
    """Write OUT/<split>, or resume an interrupted call with the same arguments.

    The bytes are a function of the source, `seed`, `samples_per_shard`, `verify`, `short_side` and `quality`.

    Args:
        samples_per_shard: of the source: a shard with unreadable ones among them holds fewer.
        verify, short_side, quality: see `pipeline.images.prepare`.
        workers: processes; 1 stays in this one.
        part: (i, n) writes the i-th of n shares of the shards, i from 1. The call that finds all shards written
            compares them with their checksums and completes the split.

    Returns:
        The shard set; None while shards of other parts are missing.

    Raises:
        UserError: no readable image, no space or permission, a plan that differs from that of the existing or
            unfinished split, or classes that differ from those of another split in OUT.
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
        # not in the manifest, whose bytes depend on the content of the source alone
        tied = plan | {"modified_sha256": hashlib.sha256(np.array(source.modified, "<i8").tobytes()).hexdigest()}
        if not _begin(target, partial, tied, source):
            return open_shards(str(target))
        digest = hashlib.sha256(json.dumps(tied).encode()).hexdigest()
        labels = {name: number for number, name in enumerate(plan["classes"])} | {None: -1}
        writer = ShardWriter(source.read, labels, partial, split, digest, verify, short_side, quality)
        order = np.argsort(uniforms(seed, 0, np.arange(len(source.items)), WRITING_STREAM, 1)[:, 0], kind="stable")
        slices = (order[first : first + samples_per_shard] for first in range(0, len(order), samples_per_shard))
        tasks = [(number, [source.items[item] for item in chosen]) for number, chosen in enumerate(slices)]
        share = tasks[part[0] - 1 :: part[1]]
        write_shards(writer, share, workers, f"{source.name} {split}")
        finished = all(writer.entry(number) for number, _ in tasks)
        if finished:
            with FileLock(partial / "lock"):
                if not target.exists():
                    # a crash or a failing disk may have damaged what other parts have written
                    others = [task for task in tasks if task[0] % part[1] != part[0] - 1]
                    write_shards(writer, others, workers, f"{source.name} {split}: check", wait=True)
                    finished = _finish(target, partial, plan, source, [writer.entry(number) for number, _ in tasks])
    except OSError as error:
        if not target.exists():  # else another process has just completed it
            raise _unwritable(out, error) from error
        finished = True
    return open_shards(str(target)) if finished or target.exists() else None


def shards_written(out: Path, split: str) -> int:
    """Number of finished shards of an incomplete split."""
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
    """The classes of another split in OUT, finished or not, so that a label means the same in both, or the source's."""
    names = source.classes
    if names is None:
        names = sorted({label for label, _, _ in source.items if label is not None})
    for folder, others in _other_classes(out, split):
        if foreign := sorted(set(names) - set(others)):
            delete = " or, if it is abandoned, delete it" if folder.suffix == ".partial" else ""
            raise UserError(
                f"{split} has classes that {folder} does not have ({', '.join(foreign[:3])}): "
                f"convert the split with all classes first, or into another folder{delete}."
            )
        return others
    return names


def _other_classes(out: Path, split: str) -> Iterator[tuple[Path, list[str]]]:
    for manifest in sorted(out.glob("[!.]*/dataset.json")):
        if manifest.parent.name != split:
            yield manifest.parent, open_shards(str(manifest.parent)).classes
    for path in sorted(out.glob(".*.partial/plan.json")):
        plan = _read_plan(path)
        if plan and path.parent.name != f".{split}.partial" and not (out / plan["split"]).exists():
            yield path.parent, plan["classes"]


def _begin(target: Path, partial: Path, plan: dict[str, Any], source: Source) -> bool:
    """Write the plan, or compare it with the existing one; False if the split is complete."""
    if not target.exists():
        (partial / "work").mkdir(parents=True, exist_ok=True)
        with FileLock(partial / "lock"):
            if not target.exists():  # another process may have completed it in the meantime
                if _lay_down(partial, plan):
                    _compare_classes(source, target, partial, plan["classes"])
                return True
    try:
        found = open_shards(str(target)).manifest
    except UserError:
        found = {}
    if difference := _difference(plan, found):
        raise UserError(f"{target} exists already: delete it or choose another folder ({difference}).")
    shutil.rmtree(partial, ignore_errors=True)
    return False


def _lay_down(partial: Path, plan: dict[str, Any]) -> bool:
    """Write the plan, or compare it with that of the unfinished conversion; whether it was written."""
    (partial / "shards").mkdir(exist_ok=True)
    path = partial / "plan.json"
    begun = _read_plan(path)
    if begun is None:
        # nothing tells which seed or source finished shards belong to
        if any((partial / "shards").iterdir()) or any((partial / "work").glob("*.json")):
            raise UserError(f"{path} can't be read, but shards have been written: delete {partial} to start again.")
        path.with_name("plan.json.writing").write_text(json.dumps(plan))
        os.replace(path.with_name("plan.json.writing"), path)
        return True
    difference = _difference(plan, begun)
    if not difference and begun.get("modified_sha256") != plan["modified_sha256"]:
        difference = "the files of its source have other modification times"
    if difference:
        raise UserError(
            f"{partial} holds an unfinished conversion with another plan ({difference}): "
            "repeat its options to resume it, or delete it to start again."
        )
    return False


def _compare_classes(source: Source, target: Path, partial: Path, classes: list[str]) -> None:
    """Withdraw a new plan if another split was started at the same time, when neither saw the classes of the other."""
    try:
        if _classes(source, target.parent, target.name) != classes:
            raise UserError(f"Another split was started in {target.parent} just now: run the same command again.")
    except UserError:
        (partial / "plan.json").unlink()
        raise


def _read_plan(path: Path) -> dict[str, Any] | None:
    """None if there is none, or one that is damaged."""
    try:
        plan = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    kinds = {"name": str, "split": str, "classes": list, "made_by": dict}
    whole = isinstance(plan, dict) and all(isinstance(plan.get(name), kind) for name, kind in kinds.items())
    return plan if whole else None


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
    """Write the manifest and move the shards to their place; False if one of them has disappeared."""
    if not all(entries):
        return False
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
