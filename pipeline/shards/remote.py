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
PERMANENT_STATUS = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}
"""HTTP status in an error of a store's client -> the error that it means."""
HUB = "hf://"
"""Start of URLs on the Hugging Face Hub, where a write would be a commit, so everything there counts as read-only."""
T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Number of attempts and waits between them when a remote store fails."""

    attempts: int = 8
    """Maximum attempts in a row without progress; with the default waits they take about a minute."""
    first_wait_s: float = 0.5
    """Wait after the first failure; doubles per attempt, with ±50 % jitter so that clients do not retry in lockstep."""
    longest_wait_s: float = 30.0
    """Upper bound of the wait before jitter."""
    stall_s: float = 30.0
    """Seconds without data after which an HTTP connection counts as failed."""
    stop: threading.Event = field(default_factory=threading.Event, compare=False)
    """Set by another thread to give up at once."""


class UnavailableFile(UserError):
    """The store lacks a file or holds other content under its name; this says nothing about its other files."""


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
    if "://" not in root:  # url_to_fs would split a path at "::"
        return LocalFileSystem(), LocalFileSystem._strip_protocol(root).rstrip("/")
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
        FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, RangesUnsupported: without a retry,
            also where the store's client has another exception for it.
        UnavailableFile: the store holds a file of another size, also at the last attempt.
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
            status = getattr(getattr(error, "response", None), "status_code", None)
            if permanent := PERMANENT_STATUS.get(status):
                raise permanent(str(error).strip().rpartition("\n")[2].rstrip(".")) from error
            attempt, before = (0 if progress() > before else attempt) + 1, progress()
            cause, attempts = str(error) or type(error).__name__, retry_policy.attempts
            if 1 < attempt < attempts:  # explain a long silence, but not a single failure
                log.warning("%s can't be read (%s): attempt %d of %d follows", what, cause, attempt + 1, attempts)
            wait_s = min(retry_policy.first_wait_s * 2 ** (attempt - 1), retry_policy.longest_wait_s)
            # separate generator: drawing from the global one would change the run's random numbers
            if attempt >= attempts or retry_policy.stop.wait(wait_s * random.Random().uniform(0.5, 1.5)):
                kind = UnavailableFile if isinstance(error, SizeMismatch) else UserError
                raise kind(
                    f"{what} can't be read after {attempt} attempts ({cause}); check the connection and run again."
                ) from error


def read_file(fs: AbstractFileSystem, path: str, retry_policy: RetryPolicy) -> bytes:
    """Content of a file; raises as `with_retries`."""
    return with_retries(lambda: fs.cat_file(path), path, retry_policy)


def download(
    fs: AbstractFileSystem, path: str, out: BinaryIO, size: int | None, retry_policy: RetryPolicy, folder: Path
) -> None:
    """Download a file, resuming from what its partial copy `out` already holds.

    Args:
        out: an unbuffered file at its end, since flushing a buffer could fail when it is closed.
        size: expected size in bytes; None accepts the size that the store states.
        folder: where `out` is, for errors.

    Raises:
        UserError: `out` can't be written; and as `with_retries`.
    """

    def append() -> None:
        with _open_from(fs, path, out.tell()) as (file, first, total):
            _check_size(size, total)
            read = getattr(file, "read1", file.read)  # returns what has arrived, so it is kept if the connection breaks
            with disk_errors(folder):
                out.seek(out.truncate(first))
            while chunk := read(CHUNK_BYTES):
                left = memoryview(chunk)
                while left:
                    with disk_errors(folder):
                        left = left[out.write(left) :]
                if retry_policy.stop.is_set():
                    raise UserError("The download was stopped.")
        expected = size or total
        if expected is not None and out.tell() < expected:
            raise ConnectionError(f"the connection ended after {out.tell()} of {expected} bytes")
        _check_size(expected, out.tell())

    if size is not None and out.tell() > size:
        out.seek(out.truncate(0))
    if size is None or out.tell() < size:
        with_retries(append, path, retry_policy, progress=out.tell)


@contextmanager
def _open_from(fs: AbstractFileSystem, path: str, start: int) -> Iterator[tuple[BinaryIO, int, int | None]]:
    """Open a remote file for sequential reading; yields as `WebFileSystem.open_from`."""
    if isinstance(fs, WebFileSystem):
        with fs.open_from(path, start) as opened:
            yield opened
    else:
        # on the Hub, block size 0 reads a file by one request instead of one per chunk, but only from its beginning
        streams = "hf" in fs.protocol and start == 0
        with fs.open(path, "rb", block_size=0 if streams else CHUNK_BYTES, cache_type="none") as file:
            file.seek(start)
            yield file, start, fs.size(path) if streams else getattr(file, "size", None)


def _check_size(expected: int | None, stated: int | None) -> None:
    if expected is not None and stated not in (None, expected):
        raise SizeMismatch(f"the store offers {stated} bytes, but {expected} are expected")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the local disk into UserErrors, which are not retried."""
    try:
        yield
    except OSError as error:
        remedy = "set $STREAMCLR_CACHE to a folder that can be written and has room"
        raise UserError(f"{folder} can't be used as a cache ({error}); {remedy}.") from error
