"""Reader of encoded images from local or remote shards: one read per sample, at its offset in the index."""

import errno
import logging
import threading
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common import UserError
from .cache import Lease, ShardCache
from .dataset import ShardSet, lies_inside
from .remote import PERMANENT_ERRORS, RetryPolicy, UnavailableFile, filesystem, is_local, with_retries
from .threads import DaemonThreads, wait_for
from .web import RangesUnsupported

FETCH_THREADS, RANGE_THREADS = 8, 32
RETRY_WAITS_S = (0.1, 0.5, 2.0)

log = logging.getLogger(__name__)


class ReadFailure(NamedTuple):
    """Returned in place of the bytes of a sample that can't be read."""

    reason: str
    transient: bool = False
    """Whether a later read may succeed, because the disk or network file system failed rather than the file."""


class Reader:
    """Reads samples of a shard set by their index; any number of threads may call `read`.

    Local shards are opened once per call and closed again. Remote shards named by `prefetch` are fetched whole into the
    cache and read there; samples of other shards are read by parallel byte-range requests. Byte ranges also serve the
    intact samples of a shard whose checksum does not match the manifest, and samples that are damaged in the cache; the
    damaged copy is deleted and fetched again. If a server does not support byte ranges, shards are fetched whole.

    Args:
        shards: the set to read.
        cache: holds the fetched shards of a remote set.
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
        self._unavailable: set[int] = set()  # shards not worth fetching again
        self._fetches: dict[int, Future[Path | None]] = {}
        self._fetch_threads: DaemonThreads | None = None
        self._range_threads: DaemonThreads | None = None
        self._ranges_supported = True
        self._lease: Lease | None = None

    def prefetch(self, now: Iterable[int], ahead: Iterable[int] = ()) -> None:
        """Start fetching shards of a remote set, in this order, and hold them in the cache until the next call.

        Cheap if nothing has changed since the last call. Does nothing for a local set.

        Args:
            now: shards that the next reads need and wait for.
            ahead: shards needed later, fetched as far as the cache has room.

        Raises:
            UserError: on the first call, if the cache can't hold the shards in `now` or can't be written. Later, shards
                without room are read by byte ranges.
        """
        if self.local:
            return
        now = {int(shard): None for shard in now if shard not in self._unavailable}  # a set in order
        wanted = list(now | {int(shard): None for shard in ahead if shard not in self._unavailable})
        with self._lock:
            if wanted == self._wanted or set(wanted) == self._fetches.keys():
                return
            entries, limit = self.shards.manifest["shards"], self.cache.limit_bytes
            filled = np.cumsum([entries[shard]["bytes"] for shard in wanted], dtype=np.int64)
            if self._fetch_threads is None:
                if now and (needed := filled[len(now) - 1]) > limit:
                    raise UserError(
                        f"{len(now)} shards in use take {needed / 1e9:.3g} GB, more than the limit of the cache "
                        f"{self.cache.folder}, {limit / 1e9:.3g} GB; raise the limit or use smaller shards."
                    )
                self._retry_policy = replace(self.cache.retry_policy, stop=threading.Event())
                self._fetch_threads, self._lease = DaemonThreads(FETCH_THREADS, "fetch"), Lease(self.cache)
            held = wanted[: int(np.searchsorted(filled, limit, side="right"))]
            self._lease.hold([entries[shard]["sha256"] for shard in held])  # before looking for any of them
            fetches = {}
            for shard in held:
                fetch = self._fetches.get(shard)
                # retry a fetch that failed or found no room, since other readers may have released theirs
                if fetch is None or (fetch.done() and (fetch.exception() or fetch.result() is None)):
                    fetch = self._fetch_threads.submit(self._fetch, shard, self._retry_policy)
                fetches[shard] = fetch
            for abandoned in self._fetches.keys() - fetches.keys():
                self._fetches[abandoned].cancel()
            self._fetches, self._wanted = fetches, wanted

    def read(self, samples: np.ndarray, stop: threading.Event | None = None) -> list[bytes | ReadFailure]:
        """Read the encoded images of `samples`, in that order, and compare each with its checksum.

        Args:
            samples: (n,) integers, rows of the index.
            stop: set by another thread to end a read that waits for a remote store.

        Returns:
            n encoded images, with a `ReadFailure` in place of each one that is missing, truncated or altered.

        Raises:
            UserError: the remote store can't be reached, too many files are open, or `stop` was set.
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
            path = self.paths[shard] if self.local else self._cached(shard, retry_policy)
            if path is None:
                by_range += places
                continue
            for place, data in zip(places, self._read_file(path, shard, rows[places]), strict=True):
                encoded[place] = data
            if not self.local and (bad := [place for place in places if isinstance(encoded[place], ReadFailure)]):
                self._drop(shard)
                by_range += bad
        if by_range:
            with self._lock:
                if self._range_threads is None:
                    self._range_threads = DaemonThreads(RANGE_THREADS, "range")
                threads = self._range_threads
            requests = ((int(numbers[place]), rows[place], retry_policy) for place in by_range)
            for place, data in zip(by_range, threads.map(self._range, requests, retry_policy.stop), strict=True):
                encoded[place] = data
        return encoded

    def __call__(self, samples: np.ndarray) -> list[bytes]:
        """Like `read`, but fail on the first unreadable sample.

        Raises:
            UserError: a shard is missing, truncated or altered.
        """
        encoded = self.read(samples)
        for data in encoded:
            if isinstance(data, ReadFailure):
                raise UserError(f"{data.reason}; copy it again or convert the images again.")
        return encoded

    def close(self) -> None:
        """Stop fetching and release the shards held in the cache, which keeps them; does not wait for a server."""
        with self._lock:
            if self._fetch_threads is not None:
                self._retry_policy.stop.set()
                for fetch in self._fetches.values():
                    fetch.cancel()
                self._fetch_threads.close()
                self._lease.close()
                self._fetch_threads = self._lease = None
                self._retry_policy = self.cache.retry_policy
            if self._range_threads is not None:
                self._range_threads.close()
                self._range_threads = None
            self._fetches, self._wanted = {}, None

    def _read_file(self, path: str | Path, shard: int, rows: np.ndarray) -> list[bytes | ReadFailure]:
        """Read samples of one shard from its local file."""
        try:
            found = zip(_read_tar(path, rows), rows["size"].tolist(), rows["crc32"].tolist(), strict=True)
            return [self._checked(data, shard, size, crc32) for data, size, crc32 in found]
        except OSError as error:  # including an evicted file
            transient = not isinstance(error, PERMANENT_ERRORS)
            return [ReadFailure(f"A shard of {self.shards.root} can't be read ({error})", transient)] * len(rows)

    def _checked(self, data: bytes, shard: int, size: int, crc32: int) -> bytes | ReadFailure:
        """Return `data` if it has the size and checksum of its index row, else a `ReadFailure`."""
        if len(data) != size:
            return ReadFailure(f"{self.paths[shard]} is shorter than its index says")
        if zlib.crc32(data) != crc32:
            return ReadFailure(f"its bytes in {self.paths[shard]} do not match the checksum in the index")
        return data

    def _cached(self, shard: int, retry_policy: RetryPolicy) -> Path | None:
        """Path of the local copy of a remote shard, waiting while it is being fetched; None if there is no copy."""
        fetch = self._fetches.get(shard)
        try:
            if fetch is not None:
                return wait_for(fetch, retry_policy.stop)
        except CancelledError:  # another thread's `prefetch` no longer names it
            pass
        except UnavailableFile:
            return None
        entry = self.shards.manifest["shards"][shard]
        return self.cache.find(entry["bytes"], entry["sha256"])

    def _fetch(self, shard: int, retry_policy: RetryPolicy) -> Path | None:
        entry = self.shards.manifest["shards"][shard]
        try:
            return self.cache.fetch(self.fs, self.paths[shard], entry["bytes"], entry["sha256"], retry_policy)
        except UnavailableFile as error:
            self._unavailable.add(shard)
            log.warning("%s", error)
            raise

    def _drop(self, shard: int) -> None:
        """Remove a damaged shard from the cache, so that the next `prefetch` that names it fetches it again."""
        if self.cache.drop_damaged(self.shards.manifest["shards"][shard]["sha256"]):
            log.warning("%s is damaged in the cache %s and will be fetched again", self.paths[shard], self.cache.folder)
            with self._lock:
                self._fetches.pop(shard, None)
                self._wanted = None

    def _range(self, shard: int, row: np.void, retry_policy: RetryPolicy) -> bytes | ReadFailure:
        """Read one sample by a byte-range request, or from the whole shard if the server does not support them."""
        try:
            return self._checked(self._request(shard, row, retry_policy), shard, row["size"], row["crc32"])
        except PERMANENT_ERRORS as error:  # the store has no such file
            return ReadFailure(f"A shard of {self.shards.root} can't be read ({error})")

    def _request(self, shard: int, row: np.void, retry_policy: RetryPolicy) -> bytes:
        path, start, end = self.paths[shard], int(row["offset"]), int(row["offset"] + row["size"])
        if self._ranges_supported:
            try:
                return with_retries(lambda: self.fs.cat_file(path, start=start, end=end), path, retry_policy)
            except RangesUnsupported:
                self._ranges_supported = False
        # fetch the whole shard once, since every single sample would transfer that much
        with suppress(UnavailableFile, OSError):  # its checksum does not match, or it was evicted in the meantime
            if shard not in self._unavailable and (whole := self._fetch(shard, retry_policy)):
                return _read_tar(whole, row[None])[0]
        return with_retries(lambda: self.fs.cat_by_skipping(path, start, end), path, retry_policy)


def _read_tar(path: str | Path, rows: np.ndarray) -> list[bytes]:
    """Read the samples of these index rows, with retries for transient errors of network file systems."""
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            with open(path, "rb", buffering=0) as tar:  # unbuffered: a buffer would read past every sample
                found = []
                for offset, size in zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True):
                    tar.seek(offset)
                    found.append(tar.read(size))
                return found
        except PERMANENT_ERRORS:
            raise
        except OSError as error:
            if wait_s is not None:
                time.sleep(wait_s)
            elif error.errno in (errno.EMFILE, errno.ENFILE):  # not the shard's fault
                raise UserError(f"{path} can't be opened: too many open files; raise `ulimit -n`.") from error
            else:
                raise
