"""Remote storage: fsspec file systems, retries with exponential backoff, and downloads that resume."""

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from fsspec.spec import AbstractFileSystem

from ..common import UserError
from .web import CHUNK_BYTES, RangesUnsupported, WebFileSystem, check_web_url

log = logging.getLogger(__name__)
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""Errors that are not worth retrying."""
T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Number of attempts and waits between them when a remote store fails."""

    attempts: int = 8
    """Maximum attempts in a row without progress; with the default waits they take about 90 seconds."""
    first_wait_s: float = 0.5
    """Wait after the first failure; doubles per attempt, with ±50 % jitter so that clients do not retry in lockstep."""
    longest_wait_s: float = 30.0
    """Upper bound of the wait before jitter."""
    stall_s: float = 30.0
    """Seconds without data after which an HTTP connection counts as failed."""
    stop: threading.Event = field(default_factory=threading.Event, compare=False)
    """Set by another thread to give up at once."""

    def wait(self, attempt: int) -> bool:
        """Wait after failed attempt number `attempt` (from 1); False if there must be no further attempt."""
        if attempt >= self.attempts or self.stop.is_set():
            return False
        wait_s = min(self.first_wait_s * 2 ** (attempt - 1), self.longest_wait_s)
        # separate generator: drawing from the global one would change the run's random numbers
        return not self.stop.wait(wait_s * random.Random().uniform(0.5, 1.5))


class SizeMismatch(OSError):
    """The store holds a file of another size, or so far only part of the file."""


def filesystem(root: str, retry_policy: RetryPolicy | None = None) -> tuple[AbstractFileSystem, str]:
    """Resolve a folder or URL to its file system and the path in it.

    Raises:
        UserError: the URL is malformed, or its protocol is unknown or needs a package that is not installed.
    """
    if root.startswith(("http://", "https://")):
        check_web_url(root)
        root = root.rstrip("/")
        return WebFileSystem((retry_policy or RetryPolicy()).stall_s, root), root
    try:
        fs, path = fsspec.core.url_to_fs(root)
    except ImportError as error:
        known = known_implementations.get(root.partition("://")[0], {"class": ""})
        package = known["class"].partition(".")[0] or "the package that it names"
        raise UserError(f"{root} can't be opened ({error}): pip install {package}.") from error
    except ValueError as error:
        remedy = "use a folder, or a URL such as https://host/folder, s3://bucket/folder, gs://... or hf://..."
        raise UserError(f"{root} can't be opened ({error}): {remedy}.") from error
    return fs, path.rstrip("/")


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def unreadable(path: str, error: OSError) -> UserError:
    """Error for a file of a shard set that the store does not let us read."""
    return UserError(f"{path} can't be read ({error}); check the connection and the permissions.")


def with_retries(
    action: Callable[[], T], what: str, retry_policy: RetryPolicy, progress: Callable[[], int] = lambda: 0
) -> T:
    """Call `action`, which reads `what` from a file system, and retry it if it fails.

    Args:
        progress: number of bytes received so far; an attempt that increases it starts the count of attempts again.

    Raises:
        FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, RangesUnsupported: without a retry.
        UserError: the last attempt failed, or `retry_policy.stop` was set.
    """
    attempt, before = 0, progress()
    while True:
        if retry_policy.stop.is_set():
            raise UserError(f"Reading {what} was stopped.")
        try:
            return action()
        except (*PERMANENT_ERRORS, RangesUnsupported, UserError):
            raise
        except Exception as error:  # every store has its own exception types
            attempt, before = (0 if progress() > before else attempt) + 1, progress()
            cause = str(error) or type(error).__name__
            if 1 < attempt < retry_policy.attempts:  # explain a long silence, but not a single failure
                log.warning(
                    "%s can't be read (%s): attempt %d of %d follows", what, cause, attempt + 1, retry_policy.attempts
                )
            if not retry_policy.wait(attempt):
                raise UserError(
                    f"{what} can't be read after {attempt} attempts ({cause}); check the connection and run again."
                ) from error


def download(fs: AbstractFileSystem, path: str, target: Path, size: int | None, retry_policy: RetryPolicy) -> None:
    """Download a file to `target`, resuming from what `target` already holds.

    Args:
        size: expected size in bytes; None accepts the size that the store states.

    Raises:
        FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError: from the store, without a retry.
        UserError: the last attempt failed, or `target` can't be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "ab", buffering=0) as out:  # unbuffered: flushing a buffer could fail when it is closed
        if size is not None and out.tell() > size:
            out.seek(out.truncate(0))
        if size is None or out.tell() < size:
            with_retries(lambda: _append(fs, path, out, size, retry_policy), path, retry_policy, progress=out.tell)


def _append(fs: AbstractFileSystem, path: str, out: BinaryIO, size: int | None, retry_policy: RetryPolicy) -> None:
    """Append the rest of a remote file to its partial copy `out`."""
    start = out.tell()
    if isinstance(fs, WebFileSystem):
        with fs.open_from(path, start) as (response, first, total):  # without ranges, the file starts over at 0
            _check_size(size, total)
            _copy(response, out, first, size or total, retry_policy.stop)
    else:
        with fs.open(path, "rb", block_size=CHUNK_BYTES, cache_type="none") as file:
            total = getattr(file, "size", None)
            _check_size(size, total)
            file.seek(start)
            _copy(file, out, start, size or total, retry_policy.stop)


def _check_size(expected: int | None, stated: int | None) -> None:
    if expected is not None and stated not in (None, expected):
        raise SizeMismatch(f"the store offers {stated} bytes, but {expected} are expected")


def _copy(file: BinaryIO, out: BinaryIO, start: int, size: int | None, stop: threading.Event) -> None:
    """Copy the rest of a file of `size` bytes to `out` at offset `start`."""
    read = getattr(file, "read1", file.read)  # returns what has arrived, so it is kept if the connection breaks
    with _local_errors(out):
        out.seek(out.truncate(start))
    while chunk := read(CHUNK_BYTES):
        left = memoryview(chunk)
        while left:
            with _local_errors(out):
                left = left[out.write(left) :]
        if stop.is_set():
            raise UserError("The download was stopped.")
    if size is not None and out.tell() < size:
        raise ConnectionError(f"the connection ended after {out.tell()} of {size} bytes")
    _check_size(size, out.tell())


@contextmanager
def _local_errors(out: BinaryIO) -> Iterator[None]:
    """Turn errors of the local disk into UserErrors, which are not retried."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{Path(out.name).parent} can't be written ({error}); free some space there or set $STREAMCLR_CACHE to a "
            "folder on another disk."
        ) from error
