"""Images with exactly the same bytes, found by size and CRC-32 in the index and confirmed by SHA-256."""

import hashlib
from collections.abc import Callable, Iterable

import numpy as np

from .dataset import ShardSet
from .format import ROWS
from .reader import Reader


def identical(checks: np.ndarray, read: Callable[[int], bytes]) -> list[list[int]]:
    """Groups of two or more images with the same bytes: positions in ascending order, groups by their first one.

    Args:
        checks: (N,) uint64, see `size_and_crc`; only images that share one are read.
        read: function that returns the encoded image at a position.
    """
    _, inverse, counts = np.unique(checks, return_inverse=True, return_counts=True)
    same: dict[bytes, list[int]] = {}
    for position in np.flatnonzero(counts[inverse] > 1).tolist():
        same.setdefault(hashlib.sha256(read(position)).digest(), []).append(position)
    return [positions for positions in same.values() if len(positions) > 1]


def size_and_crc(rows: np.ndarray) -> np.ndarray:
    """(N,) uint64 from (N,) index rows: equal for equal images, and rarely for others."""
    return (rows["size"].astype(np.uint64) << np.uint64(32)) | rows["crc32"]


def shared_images(shards: ShardSet, others: ShardSet) -> list[tuple[str, str]]:
    """Images of a set that others contain too: (key, key in `others`) of each, in the order of the set."""
    here, there = (np.concatenate([size_and_crc(rows) for rows in _blocks(each)]) for each in (shards, others))
    candidates = np.intersect1d(here, there)
    (mine,), (theirs,) = (np.nonzero(np.isin(checks, candidates)) for checks in (here, there))
    first: dict[bytes, int] = {}
    for position, digest in _digests(others, theirs):
        first.setdefault(digest, position)
    pairs = ((position, first[digest]) for position, digest in _digests(shards, mine) if digest in first)
    return [(_key(shards, position), _key(others, other)) for position, other in pairs]


def _blocks(shards: ShardSet) -> Iterable[np.ndarray]:
    return (shards.index[first : first + ROWS] for first in range(0, len(shards), ROWS))


def _digests(shards: ShardSet, positions: np.ndarray) -> Iterable[tuple[int, bytes]]:
    """(position, SHA-256) of the images that can be read."""
    reader = Reader(shards)
    for first in range(0, len(positions), 256):
        chosen = positions[first : first + 256]
        for position, encoded in zip(chosen.tolist(), reader.read(chosen), strict=True):
            if isinstance(encoded, bytes):
                yield position, hashlib.sha256(encoded).digest()


def _key(shards: ShardSet, position: int) -> str:
    return shards.index["key"][position].decode(errors="replace")
