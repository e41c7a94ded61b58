"""Scoring features on a train and a test split, and the table that is shown at the end of a run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

from evaluation.features import embed
from evaluation.knn import knn_top1
from evaluation.linear import linear_top1


@dataclass(frozen=True)
class Evaluator:
    """Scores any features; the ranks share the embedding and each ends with the same figures."""

    train: tuple[Any, np.ndarray]
    """(split, its labelled samples): neighbours, and what the linear classifier learns from."""
    test: tuple[Any, np.ndarray]
    """(split, its labelled samples) to be classified."""
    central_batches: Callable[[Any, np.ndarray], Iterable]
    """(split, samples) -> batches of their central views."""
    gather: Callable[[Tensor], Tensor]
    """(n, ...) of each rank -> (W n, ...) of all, rank-major."""
    rank: int
    world_size: int
    k: int
    """Neighbours that vote."""
    max_bank: int
    """At most so many samples of a split are used, evenly spread."""

    def __call__(self, function: Callable[[Tensor], Tensor], linear: bool = True) -> dict[str, float]:
        """`knn_top1`, and `linear_top1` if wanted, of the features that `function` makes of (B, 3, S, S) views."""
        bank, query = self._features(function, *self.train), self._features(function, *self.test)
        scores = {"knn_top1": knn_top1(*bank, *query, k=self.k)}
        if linear:
            scores["linear_top1"] = linear_top1(*bank, *query)
        return scores

    def _features(self, function: Callable[[Tensor], Tensor], split: Any, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        count = min(len(samples), self.max_bank)
        chosen = samples[np.linspace(0, len(samples) - 1, count).astype(np.int64)]
        padded = np.resize(chosen, -(-count // self.world_size) * self.world_size)  # every rank the same number
        features, label = embed(function, self.central_batches(split, padded[self.rank :: self.world_size]))
        return self._in_order(features)[:count], self._in_order(label)[:count]

    def _in_order(self, part: Tensor) -> Tensor:
        return self.gather(part).unflatten(0, (self.world_size, -1)).transpose(0, 1).flatten(0, 1)


def report_table(report: dict[str, dict[str, float]]) -> Table:
    """One line per kind of features: {"trained": {"knn_top1": 0.7, "linear_top1": 0.8}, ...}."""
    table = Table("features", "kNN top-1", "linear top-1")
    for name, scores in report.items():
        table.add_row(name, f"{scores['knn_top1']:.3f}", f"{scores['linear_top1']:.3f}")
    return table
