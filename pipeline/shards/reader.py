"""Encoded bytes from shards, on the disk or elsewhere: one read per sample at the offset that the index gives."""

import errno
import logging
import threading
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common import UserError
from .cache import Lease, LostFile, ShardCache
from .dataset import ShardSet, lies_inside
from .remote import FINAL, DaemonThreads, NoRanges, RetryPolicy, filesystem, is_local, persistently, result

FETCHERS, RANGE_READERS = 8, 32  # threads that wait for the network
RETRY_WAITS_S = (0.1, 0.5, 2.0)

log = logging.getLogger(__name__)


class ReadFailure(NamedTuple):
    """In the place of a sample's bytes: why they can't be had."""

    reason: str
    transient: bool = False
    """It may be read another time: the disk or the network file system failed, not the file."""


class Reader:
    """Reads samples of a shard set by their index; any number of threads may call `read`.

    Local shards are opened once per call, and none stays open. Of a remote set, the shards that `prefetch` names are
    fetched whole into the cache and read there; samples of others are read by byte ranges, all of a call at once. Byte
    ranges also serve what is unharmed of a shard that is not the one of the manifest, and the samples that are damaged
    in the cache, whose copy of the shard is then removed and fetched again. From a server without byte ranges, shards
    are fetched whole into the cache instead.

    Args:
        shards: what to read.
        cache: where shards of a remote set are kept.
    """

    def __init__(self, shards: ShardSet, cache: ShardCache | None = None):
        self.shards = shards
        self.cache = cache or ShardCache()
        self.fs, root = filesystem(shards.root, self.cache.retry_policy)
        self.paths = [f"{root}/{shard['file']}" for shard in shards.manifest["shards"]]
        self.local = is_local(self.fs)
        self._retry_policy = self.cache.retry_policy
        self._lock = threading.Lock()
        self._wanted: list[int] | None = None
        self._lost: set[int] = set()  # shards that are not worth a further fetch
        self._fetches: dict[int, Future[Path | None]] = {}
        self._fetchers: DaemonThreads | None = None
        self._range_readers: DaemonThreads | None = None
        self._ranges = True
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
                self._retry_policy = replace(self.cache.retry_policy, stop=threading.Event())
                self._fetchers, self._lease = DaemonThreads(FETCHERS, "fetch"), Lease(self.cache)
            held = wanted[: int(np.searchsorted(filled, limit, side="right"))]
            self._lease.hold([entries[shard]["sha256"] for shard in held])  # before any is looked for
            fetches = {}
            for shard in held:
                begun = self._fetches.pop(shard, None)
                # one that failed or found no room is tried anew: others may have let go of theirs
                usable = begun and not (begun.done() and (begun.exception() or begun.result() is None))
                fetches[shard] = begun if usable else self._fetchers.submit(self._fetch, shard, self._retry_policy)
            for abandoned in self._fetches.values():
                abandoned.cancel()
            self._fetches, self._wanted = fetches, wanted

    def read(self, samples: np.ndarray, stop: threading.Event | None = None) -> list[bytes | ReadFailure]:
        """The encoded images of `samples` ((n,) integers), in that order, each with the checksum that its index gives.

        A sample that is missing, cut short or altered is a `ReadFailure` in its place and spoils no other.

        Args:
            stop: set by another thread to end a read that waits for a remote store.

        Raises:
            UserError: a remote set can't be reached any more, too many files are open, or `stop` was set.
        """
        retry_policy = replace(self.cache.retry_policy, stop=stop or threading.Event())
        rows = self.shards.index[samples]
        numbers = np.searchsorted(self.shards.shard_starts, samples, side="right") - 1
        encoded: list[bytes | ReadFailure] = [b""] * len(numbers)
        by_range: list[int] = []
        for shard in np.unique(numbers).tolist():
            inside = lies_inside(rows, self.shards.manifest["shards"][shard]["bytes"])
            for place in np.flatnonzero((numbers == shard) & ~inside).tolist():
                encoded[place] = ReadFailure(f"its row in the index of {self.paths[shard]} is damaged")
            places = np.flatnonzero((numbers == shard) & inside).tolist()
            if self.local:
                self._read_local(shard, rows, places, encoded)
            else:
                by_range += self._read_cached(shard, rows, places, encoded, retry_policy)
        if by_range:
            self._read_ranges(numbers, rows, by_range, encoded, retry_policy)
        return encoded

    def __call__(self, samples: np.ndarray) -> list[bytes]:
        """As `read`, for samples that must all be sound.

        Raises:
            UserError: a shard is missing, shorter than its index says, or altered.
        """
        encoded = self.read(samples)
        for data in encoded:
            if isinstance(data, ReadFailure):
                raise UserError(f"{data.reason}: copy it again or convert the images again.")
        return encoded

    def close(self) -> None:
        """Stop fetching and release the shards in the cache; they stay there. Waits for no server."""
        with self._lock:
            if self._fetchers is not None:
                self._retry_policy.stop.set()
                for fetch in self._fetches.values():
                    fetch.cancel()
                self._fetchers.close()
                self._lease.close()
                self._fetchers = self._lease = None
                self._retry_policy = self.cache.retry_policy
            if self._range_readers is not None:
                self._range_readers.close()
                self._range_readers = None
            self._fetches, self._wanted = {}, None

    def _read_local(self, shard: int, rows: np.ndarray, places: list[int], encoded: list) -> None:
        """Fill in `encoded` at `places`, whose samples are in this shard."""
        try:
            found = _read_tar(self.paths[shard], rows[places])
        except OSError as error:
            failure = ReadFailure(
                f"A shard of {self.shards.root} can't be read ({error})", not isinstance(error, FINAL)
            )
            found = [failure] * len(places)
        for place, data in zip(places, found, strict=True):
            encoded[place] = self._checked(data, shard, rows[place])

    def _read_cached(
        self, shard: int, rows: np.ndarray, places: list[int], encoded: list, retry_policy: RetryPolicy
    ) -> list:
        """Fill in `encoded` from the cache; those of `places` whose samples are not there, or damaged."""
        path = self._cached(shard, retry_policy)
        if path is None:
            return places
        try:
            found = _read_tar(path, rows[places])
        except OSError:  # evicted or removed, or the disk fails
            found = [b""] * len(places)
        bad = []
        for place, data in zip(places, found, strict=True):
            encoded[place] = self._checked(data, shard, rows[place])
            if isinstance(encoded[place], ReadFailure):
                bad.append(place)
        if bad:
            self._drop(shard)
        return bad

    def _read_ranges(
        self, numbers: np.ndarray, rows: np.ndarray, places: list[int], encoded: list, retry_policy: RetryPolicy
    ) -> None:
        """Fill in `encoded` at `places` from the store, by requests at the same time."""
        with self._lock:
            if self._range_readers is None:
                self._range_readers = DaemonThreads(RANGE_READERS, "range")
            submit = self._range_readers.submit
        requests = [submit(self._range, int(numbers[place]), rows[place], retry_policy) for place in places]
        try:
            for place, request in zip(places, requests, strict=True):
                encoded[place] = self._checked(result(request, retry_policy.stop), int(numbers[place]), rows[place])
        finally:
            for request in requests:
                request.cancel()

    def _checked(self, data: bytes | ReadFailure, shard: int, row: np.void) -> bytes | ReadFailure:
        if isinstance(data, ReadFailure):
            return data
        if len(data) != row["size"]:
            return ReadFailure(f"{self.paths[shard]} is shorter than its index says")
        if zlib.crc32(data) != row["crc32"]:
            return ReadFailure(f"its bytes in {self.paths[shard]} are not those of the index")
        return data

    def _cached(self, shard: int, retry_policy: RetryPolicy) -> Path | None:
        """The local copy of a remote shard; waits while it is being fetched. None if there is none."""
        fetch = self._fetches.get(shard)
        try:
            if fetch is not None:
                return result(fetch, retry_policy.stop)
        except CancelledError:  # no longer wanted by others
            pass
        except LostFile:
            return None
        entry = self.shards.manifest["shards"][shard]
        return self.cache.find(entry["bytes"], entry["sha256"])

    def _fetch(self, shard: int, retry_policy: RetryPolicy) -> Path | None:
        entry = self.shards.manifest["shards"][shard]
        try:
            return self.cache.fetch(self.fs, self.paths[shard], entry["bytes"], entry["sha256"], retry_policy)
        except LostFile as error:
            self._lost.add(shard)
            log.warning("%s", error)
            raise

    def _drop(self, shard: int) -> None:
        """Remove a damaged shard from the cache; the next call of `prefetch` fetches it again if it is still wanted."""
        if self.cache.drop_damaged(self.shards.manifest["shards"][shard]["sha256"]):
            log.warning(
                "%s is damaged or gone in the cache %s and is fetched again", self.paths[shard], self.cache.folder
            )
            with self._lock:
                self._fetches.pop(shard, None)
                self._wanted = None

    def _range(self, shard: int, row: np.void, retry_policy: RetryPolicy) -> bytes | ReadFailure:
        path, start = self.paths[shard], int(row["offset"])
        end = start + int(row["size"])
        try:
            if self._ranges:
                try:
                    return persistently(lambda: self.fs.cat_file(path, start=start, end=end), path, retry_policy)
                except NoRanges:
                    self._ranges = False
            try:  # every range would cost the bytes of the whole shard
                whole = None if shard in self._lost else self._fetch(shard, retry_policy)
                if whole is not None:
                    return _read_tar(whole, row[None])[0]
            except (LostFile, OSError):  # not the file of the manifest; or evicted in the meantime
                pass
            return persistently(lambda: self.fs.cat_past(path, start, end), path, retry_policy)
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
