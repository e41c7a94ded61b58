"""Read-only HTTP(S) file system on the standard library.

fsspec's HTTPFileSystem failed 32 tests of this package: it accepts responses with another byte range than requested,
loses a partly received block when the connection breaks, retries 403 and 416, and changes the names in URLs.
"""

import gzip
import html
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from fsspec.spec import AbstractFileSystem

from ..common import UserError

CHUNK_BYTES = 4 << 20


class RangeNotSatisfiable(OSError):
    """The requested byte range starts at or after the end of the file."""


class MethodNotAllowed(OSError):
    """The server does not support the request method, for example HEAD."""


class RangesUnsupported(Exception):
    """The server ignores byte ranges and sends the whole file or another part of it."""


STATUS_ERRORS = {404: FileNotFoundError, 410: FileNotFoundError, 401: PermissionError, 403: PermissionError}
STATUS_ERRORS |= {416: RangeNotSatisfiable} | dict.fromkeys((400, 405, 501), MethodNotAllowed)


class WebFileSystem(AbstractFileSystem):
    """Files below an http:// or https:// URL.

    Args:
        stall_s: seconds without data after which a connection counts as failed.
        root: URL as the user wrote it; it is sent unchanged. Paths are this URL followed by plain file names, which are
            quoted: a `%`, `#` or `?` in them is part of the name.
    """

    protocol = ("http", "https")

    def __init__(self, stall_s: float, root: str = "", **options):
        super().__init__(**options)
        self.stall_s, self.root = stall_s, root

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.rstrip("/")

    def _request(self, path: str, start: int = 0, end: int | None = None, method: str = "GET") -> HTTPResponse:
        """Send a request; the server may ignore the byte range, see `_extent`."""
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        known = len(self.root) if path.startswith(self.root) else len(path)
        url = quote(path[:known], safe="/:?&=%#@+,;~!*'()[]$") + quote(path[known:])
        try:
            return urlopen(Request(url, None, headers, method=method), timeout=self.stall_s)
        except HTTPError as error:
            error.close()
            kind = STATUS_ERRORS.get(error.code, OSError)
            raise kind(f"{path}: the server answers {error.code} {error.reason}") from error

    @contextmanager
    def open_from(self, path: str, start: int) -> Iterator[tuple[HTTPResponse, int, int | None]]:
        """Open a file for sequential reading.

        Yields:
            The response, the offset of its first byte (`start`, or less from a server without byte ranges), and the
            size of the whole file if the server states it.
        """
        with self._request(path, start) as response:
            _refuse_compression(response, path)
            first, size = _extent(response, start)
            if first > start:
                raise OSError(f"the server sends bytes from {first} on, but bytes from {start} on were requested")
            yield response, first, size

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_) -> bytes:
        """Read a file or a byte range of it.

        Raises:
            RangesUnsupported: the server does not send the requested range.
        """
        if start is not None and start == end:
            return b""  # HTTP has no empty ranges
        first = start or 0
        try:
            response = self._request(path, first, end)
        except RangeNotSatisfiable:
            return b""
        with response:
            sent, size = _extent(response, first)
            if first or end is not None:
                _refuse_compression(response, path)
                if sent != first or response.status != 206:
                    raise RangesUnsupported(path)
            content = response.read()  # raises IncompleteRead if the connection breaks
            if end is not None and len(content) < min(end, size or 0) - first:
                raise ConnectionError(f"{path}: received {len(content)} of {end - first} requested bytes")
        if response.headers.get("Content-Encoding") in ("gzip", "x-gzip"):
            return gzip.decompress(content)  # some servers compress text even if the client does not accept it
        return content if end is None else content[: end - first]

    def cat_by_skipping(self, path: str, start: int, end: int) -> bytes:
        """Read a byte range from a server without byte ranges: download and discard everything before it."""
        with self.open_from(path, 0) as (response, _, _):
            while start and (skipped := len(response.read(min(start, CHUNK_BYTES)))):
                start, end = start - skipped, end - skipped
            return response.read(end - start)

    def ukey(self, path: str) -> str:
        """The ETag of a file, or else the time of its last change; "" if the server states neither."""
        try:
            with self._request(path, 0, 1) as response:
                return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        except RangeNotSatisfiable:  # an empty file
            return ""

    def exists(self, path: str, **_) -> bool:
        try:
            try:
                self._request(path, method="HEAD").close()
            except (MethodNotAllowed, PermissionError):  # the server may still answer GET
                self._request(path, 0, 1).close()
        except RangeNotSatisfiable:  # an empty file
            return True
        except (FileNotFoundError, PermissionError):  # S3 answers 403 for missing objects
            return False
        return True

    def ls(self, path: str, detail: bool = False, **_) -> list[str]:
        """List the links on the folder's index page, which many servers generate."""
        page = self.cat_file(f"{path}/").decode(errors="replace")
        links = map(html.unescape, re.findall(r"""href=["']?([^"'?#\s>]+)""", page, re.I))
        return [f"{path}/{name}" for name in sorted({posixpath.basename(unquote(link)) for link in links}) if name]


def check_web_url(url: str) -> None:
    """Check the host part of an http(s) URL.

    Raises:
        UserError: the host is missing or malformed, or the URL contains a user name.
    """
    try:
        parts = urlsplit(url)
        parts.port, (parts.hostname or "").encode("idna")  # both raise ValueError if malformed
        if not parts.hostname or re.search(r"\s", url.split("/")[2]):
            raise ValueError("no host name")
        if parts.username is not None:  # http.client would treat it as part of the host name
            raise ValueError("user names and passwords are not supported")
    except ValueError as error:
        raise UserError(f"{url} is not a valid web address ({error}); use the form https://host/folder.") from error


def _extent(response: HTTPResponse, requested: int) -> tuple[int, int | None]:
    """Offset of the response's first byte in the file, and the size of the whole file if the server states it."""
    if response.status != 206:
        first, size = "0", response.headers.get("Content-Length", "")
    else:
        sent = re.match(r"bytes (\d+)-\d*/(\d*)", response.headers.get("Content-Range", ""))
        first, size = sent.groups() if sent else (requested, "")
    return int(first), int(size) if size.isdigit() else None


def _refuse_compression(response: HTTPResponse, path: str) -> None:
    if (encoding := response.headers.get("Content-Encoding", "identity").lower()) not in ("identity", ""):
        raise UserError(
            f"The server compresses {path} ({encoding}), which changes sizes and offsets; turn off the compression of "
            "this folder on the server."
        )
