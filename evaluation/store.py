"""Features of whole splits, embedded by all ranks together and reused while nothing that determines them changes."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import feature_name, load_features, save_features
from .common import PIPELINE, UserError, progress_bar
from .features import ALONE, embed


@dataclass(frozen=True)
class EvalSplit:
    """Images of one split that an evaluation uses."""

    name: str
    shards: Any  # shard set, with `root`, `checksum`, `classes` and `index`
    samples: np.ndarray  # (n,) int64, ascending positions in the shard set


def eval_splits(train: Any, test: Any | None, labeled: bool) -> list[EvalSplit]:
    """Labeled images of the train and the test split, or all images of whatever splits there are.

    Raises:
        UserError: labels are needed, but there is no test split or a split has no labels.
    """
    named = {train.manifest.get("split") or "data": train} if test is None else {"train": train, "test": test}
    if not labeled:
        return [EvalSplit(name, shards, np.arange(len(shards))) for name, shards in named.items()]
    if test is None:
        raise UserError(
            f"There is no test split in {train.root}; use a folder with train/ and test/ or val/, or images in "
            "one folder per class."
        )
    splits = [EvalSplit(name, shards, np.flatnonzero(shards.index["label"] >= 0)) for name, shards in named.items()]
    for split in splits:
        if not len(split.samples):
            raise UserError(f"No image of {split.shards.root} has a label; use labeled shards.")
    return splits


@dataclass(frozen=True)
class SplitFeatures:
    """Features of one split, on the host of rank 0."""

    features: Tensor  # (n, D) float32, mapped into memory
    label: Tensor  # (n,) int64, -1 for none
    index: Tensor  # (n,) int64, positions in the shard set
    about: dict[str, Any]  # source, checksum, number of images and speed, for the record of the evaluation


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """Features of one encoder, stored in a folder."""

    session: Any  # has `rank`, `world_size`, `device`, `gather`, `sum` and `print`
    forward_features: Callable[[Tensor], Tensor]  # (B, C, S, S) -> h (B, D), by the frozen encoder
    batches: Callable[..., Iterable]  # called with (shard set, samples=...); yields batches of their center crops
    batch_size: int  # images per batch of `batches`
    made_from: dict[str, Any]  # everything besides the images that determines the features
    folder: Path
    max_bad: float  # share of the images of a split that may be unreadable
    bad_samples_file: Path  # where the loader lists unreadable images

    def load_or_embed(self, split: EvalSplit) -> SplitFeatures | None:
        """Features of a split, on rank 0; None on other ranks. Called by all ranks.

        Raises:
            UserError: too many images are unreadable, a feature is not finite, or the disk is full.
        """
        session, is_main, total = self.session, self.session.rank == 0, len(split.samples)
        made_from = self.made_from | {"shards": split.shards.checksum}
        made_from["samples"] = sha256(split.samples.astype("<i8").tobytes()).hexdigest()
        path = self.folder / feature_name(made_from)
        found = load_features(path) if is_main else None
        if found and self._readable_again(split, found[1]):
            found = None
        # rank 0 decides: others may have another disk, or look at it later
        from_cache = session.sum(torch.tensor(float(found is not None), device=session.device)).item() > 0
        source, speed, start_s = f"from the cache in {self.folder}", {}, time.monotonic()
        if not from_cache:
            parts = self._embed(split)
            if is_main:
                save_features(path, parts, made_from)
                found = load_features(path)
            else:
                for _ in parts:
                    pass
            embedding_s = round(time.monotonic() - start_s, 3)
            speed = {"embedding_s": embedding_s, "images_per_s": round(total / embedding_s, 1)}
            source = f"in {self.made_from['precision']} at {speed['images_per_s']:,.0f} images/s"
        if not is_main:
            return None
        features, index = found
        unreadable = total - len(index)
        self._check_unreadable(split, unreadable)
        left_out = f"; {unreadable} unreadable images left out, see {self.bad_samples_file}" if unreadable else ""
        session.print(f"{split.name}: {len(index):,} features of width {features.shape[1]} {source}{left_out}")
        about = {"root": split.shards.root, "sha256": split.shards.checksum, "images": len(index)}
        about |= {"from_cache": from_cache, "left_out": unreadable, **speed}
        return SplitFeatures(features, torch.from_numpy(split.shards.index["label"][index.numpy()]), index, about)

    def _embed(self, split: EvalSplit) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of `embed`, with a progress bar; all ranks stop at too many unreadable images."""
        session, total = self.session, len(split.samples)
        encoded = readable = 0
        with progress_bar(total, f"embedding {split.name}", shown=session.rank == 0) as update:
            batches = partial(self.batches, split.shards)
            for batch in embed(self.forward_features, batches, split.samples, session):
                encoded = min(encoded + self.batch_size * session.world_size, total)
                readable += len(batch[0])
                self._check_unreadable(split, encoded - readable)
                yield batch
                update(completed=encoded)

    def _check_unreadable(self, split: EvalSplit, unreadable: int) -> None:
        total, root = len(split.samples), split.shards.root
        if unreadable > self.max_bad * total:
            raise UserError(
                f"{unreadable} of {total} images of {root} can't be read (see {self.bad_samples_file}), more than "
                f"--loader.max-bad {self.max_bad:g} allows; check the shards with `python -m {PIPELINE}.shards verify "
                f"{root}` or raise --loader.max-bad."
            )

    def _readable_again(self, split: EvalSplit, index: Tensor) -> bool:
        """Whether an image can be read that could not be when the features of the samples `index` were stored.

        The cause may have been transient, such as a failing network, or a shard may have been repaired: its recorded
        checksum, which names the features, is the same. Images that still fail are listed in `bad_samples_file`.
        """
        missing = np.setdiff1d(split.samples, index.numpy())
        if not len(missing):
            return False
        # together with at least as many readable ones, from which the loader draws replacements
        tried = np.union1d(missing, index[: max(len(missing), self.batch_size)].numpy())
        parts = embed(lambda views: views[:, 0, 0], partial(self.batches, split.shards), tried, ALONE)
        with suppress(UserError), closing(parts):  # the shards may be unavailable while their features are stored
            return any(np.isin(readable.numpy(force=True), missing).any() for _, _, readable in parts)
        return False
