"""From a shard set to batches on the device: order -> bytes -> views, a few batches ahead of the training loop."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch

from errors import UserError
from pipeline.images import DecodeError
from pipeline.order import Order
from pipeline.reader import Reader
from pipeline.recipe import Recipe, ViewParameters, central_view, draw_views
from pipeline.shards import ShardSet

BACKENDS = ("auto", "dali", "kornia", "host")


class Batch(NamedTuple):
    """What the training loop gets; B is this rank's share of the global batch."""

    views: torch.Tensor
    """(V B, 3, S, S) float32 on the device, channels-last, normalised; view v of sample i is row v B + i."""
    label: torch.Tensor
    """(B,) int64 on the device; -1 for none."""
    index: torch.Tensor
    """(B,) int64 on the host: the sample's place in the shard set."""


def choose_backend(name: str, device: torch.device) -> str:
    """`auto` is DALI on a CUDA device (Kornia where DALI is not installed), Kornia on other GPUs, OpenCV on CPUs."""
    if name not in BACKENDS:
        raise UserError(f"There is no backend {name!r}: choose one of {', '.join(BACKENDS)}.")
    if name != "auto":
        return name
    if device.type == "cpu":
        return "host"
    return "dali" if device.type == "cuda" and _dali_loads() else "kornia"


def _dali_loads() -> bool:
    try:  # it may be installed and still not load, beside another CUDA say
        import_module("nvidia.dali")
    except (ImportError, OSError):
        return False
    return True


def make_backend(name: str, recipe: Recipe, device: torch.device, batch_size: int, views: int, workers: int):
    """The chosen backend; each is imported only when it is used, so that none has to be installed."""
    name = choose_backend(name, device)
    if name == "dali":
        from pipeline.dali_backend import DaliBackend as Backend
    elif name == "kornia":
        from pipeline.kornia_backend import KorniaBackend as Backend
    else:
        from pipeline.host_backend import HostBackend as Backend
    return Backend(recipe, device, batch_size, views, workers)


class _Producer:
    """Samples to batches, two stages of threads ahead of the consumer: bytes, then views."""

    def __init__(self, shards: ShardSet, recipe: Recipe, device: torch.device, *, backend, batch_size, views, workers):
        self.shards, self.device = shards, device
        self.reader = Reader(shards)
        self.backend = make_backend(backend, recipe, device, batch_size, views, workers)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(
        self, plan: Iterator[np.ndarray], parameters: Callable[[np.ndarray], ViewParameters], prefetch: int
    ) -> Iterator[Batch]:
        """One batch per array of sample numbers in `plan`, in order."""
        with ThreadPoolExecutor(2, "read") as readers, ThreadPoolExecutor(1, "augment") as augmenter:
            ahead: deque = deque()
            try:
                for samples in plan:
                    encoded = readers.submit(self.reader, samples)
                    ahead.append(augmenter.submit(self._augment, samples, encoded, parameters))
                    if len(ahead) > prefetch:
                        yield self._hand_over(*ahead.popleft().result())
                while ahead:
                    yield self._hand_over(*ahead.popleft().result())
            finally:  # the consumer may stop early: what was not begun is not worth waiting for
                augmenter.shutdown(wait=False, cancel_futures=True)
                readers.shutdown(wait=False, cancel_futures=True)

    def _augment(self, samples, encoded, parameters) -> tuple[Batch, torch.cuda.Event | None]:
        with torch.cuda.stream(self.stream):  # no effect without a CUDA device
            try:
                views = self.backend(encoded.result(), parameters(samples))
            except DecodeError as error:
                which = [self.shards.index["key"][samples[place]].decode() for place in error.args[1:]]
                raise UserError(
                    f"An image of {self.shards.root} can't be decoded ({', '.join(which) or error}): see with "
                    f"`python -m pipeline.shards verify {self.shards.root}` whether the shard was damaged and copy it "
                    "again, else convert the images anew."
                ) from error
            label = torch.from_numpy(self.shards.index["label"][samples]).to(self.device, non_blocking=True)
            event = self.stream.record_event() if self.stream else None
        return Batch(views, label, torch.from_numpy(samples)), event

    def _hand_over(self, batch: Batch, event) -> Batch:
        if event is not None:  # ordered on the device, without waiting on the host
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            batch.views.record_stream(current)
            batch.label.record_stream(current)
        return batch

    def close(self) -> None:
        self.backend.close()


class ViewLoader:
    """Epochs of two-view batches, one after the other; the whole state is a position.

    Iterating yields what is left of the current epoch and then moves on to the next one.

    Args:
        shards: where the samples are.
        recipe: how they are augmented.
        batch_size: *global* batch size in samples; each rank gets batch_size / world_size of them.
        seed: of order and views.
        device: where the batches are handed over.
        backend: one of `BACKENDS`.
        rank, world_size: which slice of every global batch this process takes.
        workers: threads for decoding and augmenting.
        prefetch: batches that are prepared ahead.

    Raises:
        UserError: the batch is larger than the shard set or does not divide by the ranks.
    """

    def __init__(
        self,
        shards: ShardSet,
        recipe: Recipe,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        backend: str = "auto",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
        prefetch: int = 2,
    ):
        if batch_size % world_size:
            raise UserError(
                f"A global batch of {batch_size} does not divide by {world_size} processes: "
                f"use --batch-size {max(batch_size // world_size, 1) * world_size}."
            )
        if batch_size > len(shards):
            raise UserError(
                f"A batch of {batch_size} is larger than the data set {shards.root} ({len(shards)} images): "
                f"use a --batch-size of at most {len(shards)}."
            )
        self.shards, self.recipe, self.seed = shards, recipe, seed
        self.order = Order(shards.shard_starts, batch_size, seed)
        self.rank, self.world_size, self.prefetch = rank, world_size, prefetch
        self.epoch, self.step = 0, 0
        self.producer = _Producer(
            shards, recipe, device, backend=backend, batch_size=batch_size // world_size, views=2, workers=workers
        )

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.order.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self._position()
        self.epoch, self.step = epoch, first
        plan = (self.order.batch(epoch, step, self.rank, self.world_size) for step in range(first, len(self)))
        rows = self.shards.index

        def parameters(samples: np.ndarray) -> ViewParameters:
            return draw_views(self.recipe, self.seed, epoch, samples, rows["height"][samples], rows["width"][samples])

        for batch in self.producer.batches(plan, parameters, self.prefetch):
            self.step += 1  # counted when handed over: batches prepared ahead are not part of the position
            yield batch
        self.epoch, self.step = epoch + 1, 0

    def _position(self) -> tuple[int, int]:
        """(epoch, step) of the next batch to be handed over; after the last of an epoch, the first of the next."""
        done, step = divmod(self.step, len(self))
        return self.epoch + done, step

    def state_dict(self) -> dict[str, int]:
        """The position: the next batch to be handed over."""
        epoch, step = self._position()
        return {"epoch": epoch, "step": step, "seed": self.seed, "batch_size": self.order.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position.

        Raises:
            UserError: the position belongs to another order (seed or global batch size differ).
        """
        for name, value in (("seed", self.seed), ("batch_size", self.order.batch_size)):
            if state[name] != value:
                raise UserError(f"The run was begun with {name} {state[name]}: go on with the same instead of {value}.")
        self.epoch, self.step = state["epoch"], state["step"]

    def close(self) -> None:
        self.producer.close()


def central_batches(
    shards: ShardSet,
    recipe: Recipe,
    samples: np.ndarray,
    *,
    batch_size: int,
    device: torch.device,
    backend: str = "auto",
    workers: int = 1,
) -> Iterator[Batch]:
    """The central view of each of `samples` ((n,) integers), in that order, for evaluation."""
    producer = _Producer(shards, recipe, device, backend=backend, batch_size=batch_size, views=1, workers=workers)
    plan = (samples[first : first + batch_size] for first in range(0, len(samples), batch_size))
    rows = shards.index

    def parameters(chosen: np.ndarray) -> ViewParameters:
        return central_view(recipe, rows["height"][chosen], rows["width"][chosen])

    try:
        yield from producer.batches(plan, parameters, prefetch=2)
    finally:
        producer.close()
