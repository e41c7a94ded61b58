"""Prefetching: read and augment batches in threads, ahead of the training loop."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..augment.backend import EpochBackends
from ..augment.gpu import copy_to
from ..augment.params import AugmentParams
from ..images.files import DecodeError
from ..shards.dataset import ShardSet
from ..shards.reader import Reader, ReadFailure
from .bad_samples import UNDECODABLE, BadSampleTracker
from .resident import ResidentReader
from .sampler import PlannedBatch


class Batch(NamedTuple):
    """One training batch; B is this rank's share of the global batch, V the number of views per image."""

    views: Tensor
    """(V B, C, S, S) on the device, channels-last, normalized; view v of sample i is row v B + i.

    float32, or bfloat16 if the loader was created with that dtype. V is 2 for contrastive pretraining and 1 for
    fine-tuning, distillation and evaluation.
    """
    label: Tensor
    """(B,) int64 on the device; -1 for unlabeled samples."""
    index: Tensor
    """(B,) int64 on the host: index of the sample in the shard set, or of its replacement if it was unreadable."""


class AugmentedBatch(NamedTuple):
    """Batch of the augment stage, which the device may still be computing."""

    batch: Batch
    ready: torch.cuda.Event | None
    """Recorded behind the batch on the prefetcher's CUDA stream; None without CUDA."""
    replaced: int
    """Number of samples that were replaced."""
    epoch: int


def shards_of(shards: ShardSet, samples: np.ndarray) -> np.ndarray:
    """Indices of the shards that hold `samples` ((n,) int64), ascending."""
    return np.unique(np.searchsorted(shards.shard_starts, samples, side="right") - 1)


@cache
def loading_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all loaders of a device, because torch reuses freed memory only on the stream that allocated it."""
    return torch.cuda.Stream(device)


class Prefetcher:
    """Stages from planned batches to batches on the device: read -> augment -> hand over.

    Reading and augmenting run in threads, ahead of the consumer. Samples that cannot be read or decoded are replaced.

    At most `prefetch` + 2 batches of views exist at once: `prefetch` that are ready or being augmented, the one that
    the consumer uses and, until it releases that one, the next. No augmentation starts beyond these, however slow the
    consumer is. A CUDA device frees memory in the order of its streams: there, a batch is in use until the step that
    reads it has ended.

    Args:
        reader: reads images; closed together with the prefetcher, like the backends.
        draw: pure function of epoch and samples ((n,) int64) that returns their augmentation parameters.
        backends: augmentation backend of every epoch.
        bad_samples: chooses replacements and counts them.
        device: device of the batches.
        prefetch: number of batches to prepare ahead; 0 prepares each batch when it is needed.
    """

    def __init__(
        self,
        reader: Reader | ResidentReader,
        draw: Callable[[int, np.ndarray], AugmentParams],
        backends: EpochBackends,
        bad_samples: BadSampleTracker,
        *,
        device: torch.device,
        prefetch: int,
    ):
        self.reader, self.draw, self.backends, self.bad_samples = reader, draw, backends, bad_samples
        self.device, self.prefetch = device, prefetch
        self.stream = loading_stream(device) if device.type == "cuda" else None

    def batches(self, plan: Iterable[PlannedBatch]) -> Iterator[Batch]:
        """Yield one batch per planned batch, in order; closing the generator ends its threads.

        Raises:
            UserError: too many samples are bad, or a remote store is unreachable.
        """
        stop = threading.Event()
        augmenting = ThreadPoolExecutor(self.backends.calls_at_once, "augment")
        with ThreadPoolExecutor(2, "read") as readers, augmenting as augmenters:
            ahead: deque[Future[AugmentedBatch]] = deque()
            reading: deque = deque(maxlen=self.prefetch + 1)  # shards of batches that may still be waiting to be read
            try:
                for planned in plan:
                    if planned.upcoming is not None:
                        reading.append(shards_of(self.reader.shards, planned.samples))
                        self.reader.prefetch(np.unique(np.concatenate(reading)), planned.upcoming)
                    read = readers.submit(self._read, planned, stop)
                    ahead.append(augmenters.submit(self._augment, planned, read, stop))
                    if len(ahead) > self.prefetch:
                        yield self._hand_over(ahead.popleft().result())
                while ahead:
                    yield self._hand_over(ahead.popleft().result())
            finally:  # if the consumer stops early, wait neither for a server nor for batches that have not started
                stop.set()
                augmenters.shutdown(wait=False, cancel_futures=True)
                readers.shutdown(wait=False, cancel_futures=True)

    def _read(self, planned: PlannedBatch, stop: threading.Event) -> tuple[np.ndarray, list, AugmentParams]:
        """Read a batch; returns (n,) samples, with known bad ones replaced, their images and their parameters.

        Parameters are drawn here, because the threads of a backend would be idle while the augment stage draws them.
        """
        samples = self.bad_samples.choose(planned.samples, planned.epoch)
        return samples, self.reader.read(samples, stop), self.draw(planned.epoch, samples)

    def _augment(self, planned: PlannedBatch, read: Future, stop: threading.Event) -> AugmentedBatch:
        """Augment a batch as soon as it is read, replacing samples until all of them can be decoded."""
        samples, images, params = read.result()
        with torch.cuda.stream(self.stream):  # no effect without CUDA
            views = None
            while views is None:
                failures = {i: data for i, data in enumerate(images) if isinstance(data, ReadFailure)}
                if not failures:
                    try:
                        views = self.backends(planned.epoch, images, params)
                    except DecodeError as error:
                        failures = {error.args[1]: UNDECODABLE}
                if failures:
                    samples = self._replace(failures, planned, samples, images, stop)
                    params = self.draw(planned.epoch, samples)
            label = copy_to(self.device, self.reader.shards.index["label"][samples])
            ready = self.stream.record_event() if self.stream else None
        replaced = int((samples != planned.samples).sum())
        return AugmentedBatch(Batch(views, label, torch.from_numpy(samples)), ready, replaced, planned.epoch)

    def _replace(
        self,
        failures: dict[int, ReadFailure],
        planned: PlannedBatch,
        samples: np.ndarray,
        images: list,
        stop: threading.Event,
    ) -> np.ndarray:
        """Record failed samples and read replacements into `images`; returns the new samples (n,)."""
        permanent_first = sorted(failures.items(), key=lambda failure: failure[1].transient)
        self.bad_samples.add({int(samples[i]): failure for i, failure in permanent_first}, planned.epoch)
        replaced = self.bad_samples.choose(planned.samples, planned.epoch)
        changed = np.flatnonzero(replaced != samples)
        for i, data in zip(changed, self.reader.read(replaced[changed], stop), strict=True):
            images[i] = data
        return replaced

    def _hand_over(self, augmented: AugmentedBatch) -> Batch:
        """Count replacements and make the current CUDA stream wait for the batch, without blocking the host."""
        self.bad_samples.count(augmented.replaced, augmented.epoch)
        batch = augmented.batch
        if augmented.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(augmented.ready)
            batch.views.record_stream(current)
            batch.label.record_stream(current)
        return batch

    def close(self) -> None:
        """Close reader and backend."""
        self.reader.close()
        self.backends.close()
