"""Bounded disk cache of remote shards: verified, and fetched once for all processes of a machine.

    CACHE/files/<sha256>                  complete, verified files; the access time is that of the last use
    CACHE/files/<sha256>.<bytes>.partial  a file being fetched, or left by an interrupted fetch
    CACHE/leases/<id>.held                checksums that a live process is about to use; its lock ends with the process
    CACHE/copies/<id>                     a file that is read once; removed when the process that reads it has ended
    CACHE/indexes/<id>/                   indexes of sets in read-only locations
    CACHE/intact/<id>                     marks a version of a large file as compared with its checksum

Files are named by their content, so a changed set never meets cached files of its old version.
"""

import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from fsspec.spec import AbstractFileSystem

from ..common import UserError, file_sha256
from .remote import PERMANENT_ERRORS, RetryPolicy, SizeMismatch, download, is_local

DEFAULT_LIMIT_BYTES = 50 * 10**9
FETCH_ATTEMPTS = 3  # of a file that arrives damaged
FOLDERS = ("files", "leases", "locks", "copies")
CACHED_NAME = re.compile(r"([0-9a-f]{64})(?:\.(\d+)\.partial)?")  # names in files/
ID_NAME = re.compile("[0-9a-f]{32}")  # names in copies/ and leases/, without their suffixes
ALWAYS_HASHED_BYTES = 64 << 20
"""Up to this size a file is hashed on every use, in less than 0.1 s; an index of billions of samples takes minutes."""


class UnavailableFile(UserError):
    """The store lacks a file or holds other content under its name; this says nothing about its other files."""


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
        if status.st_size != size:
            return None
        with suppress(OSError):  # a file of another user in a shared cache
            # keep the modification time, by which `is_intact` recognizes the file
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return path

    def is_intact(self, file: Path, size: int, sha256: str) -> bool:
        """Whether a local file has this size and checksum.

        A small file is hashed every time. A large one is hashed once per version (path, inode, size, modification
        time), and a note in the cache saves later processes the work. Damage that changes none of these, for example by
        a failing disk, is detected when its samples are read.

        Raises:
            OSError: the file can't be read.
        """
        status = file.stat()
        if status.st_size != size:
            return False
        version = f"{file.resolve()}\0{status.st_ino}\0{size}\0{status.st_mtime_ns}\0{sha256}"
        note = self.folder / "intact" / hashlib.sha256(version.encode(errors="surrogateescape")).hexdigest()[:32]
        if size > ALWAYS_HASHED_BYTES and note.exists():
            return True
        intact = file_sha256(file) == sha256
        if intact and size > ALWAYS_HASHED_BYTES:
            with suppress(OSError):  # the next process hashes the file again
                note.parent.mkdir(parents=True, exist_ok=True)
                note.touch()
        return intact

    def drop_damaged(self, sha256: str) -> bool:
        """Remove a cached file whose content no longer matches its name; returns whether it is gone."""
        path = self.folder / "files" / sha256
        try:
            if file_sha256(path) == sha256:
                return False
        except FileNotFoundError:
            return True
        except OSError:  # the disk cannot read the damaged blocks
            pass
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return not path.exists()

    def fetch(
        self, fs: AbstractFileSystem, path: str, size: int, sha256: str, retry_policy: RetryPolicy | None = None
    ) -> Path | None:
        """Return the local copy of a remote file, fetching it if needed; None if live leases hold all the room.

        Args:
            fs, path: the remote file.
            size, sha256: its expected size in bytes and checksum.
            retry_policy: replaces that of the cache.

        Raises:
            UnavailableFile: the store has no such file, or another one.
            UserError: the store can't be reached, or the cache can't be written.
        """
        if not re.fullmatch("[0-9a-f]{64}", sha256):  # untrusted, and it becomes a file name
            raise UserError(f"dataset.json has no valid SHA-256 for {path}; run `python -m pipeline.shards index`.")
        target, retry_policy = self.folder / "files" / sha256, retry_policy or self.retry_policy
        if found := self.find(size, sha256):
            return found
        # few distinct lock files, since they stay; a process that waited for one usually finds the file fetched
        with self._locked(f"locks/{sha256[:3]}", retry_policy):
            if found := self.find(size, sha256):
                return found
            partial = target.with_name(f"{sha256}.{size}.partial")
            for _ in range(FETCH_ATTEMPTS):
                try:
                    if not self._make_room(partial, size):
                        return None
                except OSError as error:
                    raise self._unusable(error) from error
                try:
                    download(fs, path, partial, size, retry_policy)
                except UserError as error:
                    if isinstance(error.__cause__, SizeMismatch):
                        raise UnavailableFile(str(error)) from error
                    raise
                except PERMANENT_ERRORS as error:
                    raise UnavailableFile(f"{path} can't be read ({error}); copy it there again.") from error
                try:
                    digest = file_sha256(partial)
                    with open(partial, "r+b") as file:  # its final name must vouch for the content even after a crash
                        os.fsync(file.fileno())
                    with self._locked("lock"):  # no other process may be summing up the file sizes
                        if digest == sha256:
                            os.replace(partial, target)
                            return target
                        partial.unlink()
                except FileNotFoundError:  # somebody is emptying the cache
                    continue
                except OSError as error:
                    raise self._unusable(error) from error
        raise UnavailableFile(
            f"{path} does not match its checksum in dataset.json after {FETCH_ATTEMPTS} downloads; copy it there again "
            "or run `python -m pipeline.shards index`."
        )

    @contextmanager
    def whole_file(self, fs: AbstractFileSystem, path: str) -> Iterator[BinaryIO]:
        """Open a file to be read once. A remote one is downloaded with retries and deleted afterwards.

        Raises:
            FileNotFoundError, PermissionError, OSError: the file can't be read.
            UserError: as `download`; the cache can't be written.
        """
        if is_local(fs):
            with open(path, "rb") as file:
                yield file
            return
        copy = self.folder / "copies" / uuid.uuid4().hex
        alive = FileLock(copy.with_suffix(".lock"), thread_local=False)
        with self._locked("lock"):
            self._remove_dead_copies()
            alive.acquire()
        try:
            download(fs, path, copy, None, self.retry_policy)
            with open(copy, "rb") as file:
                yield file
        finally:
            copy.unlink(missing_ok=True)
            alive.release()
            Path(alive.lock_file).unlink(missing_ok=True)

    def index_folder(self, root: str) -> Path:
        """Folder for the index of a set in a read-only location."""
        return self.folder / "indexes" / hashlib.sha256(root.rstrip("/").encode()).hexdigest()[:32]

    @contextmanager
    def _locked(self, name: str, retry_policy: RetryPolicy | None = None) -> Iterator[None]:
        """Hold a lock among all processes and threads; waits until it is free or `retry_policy.stop` is set."""
        lock = FileLock(self.folder / f"{name}.lock", thread_local=False)
        try:
            for folder in FOLDERS:
                (self.folder / folder).mkdir(parents=True, exist_ok=True)
            lock.acquire(poll_interval=0.01, cancel_check=retry_policy and retry_policy.stop.is_set)
        except Timeout:
            raise UserError(f"Waiting for {lock.lock_file} was stopped.") from None
        except (OSError, NotImplementedError) as error:  # filelock raises the latter without support for locks
            raise self._unusable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"{self.folder} can't be used as a cache ({error}); set $STREAMCLR_CACHE to a folder that can be written."
        )

    def _make_room(self, partial: Path, size: int) -> bool:
        """Reserve room for a file by creating its `partial`; evicts the least recently used files without a lease."""
        with self._locked("lock"):
            self._remove_dead_copies()
            leased = self._leased()
            kept, evictable = 0, []
            for file in partial.parent.iterdir():
                match = CACHED_NAME.fullmatch(file.name)
                if not match or file == partial:  # ignore foreign files, such as .DS_Store or .nfs...
                    continue
                try:
                    status = file.stat()
                except FileNotFoundError:  # removed by hand
                    continue
                sha256, final_bytes = match.groups()
                bytes_ = int(final_bytes) if final_bytes else status.st_size
                if sha256 not in leased and not (final_bytes and _is_locked(self.folder / f"locks/{sha256[:3]}.lock")):
                    evictable.append((max(status.st_atime_ns, status.st_mtime_ns), bytes_, file))
                else:
                    kept += bytes_
            if kept + size > self.limit_bytes:
                return False  # evicting would not help
            total = kept + size + sum(bytes_ for _, bytes_, _ in evictable)
            for _, bytes_, file in sorted(evictable):
                if total > self.limit_bytes:
                    try:
                        file.unlink(missing_ok=True)
                        total -= bytes_
                    except OSError:  # not a file, or the system does not delete open files
                        continue
            if total <= self.limit_bytes:
                partial.touch()
            return total <= self.limit_bytes

    def _remove_dead_copies(self) -> None:
        """Remove the `copies` of processes that were killed; must be called under the lock."""
        for lock in (self.folder / "copies").glob("*.lock"):
            if ID_NAME.fullmatch(lock.stem) and not _is_locked(lock):
                lock.with_suffix("").unlink(missing_ok=True)
                lock.unlink(missing_ok=True)

    def _leased(self) -> set[str]:
        """Checksums in the leases of live processes; removes those of ended ones; must be called under the lock."""
        leased: set[str] = set()
        for path in (self.folder / "leases").glob("*.held"):
            if not ID_NAME.fullmatch(path.stem):
                continue
            lock = path.with_suffix(".lock")
            if _is_locked(lock):
                with suppress(FileNotFoundError):  # somebody is emptying the cache
                    leased |= set(path.read_text().split())
            else:
                path.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
        return leased


def _is_locked(path: Path) -> bool:
    """Whether a live process holds this lock file; True for one that can't be opened."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


class Lease:
    """Files that one reader is about to use, which no process evicts until `close` or the end of this process."""

    def __init__(self, cache: ShardCache):
        self.cache = cache
        self.path = cache.folder / "leases" / f"{uuid.uuid4().hex}.held"
        self._alive = FileLock(self.path.with_suffix(".lock"), thread_local=False)
        with cache._locked("lock"):
            self._alive.acquire()
            self.path.write_text("")

    def hold(self, checksums: Iterable[str]) -> None:
        """Replace the held files; the lock excludes a concurrent eviction."""
        with self.cache._locked("lock"):
            self.path.write_text("\n".join(checksums))

    def close(self) -> None:
        with self.cache._locked("lock"):
            self.path.unlink(missing_ok=True)
            self._alive.release()
            self.path.with_suffix(".lock").unlink(missing_ok=True)
