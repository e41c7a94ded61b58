"""Bounded disk cache of remote shards: verified, and fetched once for all processes of a machine.

    CACHE/files/<sha256>                  complete, verified files; the access time is that of the last use
    CACHE/files/<sha256>.<bytes>.partial  a file being fetched, or left by an interrupted fetch
    CACHE/leases/<id>.held                checksums that a live process is about to use; its lock ends with the process
    CACHE/indexes/<id>/                   indexes of sets in read-only locations
    CACHE/intact/<id>                     marks a version of a large file as compared with its checksum

Files are named by their content, so a changed set never meets cached files of its old version.
"""

import hashlib
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from fsspec.spec import AbstractFileSystem

from ..common import PIPELINE, UserError, file_sha256
from .remote import PERMANENT_ERRORS, RetryPolicy, UnavailableFile, disk_errors, download, is_local

DEFAULT_LIMIT_BYTES = 50 * 10**9
FETCH_ATTEMPTS = 3  # of a file that arrives damaged
FOLDERS = ("files", "leases", "locks")
SHA256 = re.compile("[0-9a-f]{64}")
CACHED_NAME = re.compile(rf"({SHA256.pattern})(?:\.(\d+)\.partial)?")  # names in files/
LEASE_NAME = re.compile(r"[0-9a-f]{32}\.held")
ALWAYS_HASHED_BYTES = 64 << 20
"""Up to this size a file is hashed on every use, in less than 0.1 s; an index of billions of samples takes minutes."""


class ShardCache:
    """A folder of remote files with a size limit and least-recently-used eviction, shared by any number of processes.

    Args:
        folder: default $STREAMCLR_CACHE, else ~/.cache/streamclr.
        limit_bytes: maximum size of all files together, including those being fetched.
        retry_policy: for failing connections.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        retry_policy: RetryPolicy | None = None,
    ):
        self.folder = Path(folder or os.environ.get("STREAMCLR_CACHE") or "~/.cache/streamclr").expanduser()
        self.limit_bytes = limit_bytes
        self.retry_policy = retry_policy or RetryPolicy()

    def find(self, size: int, sha256: str) -> Path | None:
        """Path of a cached file, marked as used; None if it is not in the cache."""
        path = self.folder / "files" / sha256
        try:
            status = path.stat()
        except OSError:
            return None
        with suppress(OSError):  # a file of another user in a shared cache
            # keep the modification time, by which `is_intact` recognizes the file
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return path if status.st_size == size else None

    def is_intact(self, file: Path, size: int, sha256: str) -> bool:
        """Whether a local file has this size and checksum.

        A small file is hashed every time. A large one is hashed once per version (path, inode, size, modification
        time), and a note in the cache saves later processes the work. Damage that changes none of these, for example by
        a failing disk, is detected when its samples are read.

        Raises:
            OSError: the file can't be read.
        """
        status = file.stat()
        version = f"{file.resolve()}\0{status.st_ino}\0{size}\0{status.st_mtime_ns}\0{sha256}"
        note = self.folder / "intact" / _short_id(version)
        if status.st_size == size > ALWAYS_HASHED_BYTES and note.exists():
            return True
        intact = status.st_size == size and file_sha256(file) == sha256
        if intact and size > ALWAYS_HASHED_BYTES:
            with suppress(OSError):  # the next process hashes the file again
                note.parent.mkdir(parents=True, exist_ok=True)
                note.touch()
        return intact

    def drop_damaged(self, sha256: str) -> bool:
        """Remove a cached file whose content no longer matches its name; returns whether it is gone."""
        path = self.folder / "files" / sha256
        with suppress(OSError):  # missing, or the disk cannot read the damaged blocks
            if file_sha256(path) == sha256:
                return False
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return not path.exists()

    def fetch(
        self, fs: AbstractFileSystem, path: str, size: int, sha256: str, retry_policy: RetryPolicy | None = None
    ) -> Path | None:
        """Return the local copy of a remote file, fetching it if needed; None if live leases hold all the room.

        Args:
            size, sha256: expected size in bytes and checksum.
            retry_policy: replaces that of the cache.

        Raises:
            UnavailableFile: the store has no such file, or another one.
            UserError: the store can't be reached, or the cache can't be written.
        """
        if not SHA256.fullmatch(sha256):  # untrusted, and it becomes a file name
            raise UserError(f"dataset.json has no valid SHA-256 for {path}; run `python -m {PIPELINE}.shards index`.")
        retry_policy = retry_policy or self.retry_policy
        if found := self.find(size, sha256):
            return found
        partial = self.folder / "files" / f"{sha256}.{size}.partial"
        # few distinct lock files, since they stay; a process that waited for one usually finds the file fetched
        with self._locked(f"locks/{sha256[:3]}", retry_policy):
            if found := self.find(size, sha256):
                return found
            for _ in range(FETCH_ATTEMPTS):
                with disk_errors(self.folder), suppress(FileNotFoundError):  # somebody is emptying the cache
                    if not self._make_room(partial, size):
                        return None
                    with open(partial, "ab", buffering=0) as out:
                        try:
                            download(fs, path, out, size, retry_policy, self.folder)
                        except PERMANENT_ERRORS as error:
                            raise UnavailableFile(f"{path} can't be read ({error}); copy it there again.") from error
                        os.fsync(out.fileno())  # its final name must vouch for the content even after a crash
                    intact = file_sha256(partial) == sha256
                    with self._locked("lock"):  # no other process may be summing up the file sizes
                        if intact:
                            return partial.replace(partial.with_name(sha256))
                        partial.unlink()
        raise UnavailableFile(
            f"{path} does not match its checksum in dataset.json after {FETCH_ATTEMPTS} downloads; copy it there again "
            f"or run `python -m {PIPELINE}.shards index`."
        )

    @contextmanager
    def whole_file(self, fs: AbstractFileSystem, path: str) -> Iterator[BinaryIO]:
        """Open a file to be read once. A remote one is downloaded with retries to a file without a name.

        Raises:
            FileNotFoundError, PermissionError, OSError: the file can't be read.
            UserError: as `download`; the cache can't be written.
        """
        if is_local(fs):
            with open(path, "rb") as file:
                yield file
            return
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            copy = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 - closed below
        with copy:
            download(fs, path, copy, None, self.retry_policy, self.folder)
            copy.seek(0)
            yield copy

    def index_folder(self, root: str) -> Path:
        """Folder for the index of a set in a read-only location."""
        return self.folder / "indexes" / _short_id(root.rstrip("/"))

    @contextmanager
    def _locked(self, name: str, retry_policy: RetryPolicy | None = None) -> Iterator[None]:
        """Hold a lock among all processes and threads; waits until it is free or `retry_policy.stop` is set."""
        lock = FileLock(self.folder / f"{name}.lock", thread_local=False)
        with disk_errors(self.folder):
            for folder in FOLDERS:
                (self.folder / folder).mkdir(parents=True, exist_ok=True)
            try:
                held = lock.acquire(poll_interval=0.01, cancel_check=retry_policy and retry_policy.stop.is_set)
            except Timeout:
                raise UserError(f"Waiting for {lock.lock_file} was stopped.") from None
        with held:
            yield

    def _make_room(self, partial: Path, size: int) -> bool:
        """Reserve room for a file by creating its `partial`; evicts the least recently used files without a lease."""
        with self._locked("lock"):
            leased, kept, evictable = self._leased(), 0, []
            for file in partial.parent.iterdir():
                match = CACHED_NAME.fullmatch(file.name)
                if not match or file == partial:  # ignore foreign files, such as .DS_Store or .nfs...
                    continue
                with suppress(FileNotFoundError):  # removed by hand
                    status, (sha256, final_bytes) = file.stat(), match.groups()
                    bytes_ = int(final_bytes) if final_bytes else status.st_size
                    fetching = final_bytes and _is_locked(self.folder / f"locks/{sha256[:3]}.lock")
                    if sha256 in leased or fetching:
                        kept += bytes_
                    else:
                        evictable.append((max(status.st_atime_ns, status.st_mtime_ns), bytes_, file))
            if kept + size > self.limit_bytes:
                return False  # evicting would not help
            excess = kept + size + sum(bytes_ for _, bytes_, _ in evictable) - self.limit_bytes
            for _, bytes_, file in sorted(evictable):
                if excess > 0:
                    with suppress(OSError):  # not a file, or the system does not delete open files
                        file.unlink(missing_ok=True)
                        excess -= bytes_
            if excess <= 0:
                partial.touch()
            return excess <= 0

    def leased(self) -> set[str]:
        """What the leases of live processes hold."""
        with self._locked("lock"):
            return self._leased()

    def _leased(self) -> set[str]:
        """Checksums in the leases of live processes; removes those of ended ones; must be called under the lock."""
        leased: set[str] = set()
        for path in (self.folder / "leases").iterdir():
            if LEASE_NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):  # somebody is emptying the cache
                    if _is_locked(path.with_suffix(".lock")):
                        leased |= set(path.read_text().split())
                    else:
                        path.unlink()
                        path.with_suffix(".lock").unlink()
        return leased


def _short_id(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def _is_locked(path: Path) -> bool:
    """Whether a live process holds this lock file; True for one that can't be opened."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except OSError:  # filelock's Timeout is one
        return True
    lock.release()
    return False


class Lease:
    """Files that one reader is about to use, which no process evicts until `close` or the end of this process."""

    def __init__(self, cache: ShardCache):
        self.cache = cache
        self.path = cache.folder / "leases" / f"{uuid.uuid4().hex}.held"
        self._alive = FileLock(self.path.with_suffix(".lock"), thread_local=False)
        with cache._locked("lock"), disk_errors(cache.folder):
            self._alive.acquire()
            self.path.write_text("")

    def hold(self, checksums: Iterable[str]) -> None:
        """Replace the held files; the lock excludes a concurrent eviction."""
        with self.cache._locked("lock"), disk_errors(self.cache.folder):
            self.path.write_text("\n".join(checksums))

    def close(self) -> None:
        with self.cache._locked("lock"):
            self.path.unlink(missing_ok=True)
            self._alive.release()
            self.path.with_suffix(".lock").unlink(missing_ok=True)
