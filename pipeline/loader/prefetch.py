"""Batches made ahead of the training loop: threads read the bytes, one more has the backend make views of them."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch

from ..augment.params import AugmentParams
from ..images import DecodeError
from ..shards.dataset import ShardSet
from ..shards.reader import Reader, ReadFailure
from .bad_samples import BadSampleTracker


class Batch(NamedTuple):
    """What the training loop gets; B is this rank's share of the global batch, V the number of views per image."""

    views: torch.Tensor
    """(V B, 3, S, S) float32 on the device, channels-last, normalized; view v of sample i is row v B + i.

    V is 2 for contrasting views of the same image, 1 for fine-tuning, distillation and evaluation: then (B, 3, S, S).
    """
    label: torch.Tensor
    """(B,) int64 on the device; -1 for none."""
    index: torch.Tensor
    """(B,) int64 on the host: the sample's place in the shard set; of the replacement where the one due was bad."""


def shards_of(shards: ShardSet, samples: np.ndarray) -> np.ndarray:
    """The shards that hold `samples` ((n,) integers), ascending."""
    return np.unique(np.searchsorted(shards.shard_starts, samples, side="right") - 1)


class Prefetcher:
    """Samples to batches, two stages of threads ahead of the consumer: bytes, then views.

    Args:
        shards, reader: where the samples are, and what reads their bytes.
        backend: (encoded images, parameters) -> views; closed with this, as the reader is.
        device: of the views.
        quarantine: what takes the place of bad images.
    """

    def __init__(
        self,
        shards: ShardSet,
        reader: Reader,
        backend: Callable[[list[bytes], AugmentParams], torch.Tensor],
        device: torch.device,
        bad_samples: BadSampleTracker,
    ):
        self.shards, self.reader, self.backend = shards, reader, backend
        self.device, self.bad_samples = device, bad_samples
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(
        self,
        plan: Iterator[tuple[int, np.ndarray, np.ndarray | None]],
        parameters: Callable[[int, np.ndarray], AugmentParams],
        prefetch: int,
    ) -> Iterator[Batch]:
        """One batch per (epoch, samples, shards that come next) in `plan`, in order.

        Its views are those that `parameters` gives for (epoch, samples). Shards of a remote set are fetched whole and
        ahead; where `plan` has None for them, samples are read one by one.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(2, "read") as readers, ThreadPoolExecutor(1, "augment") as augmenter:
            ahead: deque = deque()
            reading: deque = deque(maxlen=prefetch + 1)  # the shards of batches that may not have been read yet
            try:
                for epoch, samples, coming in plan:
                    if coming is not None:
                        reading.append(shards_of(self.shards, samples))
                        self.reader.prefetch(np.unique(np.concatenate(reading)), coming)
                    read = readers.submit(self._read, samples, epoch, stop)
                    ahead.append(augmenter.submit(self._augment, samples, epoch, read, parameters, stop))
                    if len(ahead) > prefetch:
                        yield self._hand_over(*ahead.popleft().result())
                while ahead:
                    yield self._hand_over(*ahead.popleft().result())
            finally:  # the consumer may stop early: then wait neither for a server nor for what was not started
                stop.set()
                augmenter.shutdown(wait=False, cancel_futures=True)
                readers.shutdown(wait=False, cancel_futures=True)

    def _read(
        self, samples: np.ndarray, epoch: int, stop: threading.Event
    ) -> tuple[np.ndarray, list[bytes | ReadFailure]]:
        chosen = self.bad_samples.choose(samples, epoch)
        return chosen, self.reader.read(chosen, stop)

    def _augment(self, samples, epoch, read, parameters, stop) -> tuple[Batch, torch.cuda.Event | None, int, int]:
        chosen, encoded = read.result()
        with torch.cuda.stream(self.stream):  # no effect without a CUDA device
            while True:
                bad = {place: data for place, data in enumerate(encoded) if isinstance(data, ReadFailure)}
                if not bad:
                    try:
                        views = self.backend(encoded, parameters(epoch, chosen))
                        break
                    except DecodeError as error:
                        places = error.args[1:] or self._undecodable(encoded, parameters(epoch, chosen))
                        if not places:
                            raise  # each can be decoded by itself: it is not the images
                        bad = dict.fromkeys(places, ReadFailure("the image can't be decoded"))
                for until in (None, epoch):
                    found = {place: data.reason for place, data in bad.items() if data.transient == (until is not None)}
                    self.bad_samples.add({int(chosen[place]): reason for place, reason in found.items()}, until)
                renewed = self.bad_samples.choose(samples, epoch)
                changed = np.flatnonzero(renewed != chosen)
                for place, data in zip(changed, self.reader.read(renewed[changed], stop), strict=True):
                    encoded[place] = data
                chosen = renewed
            label = torch.from_numpy(self.shards.index["label"][chosen]).to(self.device, non_blocking=True)
            event = self.stream.record_event() if self.stream else None
        return Batch(views, label, torch.from_numpy(chosen)), event, int((chosen != samples).sum()), epoch

    def _undecodable(self, encoded: list[bytes], parameters: AugmentParams) -> list[int]:
        """The places of the images that the backend refuses, each tried by itself: not every backend can tell."""
        places = []
        for place in range(len(encoded)):
            one = {field.name: getattr(parameters, field.name)[:, [place]] for field in fields(parameters)}
            try:
                self.backend([encoded[place]], AugmentParams(**one))
            except DecodeError:
                places.append(place)
        return places

    def _hand_over(self, batch: Batch, event: torch.cuda.Event | None, replaced: int, epoch: int) -> Batch:
        self.bad_samples.count(replaced, epoch)
        if event is not None:  # ordered on the device, without waiting on the host
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            batch.views.record_stream(current)
            batch.label.record_stream(current)
        return batch

    def close(self) -> None:
        self.reader.close()
        self.backend.close()
