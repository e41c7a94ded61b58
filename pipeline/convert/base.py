"""The interface between sources and the converter: a `Source` lists images and reads any of them by its address."""

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common import UserError

Item = tuple[str | None, str, tuple]
"""(class or None, key, address) of one image; an address consists of strings and integers."""


@dataclass(frozen=True)
class Source:
    """Images with their classes. One million items take about 0.3 GB of memory."""

    name: str
    items: list[Item]
    read: Callable[..., bytes]
    """Function that returns the encoded image at `read(*address)`; pickled to run in worker processes."""
    classes: list[str] | None = None
    """Class names in label order; None sorts the classes of the items."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of files that were rejected while listing the source."""
    encodes: bool = False
    """Whether `read` encodes images itself, so that the bytes depend on the OpenCV version."""
    scratch: tempfile.TemporaryDirectory | None = None
    """Folder with unpacked files; deleted together with the source."""
    modified: Sequence[int] = ()
    """Modification times (ns) of the files that hold the images, or a checksum; other numbers may mean other images."""


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Read `size` bytes at `offset`; fewer at the end of the file.

    Raises:
        OSError: reading failed at this offset, for example because of a bad sector.
        UserError: the file has disappeared or cannot be opened.
    """
    try:
        with open(path, "rb", buffering=0) as file:  # opening costs 10 us, and no open file needs to be managed
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise_if_gone(path, error)
        raise


def raise_if_gone(path: Path, error: OSError) -> None:
    """Raise UserError if the file or folder `path` is no longer readable.

    A single unreadable image is left out. If the whole source has disappeared, the conversion must stop, or all
    remaining images would be left out.
    """
    try:
        with os.scandir(path) if path.is_dir() else open(path, "rb"):
            pass
    except OSError:
        raise UserError(
            f"{path} can no longer be read ({error.strerror}); check the disk and run the same command again to resume."
        ) from error


def modified_ns(files: Iterable[Path]) -> list[int]:
    """Modification times of files in nanoseconds."""
    return [file.stat().st_mtime_ns for file in files]
