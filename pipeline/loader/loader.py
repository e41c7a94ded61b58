"""Loaders: random views for training, center crops for evaluation, with batches prepared in the background."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..augment.backend import Backend, EpochBackends, choose_backend, create_backend
from ..augment.config import AugmentConfig
from ..augment.params import AugmentParams, center_crop, draw_params
from ..common import UserError
from ..shards.cache import ShardCache
from ..shards.dataset import ShardSet
from ..shards.reader import Reader
from .bad_samples import BadSampleTracker
from .config import LoaderConfig
from .prefetch import Batch, Prefetcher, shards_of
from .resident import ResidentReader, create_store, find_store, fits
from .sampler import PlannedBatch, ShardSampler


def worth_whole_shards(shards: ShardSet, samples: np.ndarray, cache_bytes: int = 0) -> bool:
    """Whether to fetch whole shards of a remote set rather than byte ranges of `samples` ((n,) int64).

    True if at least a quarter of the shards' samples is wanted, or if all of these shards fit into `cache_bytes`.
    """
    used = shards_of(shards, samples)
    total_bytes = sum(shards.manifest["shards"][shard]["bytes"] for shard in used)
    return 4 * len(samples) >= np.diff(shards.shard_starts)[used].sum() or total_bytes <= cache_bytes


def describe_schedule(augment: AugmentConfig, epochs: int | None) -> str:
    """Sizes of the views in words, such as ", 16 px for 30 epochs, then 32 px"; "" if they do not change."""
    parts = [f", {size} px for {each} epoch{'s' * (each > 1)}" for size, each in augment.phases]
    fills = sum(each for _, each in augment.phases) == epochs
    return "".join(parts) + (f", then {augment.size} px" if parts and not fills else "")


class ViewLoader:
    """Batches of random views, epoch by epoch; the whole state is a position.

    Iterating yields the rest of the current epoch, while the first batches of the next one are already being prepared.
    After the last of `epochs`, iterating yields nothing.

    Args:
        shards: shard set to read.
        augment: augmentation options.
        config: loader options.
        batch_size: *global* batch size in samples; each rank receives batch_size / world_size of them.
        seed: seed of the sample order and the views.
        device: device of the batches.
        dtype: of the views, float32 or bfloat16. An encoder that computes in bfloat16 rounds float32 views itself, so
            bfloat16 views change nothing but the memory and the copies, which they halve.
        rank, world_size: this process's slice of every global batch.
        epochs: number of epochs, so that nothing is prepared beyond the last one; None for any number.
        views_per_image: V. View 0 of a sample does not depend on V.
        samples: (n,) int64, ascending: restrict epochs, and replacements of unreadable images, to these samples; None
            for all. Whole shards of a remote set are fetched if they fit into the cache or at least a quarter of their
            samples is wanted; otherwise the samples are read by byte ranges.
        cache: cache for shards of a remote set; created from `config` by default.
        bad_samples_file: list of unreadable images to append to; None for no file. Each rank counts its own, so with
            several ranks the caller must check the total (`BadSampleTracker.check`).

    Attributes:
        backend_name: augmentation backend; if "auto" chose it, the reason; sizes of the views if they change; and
            whether images are resident.
        store: decoded images; None if images are decoded whenever they are needed.

    Raises:
        UserError: the batch size exceeds the number of samples or is not divisible by the number of ranks; while
            iterating, more than `config.max_bad` of the images are unreadable.
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
        dtype: torch.dtype = torch.float32,
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
                f"A batch of {batch_size} is larger than the {part} {shards.root} ({population} images); "
                + (f"use --batch-size {population} or less." if population > 1 else "use more images.")
            )
        self.shards, self.seed, self.epochs = shards, seed, epochs
        self.rank, self.world_size = rank, world_size
        self.epoch, self.step = 0, 0
        groups = config.node_groups
        self.sampler = ShardSampler(shards.shard_starts, batch_size, seed, node_groups=groups, samples=samples)
        self.bad_samples = BadSampleTracker(shards, seed, config.max_bad, bad_samples_file, samples)
        self.reader = Reader(shards, cache or config.cache())
        self.whole_shards = samples is None or worth_whole_shards(shards, samples, self.reader.cache.limit_bytes)

        def draw(epoch: int, samples: np.ndarray) -> AugmentParams:
            height, width = shards.index["height"][samples], shards.index["width"][samples]
            return draw_params(augment.at_epoch(epoch), seed, epoch, samples, height, width, views=views_per_image)

        images = shards.pixel_format
        on_gpu = device.type == "cuda" and config.resident != "off" and epochs != 1 and fits(shards, samples, device)
        choice = choose_backend(config.backend, device, augment.size, config.threads, images, fits_device=on_gpu)
        self.backend_name = f"{choice}{describe_schedule(augment, epochs)}"

        def create(views: AugmentConfig) -> Backend:
            share = batch_size // world_size
            return create_backend(choice.name, views, device, share, views_per_image, config.threads, dtype, images)

        backends = EpochBackends(augment, create)
        self.store = create_store(config.resident, shards, samples, backends.image_device, epochs)
        if self.store is not None:
            self.backend_name += f", images resident ({len(self.store.pixels) / 1e6:,.0f} MB)"
            self.reader = ResidentReader(self.reader, self.store, config.threads)
        self.prefetcher = Prefetcher(
            self.reader, draw, backends, self.bad_samples, device=device, prefetch=config.prefetch
        )
        self._batches: Iterator[Batch] = iter(())
        self._next: tuple[int, int] | None = None  # position of the next batch in `_batches`

    def __len__(self) -> int:
        """Number of steps in an epoch."""
        return self.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        self.epoch, self.step = self._position()
        if self.epochs is not None and self.epoch >= self.epochs:
            return
        while self.step < len(self):
            if self._next != (self.epoch, self.step):
                self._start()
            try:
                batch = next(self._batches)
            except BaseException:
                self._stop()  # after an error or Ctrl-C, iterating again starts at the same batch
                raise
            self.step += 1  # counts batches handed over, not those prepared ahead
            self._next = self._position()
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    @property
    def filling(self) -> str:
        """How far the memory of resident images is filled, for a person; "" without it, and once it is full."""
        if self.store is None or (percent := int(100 * self.store.filled)) >= 99:  # bad images leave a rest
            return ""
        return f"{percent}% resident"

    def _position(self) -> tuple[int, int]:
        """(epoch, step) of the next batch to hand over; after the last one of an epoch, the first of the next."""
        done, step = divmod(self.step, len(self))
        return self.epoch + done, step

    def state_dict(self) -> dict[str, int]:
        """Return the position, and the options on which the sample order depends."""
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
            UserError: seed, global batch size, node groups or samples differ, so the sample order does too.
        """
        options = self._order_options()
        if state.get("samples_crc32") != options.pop("samples_crc32", None):
            raise UserError("The run was started on other samples of the data set; use the same subset.")
        for name, value in options.items():
            if state[name] != value:
                raise UserError(f"The run was started with {name} {state[name]}; use the same value, not {value}.")
        self.epoch, self.step = state["epoch"], state["step"]

    def _start(self) -> None:
        """Prepare batches from the current position on."""
        self._stop()
        ranks, options = (self.rank, self.world_size), {"epochs": self.epochs, "whole_shards": self.whole_shards}
        self._batches = self.prefetcher.batches(self.sampler.plan(self.epoch, self.step, *ranks, **options))

    def _stop(self) -> None:
        if hasattr(self._batches, "close"):  # a generator; closing it ends its threads
            self._batches.close()
        self._batches, self._next = iter(()), None

    def close(self) -> None:
        """End all threads and release the cache."""
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
    dtype: torch.dtype = torch.float32,
    cache: ShardCache | None = None,
    bad_samples_file: Path | None = None,
) -> Iterator[Batch]:
    """Yield the center crop of each of `samples` ((n,) int64), in that order, for evaluation.

    The last batch may be smaller. An unreadable image is replaced by another one of `samples`, with its label. Images
    that a `ViewLoader` of this very shard set keeps resident are used from there. `config.max_bad` is not applied,
    because a rank sees only its share of the images: see `evaluation.features.embed`.

    Args:
        shards, augment, config, device, dtype, cache, bad_samples_file: as for `ViewLoader`.
        batch_size: samples per batch of this process.

    Raises:
        UserError: a sample and all that could replace it are unreadable.
    """
    whole_shards = worth_whole_shards(shards, samples)

    def plan() -> Iterator[PlannedBatch]:
        for first in range(0, len(samples), batch_size):
            upcoming = shards_of(shards, samples[first:][: 16 * batch_size]) if whole_shards else None
            yield PlannedBatch(0, samples[first : first + batch_size], upcoming)

    def draw(_: int, chosen: np.ndarray) -> AugmentParams:
        return center_crop(augment, shards.index["height"][chosen], shards.index["width"][chosen])

    bad_samples = BadSampleTracker(shards, 0, 1.0, bad_samples_file, samples)
    images, on_device = shards.pixel_format, find_store(shards, device) is not None
    choice = choose_backend(config.backend, device, augment.size, config.threads, images, fits_device=on_device)

    def create(views: AugmentConfig) -> Backend:
        return create_backend(choice.name, views, device, batch_size, 1, config.threads, dtype, images)

    backends = EpochBackends(augment.full_size, create)
    reader = Reader(shards, cache or config.cache())
    store = find_store(shards, backends.image_device) if config.resident != "off" else None
    if store is not None:
        reader = ResidentReader(reader, store, config.threads)
    prefetcher = Prefetcher(reader, draw, backends, bad_samples, device=device, prefetch=2)
    try:
        yield from prefetcher.batches(plan())
    finally:
        prefetcher.close()
