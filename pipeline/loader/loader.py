"""From a shard set to batches on the device: order -> bytes -> views, a few batches ahead of the training loop."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..augment.backend import choose_backend, create_backend
from ..augment.config import AugmentConfig
from ..augment.params import AugmentParams, center_crop, draw_params
from ..common import UserError
from ..shards.cache import ShardCache
from ..shards.dataset import ShardSet
from ..shards.reader import Reader
from .bad_samples import BadSampleTracker
from .config import LoaderConfig
from .prefetch import Batch, Prefetcher, shards_of
from .sampler import ShardSampler


def worth_whole_shards(shards: ShardSet, samples: np.ndarray, room: int = 0) -> bool:
    """Whether to fetch the shards of a remote set that hold `samples` whole: many are wanted, or all fit in `room`."""
    used = shards_of(shards, samples)
    entries = shards.manifest["shards"]
    return (
        4 * len(samples) >= np.diff(shards.shard_starts)[used].sum() or sum(entries[s]["bytes"] for s in used) <= room
    )


class ViewLoader:
    """Epochs of batches of random views, one after the other; the whole state is a position.

    Iterating yields what is left of the current epoch and then moves on to the next one, whose first batches are
    already being prepared. After the last one of `epochs` it yields nothing.

    Args:
        shards: where the samples are.
        augment: how they are augmented.
        config: backend, threads, prefetching, and how many images may be unreadable.
        batch_size: *global* batch size in samples; each rank gets batch_size / world_size of them.
        seed: of order and views.
        device: where the batches are handed over.
        rank, world_size: which slice of every global batch this process takes.
        epochs: how many there will be, so that nothing is prepared beyond; None for any number.
        bad_samples_file: lists unreadable images; None for no file. With several ranks the caller checks their number
            over all of them (`BadSampleTracker.check`), because each rank counts its own.
        cache: where the shards of a remote set are kept; default as `config` says.
        views_per_image: V. View 0 of a sample is the same whether there is another one or not.
        samples: (n,) int64, ascending: the epochs run over these alone, and so do replacements of bad images; None for
            all. Shards of a remote set are fetched whole if they fit into the cache or at least a quarter of their
            samples is wanted; else the samples are read by byte ranges.

    Raises:
        UserError: the batch is larger than the samples or does not divide by the ranks; while iterating, more than
            `max_bad` of the images are bad.
    """

    def __init__(
        self,
        shards: ShardSet,
        augment: AugmentConfig,
        config: LoaderConfig,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        views_per_image: int = 2,
        samples: np.ndarray | None = None,
        cache: ShardCache | None = None,
        bad_samples_file: Path | None = None,
    ):
        population = len(shards) if samples is None else len(samples)
        if batch_size % world_size:
            raise UserError(
                f"A global batch of {batch_size} does not divide by {world_size} processes: "
                f"use --batch-size {max(batch_size // world_size, 1) * world_size}."
            )
        if batch_size > population:
            part = "data set" if samples is None else "subset of"
            raise UserError(
                f"A batch of {batch_size} is larger than the {part} {shards.root} ({population} images): "
                f"use a --batch-size of at most {population}."
            )
        self.shards, self.augment, self.seed, self.views_per_image = shards, augment, seed, views_per_image
        groups = config.node_groups
        self.sampler = ShardSampler(shards.shard_starts, batch_size, seed, node_groups=groups, samples=samples)
        self.rank, self.world_size, self.prefetch, self.epochs = rank, world_size, config.prefetch, epochs
        self.epoch, self.step = 0, 0
        self.bad_samples = BadSampleTracker(shards, seed, config.max_bad, bad_samples_file, samples)
        self.reader = Reader(shards, cache or config.cache())
        self.whole_shards = samples is None or worth_whole_shards(shards, samples, self.reader.cache.limit_bytes)
        self.backend_name = choose_backend(config.backend, device)
        backend = create_backend(
            self.backend_name, augment, device, batch_size // world_size, views_per_image, config.threads
        )
        self.prefetcher = Prefetcher(shards, self.reader, backend, device, self.bad_samples)
        self._batches, self._next = iter(()), None  # what is being prepared, and from which position on

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        self.epoch, self.step = self._position()
        if self.epochs is not None and self.epoch >= self.epochs:
            return
        while self.step < len(self):
            if self._next != (self.epoch, self.step):
                self._stop()
                self._batches = self.prefetcher.batches(self._plan(), self._parameters, self.prefetch)
            try:
                batch = next(self._batches)
            except BaseException:
                self._stop()  # after an error or Ctrl-C, iterating again starts at the same batch
                raise
            self.step += 1  # counted when handed over: batches prepared ahead are not part of the position
            self._next = self._position()
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def _plan(self) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """(epoch, samples of this rank, shards that it reads from there on) of every batch from the position on."""
        epoch, step = self.epoch, self.step
        while self.epochs is None or epoch < self.epochs:
            for position in range(step, len(self)):
                part, coming = (self.rank, self.world_size), None
                if self.whole_shards:
                    coming = self.sampler.upcoming_shards(epoch, position, position, *part, self.epochs)
                yield epoch, self.sampler.batch(epoch, position, *part), coming
            epoch, step = epoch + 1, 0

    def _parameters(self, epoch: int, samples: np.ndarray) -> AugmentParams:
        rows = self.shards.index
        height, width = rows["height"][samples], rows["width"][samples]
        return draw_params(self.augment, self.seed, epoch, samples, height, width, self.views_per_image)

    def _position(self) -> tuple[int, int]:
        """(epoch, step) of the next batch to be handed over; after the last of an epoch, the first of the next."""
        done, step = divmod(self.step, len(self))
        return self.epoch + done, step

    def state_dict(self) -> dict[str, int]:
        """The position: the next batch to be handed over."""
        epoch, step = self._position()
        return {"epoch": epoch, "step": step, **self._order_options()}

    def _order_options(self) -> dict[str, int]:
        options = {"seed": self.seed, "batch_size": self.sampler.batch_size, "node_groups": self.sampler.node_groups}
        if self.sampler.samples is not None:
            options["samples_crc32"] = zlib.crc32(self.sampler.samples.astype("<i8").tobytes())
        return options

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position.

        Raises:
            UserError: the position belongs to another order (seed, global batch size, node groups or samples differ).
        """
        options = self._order_options()
        if state.get("samples_crc32") != options.pop("samples_crc32", None):
            raise UserError("The run was begun on other samples of the data set: go on with the same subset.")
        for name, value in options.items():
            if state[name] != value:
                raise UserError(f"The run was begun with {name} {state[name]}: go on with the same instead of {value}.")
        self.epoch, self.step = state["epoch"], state["step"]

    def _stop(self) -> None:
        if hasattr(self._batches, "close"):  # a generator: its threads end with it
            self._batches.close()
        self._batches, self._next = iter(()), None

    def close(self) -> None:
        self._stop()
        self.prefetcher.close()


def center_crop_batches(
    shards: ShardSet,
    augment: AugmentConfig,
    samples: np.ndarray,
    config: LoaderConfig,
    *,
    batch_size: int,
    device: torch.device,
    cache: ShardCache | None = None,
    bad_samples_file: Path | None = None,
) -> Iterator[Batch]:
    """The central view of each of `samples` ((n,) integers), in that order, for evaluation; the last batch is partial.

    A bad image is replaced by another one of `samples`, whose label comes with it.
    """
    replacements = BadSampleTracker(shards, 0, config.max_bad, bad_samples_file, samples)
    backend = create_backend(config.backend, augment, device, batch_size, 1, config.threads)
    prefetcher = Prefetcher(shards, Reader(shards, cache or config.cache()), backend, device, replacements)
    whole = worth_whole_shards(shards, samples)
    plan = (
        (
            0,
            samples[first : first + batch_size],
            shards_of(shards, samples[first:][: 16 * batch_size]) if whole else None,
        )
        for first in range(0, len(samples), batch_size)
    )
    rows = shards.index

    def parameters(_: int, chosen: np.ndarray) -> AugmentParams:
        return center_crop(augment, rows["height"][chosen], rows["width"][chosen])

    try:
        yield from prefetcher.batches(plan, parameters, prefetch=2)
    finally:
        prefetcher.close()
