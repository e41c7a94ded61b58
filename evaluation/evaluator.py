"""Evaluation of frozen features during pretraining."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .common import check_range
from .features import embed
from .knn import knn_top1
from .sgd_probe import linear_top1


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the encoder before, during and after pretraining."""

    knn_every: int = 10
    """Epochs between kNN evaluations; 0 for the end only."""
    k: int = 20
    """Number of neighbors that vote."""
    max_bank: int = 50_000
    """Maximum number of images used per split, spread evenly over it."""
    baselines: bool = True
    """Also evaluate raw pixels and the untrained encoder."""

    def __post_init__(self) -> None:
        check_range("--eval.knn-every", self.knn_every, 0, 10**9)
        check_range("--eval.k", self.k, 1, 10**9)
        check_range("--eval.max-bank", self.max_bank, 1, 10**9)


@dataclass(frozen=True)
class Evaluator:
    """kNN and linear accuracy of any features; the ranks share the embedding and return the same values."""

    train: tuple[Any, np.ndarray]  # (shard set, its labeled samples (n,)) that vote and train the linear classifier
    test: tuple[Any, np.ndarray]  # (shard set, its labeled samples (n,)) to classify
    batches: Callable[..., Iterable]  # called with (shard set, samples=...); yields batches of their center crops
    session: Any  # see `evaluation.features.embed`
    config: EvalConfig
    max_bad: float  # share of the images of a split that may be unreadable

    def __call__(self, function: Callable[[Tensor], Tensor], linear: bool = True) -> dict[str, float]:
        """Compute `knn_top1` and, unless `linear` is False, `linear_top1` of features.

        Args:
            function: views (B, C, S, S) -> features (B, D).

        Raises:
            UserError: more than `max_bad` of the images of a split can't be read.
        """
        bank, query = self._features(function, *self.train), self._features(function, *self.test)
        scores = {"knn_top1": knn_top1(*bank, *query, k=self.config.k)}
        if linear:
            scores["linear_top1"] = linear_top1(*bank, *query)
        return scores

    def _features(
        self, function: Callable[[Tensor], Tensor], shards: Any, samples: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Features (n, D) and labels (n,) of at most `max_bank` samples."""
        count = min(len(samples), self.config.max_bank)
        chosen = samples[np.linspace(0, len(samples) - 1, count).astype(np.int64)]
        parts = list(embed(function, partial(self.batches, shards), chosen, self.session, self.max_bad))
        return torch.cat([features for features, _, _ in parts]), torch.cat([label for _, label, _ in parts])
