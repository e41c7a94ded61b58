"""Encoded bytes from shards, on the disk or elsewhere: one read per sample at the offset that the index gives."""

import errno
import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from errors import UserError
from pipeline.cache import Lease, LostFile, ShardCache
from pipeline.remote import FINAL, filesystem, is_local, persistently
from pipeline.shards import ShardSet

FETCHERS, RANGE_READERS = 8, 16  # threads that wait for the network
RETRY_WAITS_S = (0.1, 0.5, 2.0)

log = logging.getLogger(__name__)


class ReadFailure(NamedTuple):
    """In the place of a sample's bytes: why they can't be had."""

    reason: str
    passing: bool = False
    """It may be read another time: the disk or the network file system failed, not the file."""


class Reader:
    """Reads samples of a shard set by their index; any number of threads may call `read`.

    Local shards are opened once per call, and none stays open. Of a remote set, the shards that `prefetch` names are
    fetched whole into the cache and read there; samples of others are read by byte ranges, all of a call at once. Byte
    ranges also serve what is unharmed of a shard that is not the one of the manifest.

    Args:
        shards: what to read.
        cache: where shards of a remote set are kept.
    """

    def __init__(self, shards: ShardSet, cache: ShardCache | None = None):
        self.shards = shards
        self.cache = cache or ShardCache()
        self.fs, root = filesystem(shards.root, self.cache.patience)
        self.paths = [f"{root}/{shard['file']}" for shard in shards.manifest["shards"]]
        self.local = is_local(self.fs)
        self._patience = self.cache.patience
        self._lock = threading.Lock()
        self._wanted: list[int] | None = None
        self._lost: set[int] = set()  # shards that are not worth a further fetch
        self._fetches: dict[int, Future[Path | None]] = {}
        self._fetchers: _Fetchers | None = None
        self._lease: Lease | None = None

    def prefetch(self, now: Iterable[int], ahead: Iterable[int] = ()) -> None:
        """Begin to fetch shards of a remote set, in this order, and keep them in the cache until another call.

        Cheap if nothing has changed since the last call; does nothing for a local set.

        Args:
            now: shards that the next reads need, and wait for.
            ahead: those that come afterwards, fetched as far as the cache has room.

        Raises:
            UserError: on the first call, the cache can't hold the shards needed now; its folder can't be written. What
                finds no room later is read by ranges.
        """
        if self.local:
            return
        now, ahead = (np.asarray(shards, np.int64).tolist() for shards in (now, ahead))
        now = [shard for shard in now if shard not in self._lost]
        wanted = [shard for shard in dict.fromkeys([*now, *ahead]) if shard not in self._lost]
        with self._lock:
            if wanted == self._wanted or set(wanted) == self._fetches.keys():
                return
            entries, limit = self.shards.manifest["shards"], self.cache.limit_bytes
            filled = np.cumsum([entries[shard]["bytes"] for shard in wanted], dtype=np.int64)
            if self._fetchers is None:
                needed = int(filled[len(set(now)) - 1]) if now else 0
                if needed > limit:
                    raise UserError(
                        f"{len(set(now))} shards in use take {needed / 1e9:.3g} GB, more than the limit of the cache "
                        f"{self.cache.folder}, {limit / 1e9:.3g} GB: raise it or make smaller shards."
                    )
                self._patience = replace(self.cache.patience, stop=threading.Event())
                self._fetchers, self._lease = _Fetchers(), Lease(self.cache)
            held = wanted[: int(np.searchsorted(filled, limit, side="right"))]
            self._lease.hold([entries[shard]["sha256"] for shard in held])  # before any is looked for
            fetches = {}
            for shard in held:
                begun = self._fetches.pop(shard, None)
                # one that failed or found no room is tried anew: others may have let go of theirs
                usable = begun and not (begun.done() and (begun.exception() or begun.result() is None))
                fetches[shard] = begun if usable else self._fetchers.submit(self._fetch, shard)
            for abandoned in self._fetches.values():
                abandoned.cancel()
            self._fetches, self._wanted = fetches, wanted

    def read(self, samples: np.ndarray) -> list[bytes | ReadFailure]:
        """The encoded images of `samples` ((n,) integers), in that order, each with the checksum that its index gives.

        A sample that is missing, cut short or altered is a `ReadFailure` in its place and spoils no other.

        Raises:
            UserError: a remote set can't be reached any more, or too many files are open.
        """
        encoded = self._read(samples)
        checksums = self.shards.index["crc32"][samples].tolist()
        for place, (data, checksum) in enumerate(zip(encoded, checksums, strict=True)):
            if isinstance(data, bytes) and zlib.crc32(data) != checksum:
                encoded[place] = ReadFailure(f"its bytes in {self._path_of(samples[place])} are not those of the index")
        return encoded

    def __call__(self, samples: np.ndarray) -> list[bytes]:
        """As `read`, but without looking at checksums.

        Raises:
            UserError: a shard is missing or shorter than its index says.
        """
        encoded = self._read(samples)
        for data in encoded:
            if isinstance(data, ReadFailure):
                raise UserError(f"{data.reason}: copy it again or convert the images anew.")
        return encoded

    def close(self) -> None:
        """End the fetching and let go of the shards in the cache; they stay there."""
        with self._lock:
            if self._fetchers is not None:
                self._patience.stop.set()
                for fetch in self._fetches.values():
                    fetch.cancel()
                self._fetchers.close()
                self._lease.close()
                self._fetchers = self._lease = None
                self._patience = self.cache.patience
            self._fetches, self._wanted = {}, None

    def _path_of(self, sample: int) -> str:
        return self.paths[int(np.searchsorted(self.shards.shard_starts, sample, side="right")) - 1]

    def _read(self, samples: np.ndarray) -> list[bytes | ReadFailure]:
        rows = self.shards.index[samples]
        numbers = np.searchsorted(self.shards.shard_starts, samples, side="right") - 1
        encoded: list[bytes | ReadFailure] = [b""] * len(numbers)
        elsewhere = []
        for shard in np.unique(numbers):
            places = np.flatnonzero(numbers == shard)
            path = self.paths[shard] if self.local else self._cached(int(shard))
            try:
                if path is None:
                    raise FileNotFoundError
                for place, data in zip(places, _read_tar(path, rows[places]), strict=True):
                    encoded[place] = data
            except OSError as error:
                if self.local:
                    passing = not isinstance(error, FINAL)
                    failure = ReadFailure(f"A shard of {self.shards.root} can't be read ({error})", passing)
                    for place in places:
                        encoded[place] = failure
                else:  # not in the cache, or evicted from it
                    elsewhere += places.tolist()
        if elsewhere:
            with ThreadPoolExecutor(min(len(elsewhere), RANGE_READERS), "range") as pool:
                ranges = pool.map(lambda place: self._range(numbers[place], rows[place]), elsewhere)
                for place, data in zip(elsewhere, ranges, strict=True):
                    encoded[place] = data
        for place, data in enumerate(encoded):
            if isinstance(data, bytes) and len(data) != rows["size"][place]:
                encoded[place] = ReadFailure(f"{self.paths[numbers[place]]} is shorter than its index says")
        return encoded

    def _cached(self, shard: int) -> Path | None:
        """The local copy of a remote shard, waited for if it is on its way; None if there is none."""
        fetch = self._fetches.get(shard)
        try:
            if fetch is not None:
                return fetch.result()
        except CancelledError:  # no longer wanted by others
            pass
        except LostFile:
            return None
        entry = self.shards.manifest["shards"][shard]
        return self.cache.find(entry["bytes"], entry["sha256"])

    def _fetch(self, shard: int) -> Path | None:
        entry = self.shards.manifest["shards"][shard]
        try:
            return self.cache.fetch(self.fs, self.paths[shard], entry["bytes"], entry["sha256"], self._patience)
        except LostFile as error:
            self._lost.add(shard)
            log.warning("%s", error)
            raise

    def _range(self, shard: int, row: np.void) -> bytes | ReadFailure:
        path, start = self.paths[shard], int(row["offset"])
        end = start + int(row["size"])
        try:
            return persistently(lambda: self.fs.cat_file(path, start=start, end=end), path, self._patience)
        except OSError as error:  # the store has no such file
            return ReadFailure(f"A shard of {self.shards.root} can't be read ({error})")


def _read_tar(path: str | Path, rows: np.ndarray) -> list[bytes]:
    """The samples of these rows; tried again for some seconds after an error that network file systems get over.

    Raises:
        FileNotFoundError, PermissionError, OSError: it can't be read.
        UserError: this process or the machine has too many files open.
    """
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            return _read_tar_once(path, rows)
        except FINAL:
            raise
        except OSError as error:
            if wait_s is None and error.errno in (errno.EMFILE, errno.ENFILE):  # which says nothing about the shard
                raise UserError(f"{path} can't be opened, too many files are open: raise `ulimit -n`.") from error
            if wait_s is None:
                raise
        time.sleep(wait_s)


def _read_tar_once(path: str | Path, rows: np.ndarray) -> list[bytes]:
    encoded = []
    with open(path, "rb", buffering=0) as tar:  # a buffer would read past every sample
        for offset, size in zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True):
            tar.seek(offset)
            encoded.append(tar.read(size))
    return encoded


class _Fetchers:
    """Threads that a process does not wait for when it ends, as it would for those of an executor."""

    def __init__(self):
        self._tasks: SimpleQueue = SimpleQueue()
        for _ in range(FETCHERS):
            threading.Thread(target=self._work, args=(self._tasks,), name="fetch", daemon=True).start()

    def submit(self, function: Callable[[int], Path | None], shard: int) -> Future[Path | None]:
        future: Future[Path | None] = Future()
        self._tasks.put((future, function, shard))
        return future

    def close(self) -> None:
        """Each thread ends after what it is at; those that are waiting, at once."""
        for _ in range(FETCHERS):
            self._tasks.put(None)

    @staticmethod
    def _work(tasks: SimpleQueue) -> None:
        while task := tasks.get():
            future, function, shard = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(shard))
                except BaseException as error:  # for whoever asks for the result
                    future.set_exception(error)
            del task, future, function  # which would keep the reader alive
