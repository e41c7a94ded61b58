"""Writes a split as a shard set: in parallel, in parts, and once more after an interruption, to the same bytes.

The plan (which images, in which order, how many to a shard, how they are treated) is settled before anything is
written. Shard k holds the readable ones among the k-th slice of the plan's order, so what it holds depends neither on
who writes it nor on what was written before. All of it happens in a hidden folder beside the split:

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
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from errors import UserError
from pipeline.images import QUALITY, DecodeError, prepare
from pipeline.philox import uniforms
from pipeline.shard_files import Sample, write_manifest, write_shard
from pipeline.shards import ShardSet, index_name, open_shards
from pipeline.sources import Item, Source

SAMPLES_PER_SHARD = 1024
WRITING_STREAM = 2**32 - 3  # of random numbers: apart from those of the textures, the views and the training order
REFRESH_S = 0.2


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
        _write_shards(writer, tasks, workers, f"{source.name} {split}")
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


@dataclass(frozen=True)
class ShardWriter:
    """Writes single shards of a plan; pickled to be used in other processes."""

    read: Callable[..., bytes]
    labels: dict[str | None, int]
    partial: Path
    split: str
    verify: bool
    short_side: int | None
    quality: int

    def _work(self, number: int, suffix: str) -> Path:
        return self.partial / "work" / f"{self.split}-{number:06d}.{suffix}"

    def entry(self, number: int) -> dict[str, Any] | None:
        """What is known of a shard that is whole."""
        try:
            entry = json.loads(self._work(number, "json").read_text())
            tar = self.partial / "shards" / entry["shard"]["file"]
            whole = tar.stat().st_size == entry["shard"]["bytes"] and tar.with_suffix(".index.npy").exists()
        except (FileNotFoundError, ValueError):
            return None
        return entry if whole else None

    def write(self, number: int, items: list[Item], tally: Callable[[int], None]) -> None:
        """Write a shard unless it is whole or another process is at it.

        Args:
            tally: called with the size of every image that was read, readable or not; may raise to stop.

        Raises:
            OSError: it can't be written.
            UserError: the source has gone away.
        """
        tar, rejected = self._work(number, "tar"), []
        index, entry = tar.with_name(index_name(tar.name)), self._work(number, "json.writing")
        with suppress(Timeout), FileLock(self._work(number, "lock"), timeout=0):
            if self.entry(number) is not None:
                return
            try:
                shard = write_shard(tar.parent, tar.name, self._samples(items, rejected, tally))
                entry.write_text(json.dumps({"shard": shard, "rejected": rejected}))
                for file in index, tar:
                    os.replace(file, self.partial / "shards" / file.name)
                os.replace(entry, self._work(number, "json"))  # the last step makes it whole
            except BaseException:
                with suppress(OSError):
                    for file in tar, index, entry:
                        file.unlink(missing_ok=True)
                raise

    def _samples(self, items: list[Item], rejected: list[tuple[str, str]], tally: Callable) -> Iterator[Sample]:
        for label, key, address in items:
            encoded = b""
            try:
                encoded = self.read(*address)
                form, stored = prepare(encoded, self.verify, self.short_side, self.quality)
            except (DecodeError, OSError) as error:
                rejected.append((key, str(error)))
            else:
                yield Sample(key, form, stored, self.labels[label])
            tally(len(encoded))


def _unwritable(out: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        cure = "free some space and run the same command again, which keeps the finished shards"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        cure = "choose a folder that you may write to"
    else:
        cure = "choose another folder, or see to the disk and run the same command again"
    return UserError(f"{out} can't be written ({error.strerror or error}): {cure}.")


def _write_shards(writer: ShardWriter, tasks: list[tuple[int, list[Item]]], workers: int, title: str) -> None:
    workers = min(workers, len(tasks))
    with _progress(title, sum(len(items) for _, items in tasks)) as show:
        if workers > 1:
            _write_in_processes(writer, tasks, workers, show)
            return
        done, size, shown = 0, 0, time.monotonic()

        def tally(image_bytes: int) -> None:
            nonlocal done, size, shown
            done, size = done + 1, size + image_bytes
            if time.monotonic() - shown > REFRESH_S:
                show(done, size)
                shown = time.monotonic()

        for number, items in tasks:
            writer.write(number, items, tally)
        show(done, size)


def _write_in_processes(
    writer: ShardWriter, tasks: list[tuple[int, list[Item]]], workers: int, show: Callable[[int, int], None]
) -> None:
    # spawned everywhere, because a fork of a process that has threads may hang
    context = multiprocessing.get_context("spawn")
    shared = context.Array("q", 3)  # images, bytes, whether to stop
    with ProcessPoolExecutor(workers, context, _start_worker, (writer, shared)) as pool:
        try:
            with _interrupts_held_back():  # the workers inherit it: this process alone hears Ctrl-C, and tells them
                waiting = {pool.submit(_write_in_worker, *task) for task in tasks}
            while waiting:
                done, waiting = wait(waiting, REFRESH_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                show(shared[0], shared[1])
        except BaseException as error:
            shared[2] = 1
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                cure = "run the same command again with fewer --workers"
                raise UserError(f"A worker process was killed, maybe for want of memory: {cure}.") from error
            raise


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stopped(Exception):
    """The main process wants no more."""


_in_worker: list = []  # of a worker process: its ShardWriter and what it shares with the main process


def _start_worker(writer: ShardWriter, shared: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows, where they inherit nothing
    cv2.setNumThreads(1)
    _in_worker[:] = writer, shared
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A main process that is killed can't tell; without it nobody would end the workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_in_worker(number: int, items: list[Item]) -> None:
    writer, shared = _in_worker

    def tally(image_bytes: int) -> None:
        with shared.get_lock():
            shared[0] += 1
            shared[1] += image_bytes
            if shared[2]:
                raise _Stopped

    writer.write(number, items, tally)


@contextmanager
def _progress(title: str, images: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; yields what tells it how many images and bytes have been read."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    hidden = not sys.stderr.isatty()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=hidden) as progress:
        bar, begun = progress.add_task(title, total=images, rate=""), time.monotonic()

        def show(done: int, size: int) -> None:
            seconds = max(time.monotonic() - begun, 1e-3)
            rate = f"{done / seconds:,.0f} images/s {size / seconds / 1e6:,.0f} MB/s"
            progress.update(bar, completed=done, rate=rate)

        yield show
