"""Frozen features of a set of images."""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .common import PIPELINE, UserError

ALONE = SimpleNamespace(rank=0, world_size=1, gather=lambda x: x)
"""Stand-in for a session of one rank, for `embed`."""


@torch.no_grad()
def embed(
    function: Callable[[Tensor], Tensor],
    batches: Callable[..., Iterable],
    samples: np.ndarray,
    session: Any,
    max_bad: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features of `samples`, batch by batch and in order; the ranks share the work and each receives all features.

    Unreadable images, which the loader replaces by others, are left out, so that the result does not depend on the
    number of ranks.

    Args:
        function: (B, C, S, S) -> (B, D); an encoder in evaluation mode, or `raw_pixels`.
        batches: called with samples=...; yields batches with `views` (B, C, S, S), `label` (B,) and `index` (B,), in
            the order of `samples`.
        samples: (N,) int64, positions in the shard set.
        session: has `rank`, `world_size` and `gather`, which maps (n, ...) of each rank to (world_size * n, ...),
            rank-major.
        max_bad: share of the samples that may be unreadable.

    Yields:
        Features (n, D) float32, labels (n,) int64 and samples (n,) int64, on the device of the batches.

    Raises:
        UserError: more samples are unreadable, on all ranks together; every rank raises.
    """
    count, world_size = len(samples), session.world_size
    padded = np.resize(samples, -(-count // world_size) * world_size)  # the same number for every rank
    first = unreadable = 0
    for batch in batches(samples=padded[session.rank :: world_size]):
        parts = function(batch.views).float(), batch.label, batch.index.to(batch.label.device)
        features, label, index = (_interleave(session.gather(part.contiguous()), world_size) for part in parts)
        expected = torch.from_numpy(padded[first : first + len(index)][: count - first]).to(index.device)
        first += len(index)
        readable = index[: len(expected)] == expected
        kept = expected[readable]
        unreadable += len(expected) - len(kept)
        if unreadable > max_bad * count:
            raise UserError(
                f"{unreadable} of {count} images to evaluate can't be read (see bad_samples.jsonl), more than "
                f"--loader.max-bad {max_bad:g} allows; check the shards with `python -m {PIPELINE}.shards verify "
                "SHARDS` or raise --loader.max-bad."
            )
        yield features[: len(expected)][readable], label[: len(expected)][readable], kept


def _interleave(gathered: Tensor, world_size: int) -> Tensor:
    """Rank-major (W n, ...) -> the order of the samples, which are dealt to the ranks in turn."""
    return gathered.unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1)


def raw_pixels(views: Tensor) -> Tensor:
    """Baseline without learning: views (B, C, S, S), averaged down to at most 32 px, as features (B, C * 32 * 32)."""
    return adaptive_avg_pool2d(views.float(), min(32, views.shape[-1])).flatten(1)
