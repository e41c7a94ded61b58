"""Data sets distributed as raw pixels, which are stored as PNG without loss."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common import UserError
from ..images import png
from .base import Source, modified_ns, read_range


@dataclass(frozen=True)
class PixelReader:
    """Read an image by number from a file of consecutive (3, side, side) uint8 planes, and encode it as PNG."""

    path: Path
    side: int
    columns_first: bool = False
    """Whether each plane is stored column by column."""

    def __call__(self, number: int) -> bytes:
        size = 3 * self.side**2
        raw = read_range(self.path, number * size, size)
        if len(raw) < size:
            raise UserError(f"{self.path} has become shorter; download it again.")
        planes = np.frombuffer(raw, np.uint8).reshape(3, self.side, self.side)
        return png(np.ascontiguousarray(planes.transpose((2, 1, 0) if self.columns_first else (1, 2, 0))))


@dataclass(frozen=True)
class PixelArchive:
    """What the splits of one downloaded archive have in common."""

    name: str
    classes: list[str]
    scratch: tempfile.TemporaryDirectory
    modified: list[int]

    def source(self, split: str, labels: Sequence[int | None], reader: PixelReader) -> Source:
        """Source of one split; a key consists of the split and the position in the published order."""
        items = [
            (None if label is None else self.classes[label], f"{split}-{number:06d}", (number,))
            for number, label in enumerate(labels)
        ]
        return Source(
            self.name, items, reader, self.classes, encodes=True, scratch=self.scratch, modified=self.modified
        )


def modified_times(path: Path, files: dict[str, Path]) -> list[int]:
    """Modification time (ns) of the archive `path`, or of the files found if `path` is a folder."""
    return modified_ns([path] if path.is_file() else sorted(files.values()))
