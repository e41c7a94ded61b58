"""Resident images: every image is decoded once and kept in memory, on the device that augments it.

Filling has no pass of its own: an image is stored when a batch first needs it, so the first epoch is loading as without
a store. Sample order, replacements and resumption do not depend on what is stored.
"""

import math
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from psutil import virtual_memory
from torch import Tensor

from ..augment.gpu import pinned
from ..common import UserError
from ..images.pixel_format import decode_pixels
from ..shards.dataset import ShardSet
from ..shards.format import ROWS
from ..shards.reader import Reader, ReadFailure
from .bad_samples import UNDECODABLE

AUTO_SHARE = 4
"""With "auto", resident images take at most 1 / AUTO_SHARE of a GPU's memory, or of the host's available memory."""
CONTROL_GROUP = Path("/sys/fs/cgroup")
GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of a control group, of version 2 and 1, with the limit and the use of memory, and the entry of memory.stat for
cached files that are not in use."""

_stores: WeakValueDictionary[int, "PixelStore"] = WeakValueDictionary()  # id of a shard set -> its newest store


class PixelStore:
    """Decoded images of a shard set in one allocation, in the order in which they were added.

    Any number of threads may use it. On the host, memory is in use only as far as it is filled.

    Args:
        shards: the set, whose index has the sizes of the images.
        device: where to keep them.
        samples: (n,) int64, samples that may be added; None for all.

    Attributes:
        pixels: (bytes,) uint8 on the device.
        offset: (N,) int64, where each sample of the set starts in `pixels`, in bytes; -1 if it is not stored.
        closed: (N,) bool, samples that are stored, are being stored by another thread, or must not be.
    """

    def __init__(self, shards: ShardSet, device: torch.device, samples: np.ndarray | None = None):
        self.shards, self.device, self.samples = shards, device, samples
        self.pixels = torch.empty(decoded_bytes(shards, samples), dtype=torch.uint8, device=device)
        dtype = shards.pixel_format.dtype
        on_host = device.type == "cpu"
        self._levels = self.pixels.numpy().view(dtype) if on_host else self.pixels.view(getattr(torch, dtype.name))
        self.offset = np.full(len(shards), -1, np.int64)
        self.closed = np.full(len(shards), samples is not None)
        if samples is not None:
            self.closed[samples] = False
        self._used, self._lock = 0, threading.Lock()
        if not on_host:
            self._stream = torch.cuda.Stream(device)  # the default stream would queue copies behind training steps
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which may still use the memory

    @property
    def filled(self) -> float:
        """Share of the memory that is filled, 0 to 1; less than 1 at the end if some images can't be decoded."""
        return self._used / max(len(self.pixels), 1)

    def images(self, samples: np.ndarray) -> list[np.ndarray | Tensor]:
        """Stored images of `samples` (n,), (H, W, C) each: arrays on the host, tensors on a GPU; not copies."""
        height, width = self.shards.index["height"][samples], self.shards.index["width"][samples]
        return list(map(self._at, self.offset[samples].tolist(), height.tolist(), width.tolist()))

    def add(self, sample: int, pixels: np.ndarray) -> np.ndarray | Tensor | None:
        """Store the decoded image of a sample, (H, W, C) of the size in its index; None if the sample is closed."""
        with self._lock:
            if self.closed[sample]:
                return None
            self.closed[sample], offset = True, self._used
            self._used += pixels.nbytes
        image = self._at(offset, *pixels.shape[:2])
        if self.device.type == "cpu":
            image[:] = pixels
        else:
            with torch.cuda.stream(self._stream):
                image.copy_(pinned(pixels, self.device), non_blocking=True)
            self._stream.record_event().synchronize()  # the streams of the batches do not wait for this one
        self.offset[sample] = offset
        return image

    def _at(self, offset: int, height: int, width: int) -> np.ndarray | Tensor:
        channels, first = self.shards.pixel_format.channels, offset // self._levels.itemsize
        return self._levels[first : first + height * width * channels].reshape(height, width, channels)


class ResidentReader:
    """Reader of decoded images that reads and decodes only those that are not in a store yet, and stores them.

    Takes the place of a `Reader` in the `Prefetcher`.

    Args:
        reader: reads encoded images; closed together with this one.
        store: decoded images.
        workers: number of threads that decode.
    """

    def __init__(self, reader: Reader, store: PixelStore, workers: int):
        self.reader, self.store, self.shards = reader, store, reader.shards
        self.workers, self.threads = workers, ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def prefetch(self, now: Iterable[int], ahead: Iterable[int] = ()) -> None:
        """`Reader.prefetch` of those shards that hold images to be stored."""
        if not self.reader.local:
            self.reader.prefetch(self._incomplete(now), self._incomplete(ahead))

    def _incomplete(self, shards: Iterable[int]) -> list[int]:
        starts = self.shards.shard_starts
        return [shard for shard in shards if not self.store.closed[starts[shard] : starts[shard + 1]].all()]

    def read(
        self, samples: np.ndarray, stop: threading.Event | None = None
    ) -> list[np.ndarray | Tensor | bytes | ReadFailure]:
        """Images of `samples`, in that order; see `Reader.read` for the arguments and errors.

        Returns:
            n decoded images, see `PixelStore.images`; encoded ones where the store is closed or the size in the index
            is wrong; a `ReadFailure` where an image can't be read or decoded.
        """
        stored = self.store.offset[samples] >= 0
        if stored.all():
            return self.store.images(samples)
        images: list = [None] * len(samples)
        for places, part in (
            (np.flatnonzero(stored), self.store.images(samples[stored])),
            (np.flatnonzero(~stored), self.reader.read(samples[~stored], stop)),
        ):
            for place, image in zip(places.tolist(), part, strict=True):
                images[place] = image
        remaining = iter(np.flatnonzero(~stored).tolist())  # shared by the threads
        jobs = [self.threads.submit(self._decode, samples, images, remaining) for _ in range(self.workers)]
        for job in jobs:
            job.result()
        return images

    def _decode(self, samples: np.ndarray, images: list, remaining: Iterator[int]) -> None:
        """Decode and store the images at the `remaining` places."""
        sizes = self.shards.index[["height", "width"]]
        for i in remaining:
            sample = int(samples[i])
            if isinstance(images[i], ReadFailure) or self.store.closed[sample]:
                continue
            pixels = decode_pixels(images[i], self.shards.pixel_format)
            if pixels is None:
                images[i] = UNDECODABLE
            elif pixels.shape[:2] == sizes[sample].tolist():
                stored = self.store.add(sample, pixels)
                images[i] = images[i] if stored is None else stored

    def close(self) -> None:
        """End the threads; the store is freed with its last user."""
        self.threads.shutdown()
        self.reader.close()


def create_store(
    resident: str, shards: ShardSet, samples: np.ndarray | None, image_device: torch.device | None, epochs: int | None
) -> PixelStore | None:
    """Create the store of a loader, or share that of an earlier one; None to decode images whenever they are needed.

    Args:
        resident: "auto", "on" or "off", see `LoaderConfig`.
        shards, samples, epochs: of the loader, see `ViewLoader`.
        image_device: of the backend, see `Backend`.

    Raises:
        UserError: "on", but the backend takes no decoded images, or they do not fit into the memory.
    """
    if resident == "off" or (resident == "auto" and (image_device is None or epochs == 1)):
        return None
    if image_device is None:
        raise UserError(
            "The augmentation backend decodes the images itself, so they can't be resident; use --loader.backend "
            "opencv or --loader.resident auto."
        )
    if store := shared_store(shards, samples, image_device):
        return store
    if resident == "auto" and not fits(shards, samples, image_device):
        return None
    if resident == "on":
        needed, limit = decoded_bytes(shards, samples), memory_bytes(image_device, whole=True)
        if needed > limit:
            raise UserError(
                f"The decoded images of {shards.root} take {needed / 1e9:.3g} GB, more than the {limit / 1e9:.3g} GB "
                "of memory that are available to each process; use --loader.resident auto or off."
            )
    store = _stores[id(shards)] = PixelStore(shards, image_device, samples)
    return store


def fits(shards: ShardSet, samples: np.ndarray | None, device: torch.device) -> bool:
    """Whether "auto" keeps the decoded images of `samples`, see `decoded_bytes`, in the memory of a device."""
    limit = memory_bytes(device, whole=False)
    kept = shared_store(shards, samples, device) is not None
    return kept or decoded_bytes(shards, samples, enough=limit) <= limit


def shared_store(shards: ShardSet, samples: np.ndarray | None, device: torch.device) -> PixelStore | None:
    """The store of an earlier loader of the same samples that is still in use."""
    store = find_store(shards, device)
    return store if store is not None and np.array_equal(store.samples, samples) else None


def find_store(shards: ShardSet, image_device: torch.device | None) -> PixelStore | None:
    """The newest store of this very set that `create_store` created on this device and that is still in use."""
    store = _stores.get(id(shards))  # a store keeps its set alive, so that no other set has this id
    return store if store is not None and store.device == image_device else None


def memory_bytes(device: torch.device, whole: bool) -> int:
    """Bytes that the images may occupy in this process: all that is available, or the share of "auto".

    The processes of a host share its memory. A GPU's share is one of its whole memory, since most of what training
    needs is not allocated yet.
    """
    if device.type == "cuda":
        available, total = torch.cuda.mem_get_info(device)
        return available if whole else min(available, total // AUTO_SHARE)
    available = available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return available if whole else available // AUTO_SHARE


def machine_memory() -> int:
    """Memory in bytes of this machine, or the limit of its container (control group)."""
    limits = [virtual_memory().total]
    for limit, *_ in GROUP_FILES:
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int((CONTROL_GROUP / limit).read_text()))
    return min(limits)


def available_memory() -> int:
    """Memory in bytes that this machine, or its container (control group), can provide without swapping."""
    available = [virtual_memory().available]
    for limit, usage, cached in GROUP_FILES:
        with suppress(OSError, ValueError):  # no such file, or "max"
            free = int((CONTROL_GROUP / limit).read_text()) - int((CONTROL_GROUP / usage).read_text())
            counts = dict(map(str.split, (CONTROL_GROUP / limit).with_name("memory.stat").read_text().splitlines()))
            available.append(free + int(counts.get(cached, 0)))  # the kernel drops cached files that are not in use
    return min(available)


def decoded_bytes(shards: ShardSet, samples: np.ndarray | None, enough: float = math.inf) -> int:
    """Size of the decoded images of `samples` ((n,) int64, None for all) in bytes; stops counting above `enough`."""
    count, total = len(shards) if samples is None else len(samples), 0
    channels, bits = shards.pixel_format
    for first in range(0, count, ROWS):
        part = slice(first, first + ROWS)
        rows = shards.index[part if samples is None else samples[part]]
        total += int((rows["height"].astype(np.int64) * rows["width"]).sum()) * channels * bits // 8
        if total > enough:
            break
    return total
