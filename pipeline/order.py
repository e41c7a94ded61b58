"""Which sample comes when: a function of (seed, epoch, position) and of nothing else."""

import numpy as np

from pipeline.philox import uniforms

SHARD_STREAM, SAMPLE_STREAM = 2**32 - 1, 2**32 - 2  # apart from the views, which count from 0


class Order:
    """A seeded global order in which reads stay nearly sequential.

    Shards are permuted and taken in blocks; samples are permuted within a block. Every sample comes once per epoch;
    the last `dropped` samples of the order, which do not fill a global batch, wait for another epoch. Rank r of W
    takes the r-th slice of every global batch, so any number of ranks sees the same global batches.

    Args:
        shard_starts: (S + 1,) where each shard's samples start, as in `ShardSet.shard_starts`.
        batch_size: samples in a global batch.
        seed: of the whole run.
        block_shards: how many shards are mixed with each other.
    """

    def __init__(self, shard_starts: np.ndarray, batch_size: int, seed: int, block_shards: int = 16):
        self.shard_starts, self.batch_size, self.seed = np.asarray(shard_starts), batch_size, seed
        self.block_shards = block_shards
        self.steps_per_epoch, self.dropped = divmod(int(self.shard_starts[-1]), batch_size)
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """(N,) int64: the order of an epoch; the last one asked for is kept."""
        if epoch != self._epoch:
            starts = self.shard_starts
            shards = np.argsort(self._draw(epoch, len(starts) - 1, SHARD_STREAM), kind="stable")
            rank_in_sample_order = self._draw(epoch, int(starts[-1]), SAMPLE_STREAM)
            blocks = []
            for first in range(0, len(shards), self.block_shards):
                block = shards[first : first + self.block_shards]
                samples = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in block])
                blocks.append(samples[np.argsort(rank_in_sample_order[samples], kind="stable")])
            self._epoch, self._permutation = epoch, np.concatenate(blocks)
        return self._permutation

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """(batch_size / world_size,) int64: this rank's slice of global batch `step` of an epoch."""
        local = self.batch_size // world_size
        first = step * self.batch_size + rank * local
        return self.permutation(epoch)[first : first + local]

    def _draw(self, epoch: int, count: int, stream: int) -> np.ndarray:
        return uniforms(self.seed, epoch, np.arange(count), stream, 1)[:, 0]
