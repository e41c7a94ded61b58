"""Files at any URL: fsspec's file systems, http(s) by the standard library alone, and fetching past failures."""

import fnmatch
import logging
import posixpath
import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPMessage
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from fsspec.spec import AbstractFileSystem

from errors import UserError

log = logging.getLogger(__name__)
PIECE_BYTES = 4 << 20
FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""What a store says at once and would say again."""
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
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


class WebFileSystem(AbstractFileSystem):
    """What reading needs of http(s), so that it takes no further package; a path is the whole URL."""

    protocol = ("http", "https")

    def __init__(self, stall_s: float, **options):
        super().__init__(**options)
        self.stall_s = stall_s

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.rstrip("/")

    def request(self, path: str, start: int = 0, end: int | None = None, method: str = "GET"):
        """The server's answer, as a file; it may disregard the range and answer with status 200 and everything."""
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        try:
            request = Request(quote(path, safe="/:?&=%#@+,;~!*'()[]$"), None, headers, method=method)
            return urlopen(request, timeout=self.stall_s)
        except HTTPError as error:
            error.close()
            kind = {404: FileNotFoundError, 410: FileNotFoundError, 401: PermissionError, 403: PermissionError}
            kind[416] = PastTheEnd
            raise kind.get(error.code, OSError)(f"{path}: the server answers {error.code} {error.reason}") from error

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_) -> bytes:
        if start is not None and start == end:
            return b""  # for which there is no range
        try:
            answer = self.request(path, start or 0, end)
        except PastTheEnd:
            return b""
        with answer:
            content = answer.read()  # raises IncompleteRead where the connection breaks
            return content if answer.status == 206 else content[start or 0 : end]

    def exists(self, path: str, **_) -> bool:
        try:
            self.request(path, method="HEAD").close()
        except (FileNotFoundError, PermissionError):  # S3 forbids, over https, to ask for what is not there
            return False
        return True

    def glob(self, path: str, **_) -> list[str]:
        """Files linked from the page of the folder, which many servers make."""
        folder, pattern = posixpath.split(path)
        page = self.cat_file(f"{folder}/").decode(errors="replace")
        names = {posixpath.basename(unquote(link)) for link in re.findall(r"""href=["']?([^"'?#\s>]+)""", page, re.I)}
        return [f"{folder}/{name}" for name in sorted(fnmatch.filter(names, pattern))]


def filesystem(root: str, patience: Patience | None = None) -> tuple[AbstractFileSystem, str]:
    """The file system of a folder or URL, and the path in it.

    Raises:
        UserError: no such kind of URL, a malformed one, or its package is not installed.
    """
    if root.startswith(("http://", "https://")):
        _check_host(root)
        return WebFileSystem((patience or Patience()).stall_s), root.rstrip("/")
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
    except ValueError as error:
        raise UserError(f"{url} is no web address ({error}): correct it, as in https://host/folder.") from error


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def persistently(action: Callable[[], T], what: str, patience: Patience) -> T:
    """The result of `action`, which reads from a file system, tried again and again.

    Raises:
        FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError: at once.
        UserError: the last of the attempts failed.
    """
    attempt = 0
    while True:
        try:
            return action()
        except FINAL:
            raise
        except Exception as error:  # every kind of store raises its own
            _wait_or_give_up(what, error, attempt, patience)
            attempt += 1


def _wait_or_give_up(what: str, error: Exception, attempt: int, patience: Patience) -> None:
    cause = str(error) or type(error).__name__
    if attempt > 0 and attempt + 1 < patience.attempts:  # so that nobody wonders why nothing happens
        log.warning("%s can't be read (%s): attempt %d of %d follows", what, cause, attempt + 2, patience.attempts)
    if not patience.wait(attempt):
        tried = f"after {attempt + 1} attempts ({cause})"
        raise UserError(f"{what} can't be read {tried}: see to the connection and go on.") from error


def download(fs: AbstractFileSystem, path: str, target: Path, size: int | None, patience: Patience) -> None:
    """Fetch a file of `size` bytes (None: as the store says) into `target`, going on from what is there of it.

    Raises:
        FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError: of the store, at once.
        UserError: the last of the attempts failed, or `target` can't be written.
    """
    attempt = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "ab") as out:
            while size is None or out.tell() != size:
                begun = out.tell()
                try:
                    if size is not None and begun > size:
                        begun = out.seek(0)
                        out.truncate()
                    size = _append(fs, path, out, size, patience)
                except (*FINAL, _DiskError):
                    raise
                except Exception as error:  # every kind of store raises its own
                    out.flush()
                    attempt = 0 if out.tell() > begun else attempt
                    _wait_or_give_up(path, error, attempt, patience)
                    attempt += 1
    except _DiskError as error:
        cure = "free some space there, or point $STREAMCLR_CACHE to another disk"
        raise UserError(f"{target.parent} can't be written ({error}): {cure}.") from error


class _DiskError(Exception):
    """The disk refuses, which no further attempt at the network will mend."""


def _append(fs: AbstractFileSystem, path: str, out: BinaryIO, size: int | None, patience: Patience) -> int:
    """Append the rest of a file to what `out` holds of it; the size of the whole."""
    start = out.tell()
    if isinstance(fs, WebFileSystem):
        with fs.request(path, start) as answer:
            if answer.status != 206:
                start = 0  # the server knows no ranges: once more from the beginning
            return _copy(answer, out, start, size, _whole_size(answer.headers, answer.status), patience)
    with fs.open(path, "rb", block_size=PIECE_BYTES, cache_type="none") as file:
        file.seek(start)
        return _copy(file, out, start, size, getattr(file, "size", None), patience)


def _whole_size(headers: HTTPMessage, status: int) -> int | None:
    """The size of the whole file, from the answer to a request for all or a part of it."""
    text = headers.get("Content-Range", "").rpartition("/")[2] if status == 206 else headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _copy(file: BinaryIO, out: BinaryIO, start: int, size: int | None, offered: int | None, patience: Patience) -> int:
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
            out.write(piece)
        except OSError as error:
            raise _DiskError(error) from error
        if patience.stop.is_set():
            raise InterruptedError("given up")
    expected = offered if size is None else size
    if expected is not None and out.tell() < expected:
        raise ConnectionError(f"the connection ended after {out.tell()} of {expected} bytes")
    return out.tell()
