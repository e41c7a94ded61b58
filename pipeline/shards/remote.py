"""Files at any URL: fsspec's file systems, http(s) by the standard library alone, and fetching past failures."""

import gzip
import html
import logging
import posixpath
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from http.client import HTTPMessage
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from fsspec.spec import AbstractFileSystem

from ..common import UserError

log = logging.getLogger(__name__)
PIECE_BYTES = 4 << 20
STOP_POLL_S = 0.1  # how often a thread that waits for another one looks whether it was told to stop
FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""Errors of a store that are not worth retrying."""
T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on with a connection that fails."""

    attempts: int = 8
    """In a row without a byte gained; with the waits below, they take about a minute and a half."""
    first_wait_s: float = 0.5
    """Doubled after each attempt and varied by half at random, so that many clients do not come back at once."""
    longest_wait_s: float = 30.0
    stall_s: float = 30.0
    """Over http(s): a connection that sends nothing for so long has failed."""
    stop: threading.Event = field(default_factory=threading.Event, compare=False)
    """Set it to give up at once."""

    def wait(self, attempt: int) -> bool:
        """Wait before the next attempt, `attempt` having failed (from 0); False if there is to be none."""
        if attempt + 1 >= self.attempts or self.stop.is_set():
            return False
        wait_s = min(self.first_wait_s * 2**attempt, self.longest_wait_s)
        # a generator of its own: the global one belongs to the run and its seed
        return not self.stop.wait(wait_s * random.Random().uniform(0.5, 1.5))


class PastTheEnd(OSError):
    """A range that begins where the file has ended."""


class WrongSize(OSError):
    """The store has another file than the one asked for, or for now a part of it."""


class NoRanges(Exception):
    """The server ignores byte ranges and always sends the whole file."""


class MethodRefused(OSError):
    """The server does not answer this kind of request, HEAD for example."""


class WebFileSystem(AbstractFileSystem):
    """The part of http(s) that reading needs, without a further package.

    Args:
        stall_s: a connection that sends nothing for this long has failed.
        root: URL as the user wrote it, so it is sent unchanged. A path is this URL followed by plain file names, which
            are quoted: a `%`, `#` or `?` in them is part of the name.
    """

    protocol = ("http", "https")

    def __init__(self, stall_s: float, root: str = "", **options):
        super().__init__(**options)
        self.stall_s, self.root = stall_s, root

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.rstrip("/")

    def request(self, path: str, start: int = 0, end: int | None = None, method: str = "GET"):
        """The server's answer, as a file; it may ignore the range, see `_first_byte`."""
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        known = len(self.root) if path.startswith(self.root) else len(path)
        url = quote(path[:known], safe="/:?&=%#@+,;~!*'()[]$") + quote(path[known:])
        try:
            return urlopen(Request(url, None, headers, method=method), timeout=self.stall_s)
        except HTTPError as error:
            error.close()
            kind = {404: FileNotFoundError, 410: FileNotFoundError, 401: PermissionError, 403: PermissionError}
            kind |= {416: PastTheEnd} | dict.fromkeys((400, 405, 501), MethodRefused)
            raise kind.get(error.code, OSError)(f"{path}: the server answers {error.code} {error.reason}") from error

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_) -> bytes:
        """The content of a file or of a range of it.

        Raises:
            NoRanges: a range is requested and the server sends the whole file instead.
        """
        if start is not None and start == end:
            return b""  # for which there is no range
        try:
            answer = self.request(path, start or 0, end)
        except PastTheEnd:
            return b""
        with answer:
            if start or end is not None:
                _refuse_compression(answer, path)
                if _first_byte(answer, start or 0) != (start or 0) or answer.status != 206:
                    raise NoRanges(path)
            content = answer.read()  # raises IncompleteRead where the connection breaks
            whole = _whole_size(answer.headers, answer.status)
            if end is not None and len(content) < min(end, whole or 0) - (start or 0):
                raise ConnectionError(f"{path}: {len(content)} bytes are sent where {end - (start or 0)} are requested")
        if answer.headers.get("Content-Encoding") in ("gzip", "x-gzip"):
            return gzip.decompress(content)  # some servers compress text without having been asked to
        return content if end is None else content[: end - (start or 0)]

    def cat_past(self, path: str, start: int, end: int) -> bytes:
        """As `cat_file`, from a server without ranges: reads and discards everything before the range."""
        with self.request(path) as answer:
            _refuse_compression(answer, path)
            while start and (skipped := len(answer.read(min(start, PIECE_BYTES)))):
                start, end = start - skipped, end - skipped
            return answer.read(end - start)

    def exists(self, path: str, **_) -> bool:
        try:
            try:
                self.request(path, method="HEAD").close()
            except (MethodRefused, PermissionError):  # the server may still answer GET
                self.request(path, 0, 1).close()
        except PastTheEnd:  # an empty file
            return True
        except (FileNotFoundError, PermissionError):  # S3 forbids, over https, to ask for what is not there
            return False
        return True

    def ls(self, path: str, detail: bool = False, **_) -> list[str]:
        """Files linked from the page of the folder, which many servers create."""
        page = self.cat_file(f"{path}/").decode(errors="replace")
        links = map(html.unescape, re.findall(r"""href=["']?([^"'?#\s>]+)""", page, re.I))
        return [f"{path}/{name}" for name in sorted({posixpath.basename(unquote(link)) for link in links}) if name]


def _first_byte(answer, requested: int) -> int:
    """Where in the file the answer to a request for the bytes from `requested` on starts."""
    if answer.status != 206:
        return 0
    sent = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(sent[1]) if sent else requested


def _refuse_compression(answer, path: str) -> None:
    if (encoding := answer.headers.get("Content-Encoding", "identity").lower()) not in ("identity", ""):
        raise UserError(
            f"The server compresses {path} ({encoding}), which changes sizes and offsets; turn off the compression of "
            "this folder on the server."
        )


def filesystem(root: str, retry_policy: RetryPolicy | None = None) -> tuple[AbstractFileSystem, str]:
    """The file system of a folder or URL, and the path in it.

    Raises:
        UserError: no such kind of URL, a malformed one, or its package is not installed.
    """
    if root.startswith(("http://", "https://")):
        _check_host(root)
        root = root.rstrip("/")
        return WebFileSystem((retry_policy or RetryPolicy()).stall_s, root), root
    try:
        fs, path = fsspec.core.url_to_fs(root)
    except ImportError as error:
        known = known_implementations.get(root.partition("://")[0], {"class": ""})
        package = known["class"].partition(".")[0] or "the package that it names"
        raise UserError(f"{root} can't be opened ({error}): pip install {package}.") from error
    except ValueError as error:
        cure = "give a folder, or a URL such as https://host/folder, s3://bucket/folder, gs://... or hf://..."
        raise UserError(f"{root} can't be opened ({error}): {cure}.") from error
    return fs, path.rstrip("/")


def _check_host(url: str) -> None:
    try:
        parts = urlsplit(url)
        parts.port, (parts.hostname or "").encode("idna")  # raise what is wrong with them
        if not parts.hostname or re.search(r"\s", url.split("/")[2]):
            raise ValueError("no name of a server")
        if parts.username is not None:  # http.client would take it for a part of the server's name
            raise ValueError("user names and passwords are not supported")
    except ValueError as error:
        raise UserError(f"{url} is no web address ({error}): correct it, as in https://host/folder.") from error


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def persistently(action: Callable[[], T], what: str, retry_policy: RetryPolicy) -> T:
    """The result of `action`, which reads from a file system, with retries.

    Raises:
        FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, NoRanges: at once.
        UserError: the last of the attempts failed, or patience was told to stop.
    """
    attempt = 0
    while True:
        if retry_policy.stop.is_set():
            raise UserError(f"Reading {what} was stopped.")
        try:
            return action()
        except (*FINAL, NoRanges, UserError):
            raise
        except Exception as error:  # every kind of store raises its own
            _wait_or_give_up(what, error, attempt, retry_policy)
            attempt += 1


def _wait_or_give_up(what: str, error: Exception, attempt: int, retry_policy: RetryPolicy) -> None:
    cause = str(error) or type(error).__name__
    if attempt > 0 and attempt + 1 < retry_policy.attempts:  # so that nobody wonders why nothing happens
        log.warning("%s can't be read (%s): attempt %d of %d follows", what, cause, attempt + 2, retry_policy.attempts)
    if not retry_policy.wait(attempt):
        tried = f"after {attempt + 1} attempts ({cause})"
        raise UserError(f"{what} can't be read {tried}: see to the connection and go on.") from error


def download(fs: AbstractFileSystem, path: str, target: Path, size: int | None, retry_policy: RetryPolicy) -> None:
    """Fetch a file of `size` bytes (None: as the store says) into `target`, going on from what is there of it.

    Raises:
        FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError: of the store, at once.
        UserError: the last of the attempts failed, or `target` can't be written.
    """
    attempt = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "ab", buffering=0) as out:  # what a buffer still holds would fail on closing
            while size is None or out.tell() != size:
                begun = out.tell()
                try:
                    if size is not None and begun > size:
                        begun = out.seek(0)
                        out.truncate()
                    size = _append(fs, path, out, size, retry_policy)
                except (*FINAL, UserError, _DiskError):
                    raise
                except Exception as error:  # every kind of store raises its own
                    attempt = 0 if out.tell() > begun else attempt
                    _wait_or_give_up(path, error, attempt, retry_policy)
                    attempt += 1
    except _DiskError as error:
        cure = "free some space there, or point $STREAMCLR_CACHE to another disk"
        raise UserError(f"{target.parent} can't be written ({error}): {cure}.") from error


class _DiskError(Exception):
    """The disk refuses, which no further attempt at the network will mend."""


def _append(fs: AbstractFileSystem, path: str, out: BinaryIO, size: int | None, retry_policy: RetryPolicy) -> int:
    """Append the rest of a file to what `out` holds of it; the size of the whole."""
    start = out.tell()
    if isinstance(fs, WebFileSystem):
        with fs.request(path, start) as answer:
            _refuse_compression(answer, path)
            first = _first_byte(answer, start)
            if first > start:
                raise OSError(f"the server sends bytes from {first} on where those from {start} on are requested")
            start = first  # a server without ranges sends everything again
            return _copy(answer, out, start, size, _whole_size(answer.headers, answer.status), retry_policy)
    with fs.open(path, "rb", block_size=PIECE_BYTES, cache_type="none") as file:
        file.seek(start)
        return _copy(file, out, start, size, getattr(file, "size", None), retry_policy)


def _whole_size(headers: HTTPMessage, status: int) -> int | None:
    """The size of the whole file, from the answer to a request for all or a part of it."""
    text = headers.get("Content-Range", "").rpartition("/")[2] if status == 206 else headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _copy(
    file: BinaryIO, out: BinaryIO, start: int, size: int | None, offered: int | None, retry_policy: RetryPolicy
) -> int:
    if size is not None and offered not in (None, size):
        raise WrongSize(f"{offered} bytes are offered where {size} are expected")
    try:
        out.truncate(start)
        out.seek(start)
    except OSError as error:
        raise _DiskError(error) from error
    read = getattr(file, "read1", file.read)  # what has come, so that it is kept if the connection breaks
    while piece := read(PIECE_BYTES):
        try:
            left = memoryview(piece)
            while left:
                left = left[out.write(left) :]
        except OSError as error:
            raise _DiskError(error) from error
        if retry_policy.stop.is_set():
            raise InterruptedError("given up")
    expected = offered if size is None else size
    if expected is not None and out.tell() < expected:
        raise ConnectionError(f"the connection ended after {out.tell()} of {expected} bytes")
    return out.tell()


class DaemonThreads:
    """Threads for calls to the network, which may hang: unlike an executor's, nothing waits for them to end.

    `result` waits for the result of one of them, until an event is set or Ctrl-C is pressed.
    """

    def __init__(self, count: int, name: str):
        self._tasks, self._count = SimpleQueue(), count
        for _ in range(count):
            threading.Thread(target=self._work, args=(self._tasks,), name=name, daemon=True).start()

    def submit(self, function: Callable, *arguments) -> Future:
        future: Future = Future()
        self._tasks.put((future, function, arguments))
        return future

    def __del__(self):  # of a reader that was never closed
        self.close()

    def close(self) -> None:
        """Each thread ends after its current task; those that are waiting, at once."""
        for _ in range(self._count):
            self._tasks.put(None)

    @staticmethod
    def _work(tasks: SimpleQueue) -> None:
        while task := tasks.get():
            future, function, arguments = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:  # for whoever asks for the result
                    future.set_exception(error)
            del task, future, function, arguments  # which would keep the reader alive


def result(future: Future[T], stop: threading.Event) -> T:
    """The result of another thread, which may hang in a call to the network.

    Raises:
        UserError: `stop` was set; and whatever the other thread raised.
    """
    while not wait([future], timeout=STOP_POLL_S).done:
        if stop.is_set():
            raise UserError("Reading was stopped.")
    return future.result()
