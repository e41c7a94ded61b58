"""Frozen features of a set of images."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


@torch.no_grad()
def embed(
    function: Callable[[Tensor], Tensor],
    batches: Callable[..., Iterable],
    samples: np.ndarray,
    session: Any,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features of `samples`, batch by batch and in their order; the ranks share the work and each gets all of it.

    Where a bad image was replaced by another one, both its place and the replacement are left out, so that what comes
    out does not depend on the number of ranks.

    Args:
        function: (B, 3, S, S) -> (B, D); an encoder in evaluation mode, or `raw_pixels`.
        batches: called with samples=...; yields batches with `views` (B, 3, S, S), `label` (B,) and `index` (B,), in order.
        samples: (N,) int64, places in the shard set.
        session: has rank, world_size and gather, which maps (n, ...) of each rank to (world_size * n, ...), rank-major.

    Yields:
        features (n, D) float32, labels (n,) int64 and samples (n,) int64, on the device of the batches.
    """
    count, world_size = len(samples), session.world_size
    padded = np.resize(samples, -(-count // world_size) * world_size)  # every rank the same number
    begin = 0
    for batch in batches(samples=padded[session.rank :: world_size]):
        parts = function(batch.views).float(), batch.label, batch.index.to(batch.label.device)
        features, label, index = (_interleave(session.gather(part.contiguous()), world_size) for part in parts)
        due = torch.from_numpy(padded[begin : begin + len(index)][: count - begin]).to(index.device)
        begin += len(index)
        kept = index[: len(due)] == due
        yield features[: len(due)][kept], label[: len(due)][kept], due[kept]


def _interleave(gathered: Tensor, world_size: int) -> Tensor:
    """(W n, ...) rank-major -> the order in which the samples were dealt to the ranks."""
    return gathered.unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1)


def raw_pixels(views: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 3 * 32 * 32): the baseline that has learned nothing, on views averaged down to 32 px."""
    return adaptive_avg_pool2d(views, min(32, views.shape[-1])).flatten(1)
