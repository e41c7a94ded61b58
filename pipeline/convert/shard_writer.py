"""Write the shards of a planned split with one or several workers; see `pipeline.convert.writer` for the plan.

A shard is moved into place by renames and its record is written last, so that a shard interrupted at any point is
written again. Several processes may write the same split because each of them writes only shards that it has locked.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock, Timeout

from ..common import UserError, file_sha256, progress_bar
from ..images.files import DecodeError
from ..images.pixel_format import PixelFormat, decode_pixels
from ..images.prepare import Prepared
from ..shards.format import Sample, index_name, shard_entry, write_shard
from ..shards.measure import channel_moments
from .base import Item

REFRESH_S = 0.2


class MixedFormats(Exception):
    """A shard would hold images of different formats."""


@dataclass(frozen=True)
class ShardWriter:
    """Write individual shards of a plan; pickled to run in worker processes."""

    read: Callable[..., bytes]
    """See `Source.read`."""
    prepare: Callable[[bytes], Prepared]
    """`pipeline.images.prepare.prepare` with its options."""
    labels: dict[str | None, int]
    partial: Path
    split: str
    plan: str
    """Digest of the plan; records of shards written under another plan are ignored."""
    measured: int
    """Number of images per shard, the first ones, whose colors are measured."""

    def _work(self, number: int, suffix: str) -> Path:
        return self.partial / "work" / f"{self.split}-{number:06d}.{suffix}"

    def _shard(self, number: int) -> tuple[Path, Path]:
        """Tar and index of a finished shard."""
        tar = self.partial / "shards" / self._work(number, "tar").name
        return tar, tar.with_name(index_name(tar.name))

    def entry(self, number: int) -> dict[str, Any] | None:
        """Record of a finished shard, or None if it or one of its files is missing."""
        tar, index = self._shard(number)
        try:
            entry = json.loads(self._work(number, "json").read_text())
            exists = tar.stat().st_size == entry["shard"]["bytes"] and index.exists()
            valid = exists and entry["plan"] == self.plan and isinstance(entry["rejected"], list)
            return entry if valid and isinstance(entry["moments"], list) and len(entry["pixels"]) <= 1 else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _is_intact(self, number: int) -> bool:
        """Whether a shard is finished and its files match their checksums."""
        entry, (tar, index) = self.entry(number), self._shard(number)
        if entry is None or file_sha256(index) != entry["shard"].get("index_sha256"):
            return False
        size, rows = tar.stat().st_size, np.load(index)
        return entry["shard"] == shard_entry(tar.name, rows, size, file_sha256(tar), index.read_bytes())

    def write(self, number: int, items: list[Item], tally: Callable[[int], None], wait: bool = False) -> None:
        """Write a shard unless it is complete.

        Args:
            number: position of the shard in the plan.
            items: its images.
            tally: called with the size in bytes of every image that was read, decodable or not; may raise to stop.
            wait: whether to wait for another process that is writing the shard; False leaves the shard to it.

        Raises:
            MixedFormats: its images have different formats.
            OSError: the shard cannot be written.
            UserError: the source has disappeared.
        """
        tar, rejected, moments, formats = self._work(number, "tar"), [], [], set()
        index, entry = tar.with_name(index_name(tar.name)), self._work(number, "json.writing")
        with suppress(Timeout), FileLock(self._work(number, "lock"), timeout=-1 if wait else 0):
            if self._is_intact(number):
                for _ in items:
                    tally(0)
                return
            self._work(number, "json").unlink(missing_ok=True)
            try:
                shard = write_shard(tar.parent, tar.name, self._samples(items, rejected, moments, formats, tally))
                record = {"plan": self.plan, "shard": shard, "rejected": rejected, "moments": moments}
                record["pixels"] = [pixel_format._asdict() for pixel_format in formats]
                entry.write_text(json.dumps(record))
                for file in index, tar:
                    os.replace(file, self.partial / "shards" / file.name)
                os.replace(entry, self._work(number, "json"))  # last, because it marks the shard as finished
            finally:
                with suppress(OSError):
                    for file in tar, index, entry:
                        file.unlink(missing_ok=True)

    def _samples(
        self,
        items: list[Item],
        rejected: list[tuple[str, str]],
        moments: list[list[float]],
        formats: set[PixelFormat],
        tally: Callable,
    ) -> Iterator[Sample]:
        for label, key, address in items:
            encoded = b""
            try:
                encoded = self.read(*address)
                form, stored, pixel_format = self.prepare(encoded)
            except (DecodeError, OSError) as error:
                rejected.append((key, str(error)))
            else:
                formats.add(pixel_format)
                if len(formats) > 1:
                    raise MixedFormats
                # a truncated image has no pixels; without verification it is stored all the same
                if len(moments) < self.measured and (pixels := decode_pixels(stored, pixel_format)) is not None:
                    moments.append(channel_moments(pixels))
                yield Sample(key, form, stored, self.labels[label])
            tally(len(encoded))


def write_shards(
    writer: ShardWriter,
    tasks: list[tuple[int, list[Item]]],
    workers: int,
    title: str,
    *,
    wait_for_others: bool = False,
    threads: bool = False,
) -> None:
    """Write shards with several workers and a progress bar.

    Args:
        writer: writes one shard.
        tasks: (number, items) of each shard.
        workers: number of processes; 1 uses a thread of the current process.
        title: text in front of the bar.
        wait_for_others: see `wait` in `ShardWriter.write`.
        threads: use threads of the current process instead, which works in programs that cannot be imported.

    Raises:
        MixedFormats: images of a shard have different formats.
        OSError: a shard cannot be written.
        UserError: the source has disappeared, or a process was killed.
    """
    if not tasks:
        return
    # spawned on every platform, because a forked copy of a process with threads may hang
    context = multiprocessing.get_context("spawn")
    shared = context.Array("q", 3)  # number of images, bytes, whether to stop
    workers = min(workers, len(tasks))
    if threads or workers == 1:
        pool = ThreadPoolExecutor(workers, initializer=_start_worker, initargs=(writer, shared))
    else:
        pool = ProcessPoolExecutor(workers, context, _start_process, (writer, shared))
    started, images = time.monotonic(), sum(len(items) for _, items in tasks)
    with pool, progress_bar(images, title, fields="{task.fields[rate]}", rate="") as update:
        try:
            with _interrupts_blocked():  # inherited by the workers: only this process handles Ctrl-C, and stops them
                waiting = {pool.submit(_write, *task, wait_for_others) for task in tasks}
            while waiting:
                done, waiting = wait(waiting, REFRESH_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                seconds, (count, size, _) = max(time.monotonic() - started, 1e-3), shared
                update(completed=count, rate=f"{count / seconds:,.0f} images/s {size / seconds / 1e6:,.0f} MB/s")
        except BaseException as error:
            shared[2] = 1
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "A worker process was killed, possibly because memory ran out; use fewer --workers."
                ) from error
            raise


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stopped(Exception):
    """The main process or another worker has asked the workers to stop."""


_worker = threading.local()
"""In a worker: its ShardWriter and the array shared with the main process."""


def _start_worker(writer: ShardWriter, shared: Any) -> None:
    _worker.writer, _worker.shared = writer, shared


def _start_process(writer: ShardWriter, shared: Any) -> None:
    _start_worker(writer, shared)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows, where the blocked signals are not inherited
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the main process has been killed; nothing else would stop the workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write(number: int, items: list[Item], wait: bool) -> None:
    def tally(image_bytes: int) -> None:
        with _worker.shared.get_lock():
            _worker.shared[0] += 1
            _worker.shared[1] += image_bytes
            if _worker.shared[2]:
                raise _Stopped

    if _worker.shared[2]:
        return
    try:
        _worker.writer.write(number, items, tally, wait)
    except _Stopped:
        pass  # the main process raises the error that stopped the workers
    except BaseException:
        _worker.shared[2] = 1
        raise
