"""Writes the shards of a planned split, in this process or in several; see `pipeline.convert.writer` for the plan.

A shard is moved into place by renames and its record is written last, so a shard that was interrupted at any point is
written again. Several processes may write the same split, since each writes only shards whose lock it gets.
"""

import hashlib
import io
import json
import multiprocessing
import os
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..common import UserError
from ..images import DecodeError, prepare
from ..shards.format import HashedFile, Sample, index_name, shard_entry, write_shard
from .sources import Item

REFRESH_S = 0.2


@dataclass(frozen=True)
class ShardWriter:
    """Writes single shards of a plan; pickled to be used in other processes."""

    read: Callable[..., bytes]
    labels: dict[str | None, int]
    partial: Path
    split: str
    plan: str
    """Digest of the plan: records that were written under another one are not trusted."""
    verify: bool
    short_side: int | None
    quality: int

    def _work(self, number: int, suffix: str) -> Path:
        return self.partial / "work" / f"{self.split}-{number:06d}.{suffix}"

    def _shard(self, number: int) -> Path:
        return self.partial / "shards" / self._work(number, "tar").name

    def entry(self, number: int) -> dict[str, Any] | None:
        """The record of a finished shard, if its files exist."""
        tar = self._shard(number)
        try:
            entry = json.loads(self._work(number, "json").read_text())
            exists = tar.stat().st_size == entry["shard"]["bytes"] and tar.with_name(index_name(tar.name)).exists()
            return entry if exists and entry["plan"] == self.plan and isinstance(entry["rejected"], list) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _is_whole(self, number: int) -> bool:
        """Whether a shard is finished and its files are those that were recorded."""
        entry, tar = self.entry(number), self._shard(number)
        if entry is None:
            return False
        index = tar.with_name(index_name(tar.name)).read_bytes()
        if hashlib.sha256(index).hexdigest() != entry["shard"].get("index_sha256"):
            return False
        with open(tar, "rb") as file:
            hashed = HashedFile(file)
            hashed.drain()
        rows = np.load(io.BytesIO(index))
        return entry["shard"] == shard_entry(tar.name, rows, hashed.size, hashed.digest.hexdigest(), index)

    def write(self, number: int, items: list[Item], tally: Callable[[int], None], wait: bool = False) -> None:
        """Write a shard unless it is whole.

        Args:
            tally: called with the size of every image that was read, readable or not; may raise to stop.
            wait: for another process that is writing it; False leaves it to that process.

        Raises:
            OSError: it can't be written.
            UserError: the source is no longer there.
        """
        tar, rejected = self._work(number, "tar"), []
        index, entry = tar.with_name(index_name(tar.name)), self._work(number, "json.writing")
        with suppress(Timeout), FileLock(self._work(number, "lock"), timeout=-1 if wait else 0):
            if self._is_whole(number):
                for _ in items:
                    tally(0)
                return
            self._work(number, "json").unlink(missing_ok=True)
            try:
                shard = write_shard(tar.parent, tar.name, self._samples(items, rejected, tally))
                entry.write_text(json.dumps({"plan": self.plan, "shard": shard, "rejected": rejected}))
                for file in index, tar:
                    os.replace(file, self.partial / "shards" / file.name)
                os.replace(entry, self._work(number, "json"))  # last: it marks the shard as finished
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


def write_shards(
    writer: ShardWriter, tasks: list[tuple[int, list[Item]]], workers: int, title: str, wait: bool = False
) -> None:
    """Write the shards of `tasks`, (number, items) each, in several processes, with a progress bar.

    Args:
        wait: see `ShardWriter.write`.

    Raises:
        OSError: one can't be written.
        UserError: the source is no longer there, or a process was killed.
    """
    if not tasks:
        return
    workers = min(workers, len(tasks))
    with _progress(title, sum(len(items) for _, items in tasks)) as show:
        if workers > 1:
            _write_in_processes(writer, tasks, workers, show, wait)
            return
        done, size, shown = 0, 0, time.monotonic()

        def tally(image_bytes: int) -> None:
            nonlocal done, size, shown
            done, size = done + 1, size + image_bytes
            if time.monotonic() - shown > REFRESH_S:
                show(done, size)
                shown = time.monotonic()

        for number, items in tasks:
            writer.write(number, items, tally, wait)
        show(done, size)


def _write_in_processes(
    writer: ShardWriter,
    tasks: list[tuple[int, list[Item]]],
    workers: int,
    show: Callable[[int, int], None],
    wait_for_others: bool,
) -> None:
    # spawned everywhere, because a fork of a process that has threads may hang
    context = multiprocessing.get_context("spawn")
    shared = context.Array("q", 3)  # images, bytes, whether to stop
    with ProcessPoolExecutor(workers, context, _start_worker, (writer, shared)) as pool:
        try:
            with _interrupts_held_back():  # the workers inherit it: this process alone hears Ctrl-C, and tells them
                waiting = {pool.submit(_write_in_worker, *task, wait_for_others) for task in tasks}
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


def _write_in_worker(number: int, items: list[Item], wait: bool) -> None:
    writer, shared = _in_worker

    def tally(image_bytes: int) -> None:
        with shared.get_lock():
            shared[0] += 1
            shared[1] += image_bytes
            if shared[2]:
                raise _Stopped

    writer.write(number, items, tally, wait)


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
