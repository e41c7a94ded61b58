"""Shards of remote sets on the local disk: bounded, verified, fetched once for all processes of a machine.

    CACHE/files/<sha256>                  whole, verified files; the time of access is that of the last use
    CACHE/files/<sha256>.<bytes>.partial  one that is being fetched, or the fetch of which was interrupted
    CACHE/leases/<id>                     what a live process is about to use; the lock beside it ends with the process
    CACHE/copies/<id>                     one that is read once; goes as soon as the process that reads it has ended
    CACHE/indexes/<id>/                   indexes of sets that can't be written to
    CACHE/intact/<id>                     notes that a large file, as it is now, has been compared with its checksum

A file is named by its content, so a set that was changed never meets what was cached of the old one.
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

from ..common import UserError
from .remote import FINAL, RetryPolicy, WrongSize, download, is_local

DEFAULT_LIMIT_BYTES = 50 * 10**9
FETCHES = 3  # of a file that arrives damaged
FOLDERS = ("files", "leases", "locks", "copies")
CACHED = re.compile(r"([0-9a-f]{64})(?:\.(\d+)\.partial)?")  # names in files/
OWN = re.compile("[0-9a-f]{32}")  # names in copies/ and leases/, without their endings
HASHED_EACH_TIME_BYTES = 64 << 20
"""SHA-256 takes less than 0.1 s for a file of this size, and minutes for an index of billions of samples."""


class LostFile(UserError):
    """A file that its store has not, or has with other bytes; says nothing about the other files."""


class ShardCache:
    """A bounded folder of files from elsewhere, least recently used out first; any number of processes may share it.

    Args:
        folder: default $STREAMCLR_CACHE, else ~/.cache/streamclr.
        limit_bytes: of all files together, those being fetched included.
        patience: with connections that fail.
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
        """A file that is here already; marks it as used."""
        path = self.folder / "files" / sha256
        try:
            status = path.stat()
        except OSError:
            return None
        if status.st_size != size:
            return None
        with suppress(OSError):  # a file of another user in a shared cache
            # the time of change stays, so that `is_intact` knows the file again
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return path

    def is_intact(self, file: Path, size: int, sha256: str) -> bool:
        """Whether a local file has this size and checksum.

        A small file is read every time. A large one is read once per version of it (path, inode, size, time of change),
        and a note in the cache saves the processes that follow the work. A file that changes later without changing any
        of these, by a failing disk say, is noticed where its samples are read.

        Raises:
            OSError: the file can't be read.
        """
        status = file.stat()
        if status.st_size != size:
            return False
        version = f"{file.resolve()}\0{status.st_ino}\0{size}\0{status.st_mtime_ns}\0{sha256}"
        note = self.folder / "intact" / hashlib.sha256(version.encode(errors="surrogateescape")).hexdigest()[:32]
        if size > HASHED_EACH_TIME_BYTES and note.exists():
            return True
        intact = _sha256(file) == sha256
        if intact and size > HASHED_EACH_TIME_BYTES:
            with suppress(OSError):  # then the next process reads it again
                note.parent.mkdir(parents=True, exist_ok=True)
                note.touch()
        return intact

    def drop_damaged(self, sha256: str) -> bool:
        """Remove a cached file that is no longer the one of this checksum; whether it is gone."""
        path = self.folder / "files" / sha256
        try:
            if _sha256(path) == sha256:
                return False
        except FileNotFoundError:
            return True
        except OSError:  # the disk does not even return what is damaged
            pass
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return not path.exists()

    def fetch(
        self, fs: AbstractFileSystem, path: str, size: int, sha256: str, retry_policy: RetryPolicy | None = None
    ) -> Path | None:
        """The local copy of a file, fetched if it is not here yet; None if all the room is held by live leases.

        Args:
            patience: another than that of the cache.

        Raises:
            LostFile: it is not there, or not the file of this checksum.
            UserError: the store can't be reached any more; the folder can't be written.
        """
        if not re.fullmatch("[0-9a-f]{64}", sha256):  # it comes from elsewhere and becomes the name of a file here
            raise UserError(f"dataset.json gives no SHA-256 for {path}: make the index anew.")
        target, retry_policy = self.folder / "files" / sha256, retry_policy or self.retry_policy
        if found := self.find(size, sha256):
            return found
        # so few locks can be left lying; who has waited for one finds the file fetched
        with self._locked(f"locks/{sha256[:3]}", retry_policy):
            if found := self.find(size, sha256):
                return found
            partial = target.with_name(f"{sha256}.{size}.partial")
            for _ in range(FETCHES):
                try:
                    if not self._make_room(partial, size):
                        return None
                except OSError as error:
                    raise self._unusable(error) from error
                try:
                    download(fs, path, partial, size, retry_policy)
                except UserError as error:
                    if isinstance(error.__cause__, WrongSize):  # at the last attempt, too
                        raise LostFile(str(error)) from error
                    raise
                except FINAL as error:
                    raise LostFile(f"{path} can't be read ({error}): copy it there again.") from error
                try:
                    with open(partial, "r+b") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                        os.fsync(file.fileno())  # before it gets its name, which vouches for it even after a crash
                    with self._locked("lock"):  # while nobody is adding up the files
                        if digest == sha256:
                            os.replace(partial, target)
                            return target
                        partial.unlink()
                except FileNotFoundError:  # somebody is emptying the cache
                    continue
                except OSError as error:
                    raise self._unusable(error) from error
        raise LostFile(
            f"{path} is not the file that dataset.json describes, {FETCHES} times fetched: copy it there again, or "
            "make the index anew by `python -m pipeline.shards index`."
        )

    @contextmanager
    def whole_file(self, fs: AbstractFileSystem, path: str) -> Iterator[BinaryIO]:
        """A file to be read once; one from elsewhere is fetched first, past what breaks connections, and not kept.

        Raises:
            FileNotFoundError, PermissionError, OSError: it can't be read.
            UserError: as `download`; the cache can't be written.
        """
        if is_local(fs):
            with open(path, "rb") as file:
                yield file
            return
        copy = self.folder / "copies" / uuid.uuid4().hex
        alive = FileLock(copy.with_suffix(".lock"), thread_local=False)
        with self._locked("lock"):
            self._forget_copies()
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
        """Where the index of a set is kept that can't be written to."""
        return self.folder / "indexes" / hashlib.sha256(root.rstrip("/").encode()).hexdigest()[:32]

    @contextmanager
    def _locked(self, name: str, retry_policy: RetryPolicy | None = None) -> Iterator[None]:
        """Alone among all processes and threads, for as long as that takes or until patience is told to stop."""
        lock = FileLock(self.folder / f"{name}.lock", thread_local=False)
        while not lock.is_locked:
            try:
                for folder in FOLDERS:
                    (self.folder / folder).mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=1, poll_interval=0.01)
            except Timeout:
                if retry_policy and retry_policy.stop.is_set():
                    raise UserError(f"{lock.lock_file} was waited for and given up.") from None
            except (OSError, NotImplementedError) as error:  # the file system knows no locks, for the latter
                raise self._unusable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _unusable(self, error: Exception) -> UserError:
        cure = "point $STREAMCLR_CACHE to a folder that can be written"
        return UserError(f"{self.folder} can't be used as a cache ({error}): {cure}.")

    def _make_room(self, partial: Path, size: int) -> bool:
        """Reserve the room of a file by its empty `partial`, evicting what was not used for longest and is not held."""
        with self._locked("lock"):
            self._forget_copies()
            held = self._held()
            kept, evictable = 0, []
            for file in partial.parent.iterdir():
                named = CACHED.fullmatch(file.name)
                if not named or file == partial:  # other files may lie here: .DS_Store, .nfs..., a user's own
                    continue
                try:
                    status = file.stat()
                except FileNotFoundError:  # removed by hand
                    continue
                sha256, rest = named.groups()
                # one that is being fetched counts as what it will be
                bytes_ = int(rest) if rest else status.st_size
                if sha256 not in held and not (rest and self._being_fetched(sha256)):
                    evictable.append((max(status.st_atime_ns, status.st_mtime_ns), bytes_, file))
                else:
                    kept += bytes_
            if kept + size > self.limit_bytes:
                return False  # before anything is evicted in vain
            total = kept + size + sum(bytes_ for _, bytes_, _ in evictable)
            for _, bytes_, file in sorted(evictable):
                if total > self.limit_bytes:
                    try:
                        file.unlink(missing_ok=True)
                        total -= bytes_
                    except OSError:  # open in another process, on a system where that forbids it; or not a file
                        continue
            if total <= self.limit_bytes:
                partial.touch()
            return total <= self.limit_bytes

    def _forget_copies(self) -> None:
        """Remove what processes that were killed had fetched to be read once; to be called under the lock."""
        for path in (self.folder / "copies").glob("*.lock"):
            if not OWN.fullmatch(path.stem):
                continue
            lock = FileLock(path, thread_local=False)
            try:
                lock.acquire(timeout=0)
            except (Timeout, OSError):  # whoever holds it lives
                continue
            path.with_suffix("").unlink(missing_ok=True)
            lock.release()
            path.unlink(missing_ok=True)

    def _being_fetched(self, sha256: str) -> bool:
        lock = FileLock(self.folder / f"locks/{sha256[:3]}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _held(self) -> set[str]:
        """What live processes are about to use; forgets those that have ended."""
        held: set[str] = set()
        for path in (self.folder / "leases").glob("*.held"):
            if not OWN.fullmatch(path.stem):
                continue
            lock = FileLock(path.with_suffix(".lock"), thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:  # whoever holds it lives
                with suppress(FileNotFoundError):  # somebody is emptying the cache
                    held |= set(path.read_text().split())
            else:
                path.unlink(missing_ok=True)
                lock.release()
                Path(lock.lock_file).unlink(missing_ok=True)
        return held


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lease:
    """What one reader is about to use, which no process evicts; ends with `close` or with the process."""

    def __init__(self, cache: ShardCache):
        self.cache = cache
        self.path = cache.folder / "leases" / f"{uuid.uuid4().hex}.held"
        self._alive = FileLock(self.path.with_suffix(".lock"), thread_local=False)
        with cache._locked("lock"):
            self._alive.acquire()
            self.path.write_text("")

    def hold(self, checksums: Iterable[str]) -> None:
        """From now on these and no others; while the lock is held nobody is in the midst of evicting."""
        with self.cache._locked("lock"):
            self.path.write_text("\n".join(checksums))

    def close(self) -> None:
        with self.cache._locked("lock"):
            self.path.unlink(missing_ok=True)
            self._alive.release()
            self.path.with_suffix(".lock").unlink(missing_ok=True)
