"""Sample order: a seeded permutation in which reads stay nearly sequential."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..common import UserError
from ..philox import uniforms

SHARD_STREAM, SAMPLE_STREAM = 2**32 - 1, 2**32 - 2
"""Random number streams of the sampler, distinct from those of the views, which count from 0."""


class PlannedBatch(NamedTuple):
    """Samples of one batch, before anything is read."""

    epoch: int
    samples: np.ndarray
    """(B,) int64: indices in the shard set."""
    upcoming: np.ndarray | None
    """(n,) int64: shards to fetch ahead, in the order of use; None to read samples of a remote set by byte ranges."""


class ShardSampler:
    """Sample order as a function of (seed, epoch, position) alone.

    Shards are assigned to blocks, blocks follow one another, and samples are permuted within a block. Every block
    contains shards from all parts of the set, so batches are mixed even if the set is sorted. Every sample comes once
    per epoch, except for the last `dropped` samples of the order, which do not fill a global batch. Rank r of W takes
    the r-th slice of every global batch, so any number of ranks sees the same global batches.

    With `node_groups` = G, every epoch redistributes the shards over G groups of ranks, and a rank reads only shards of
    its own group: remote traffic does not grow with the number of nodes. A global batch then consists of G equal parts,
    one per group; it depends on G, but not on the number of ranks in a group.

    With `samples`, the order contains only these samples, and shards without any of them are skipped.

    Memory: some bytes per shard and the permutations of two blocks, independent of the number of samples.

    Args:
        shard_starts: (S + 1,) int64, first sample of each shard, as in `ShardSet.shard_starts`; below 2**32 samples.
        batch_size: samples in a global batch.
        seed: seed of the run.
        block_shards: largest number of shards whose samples are mixed with each other.
        node_groups: number of groups over which ranks and shards are distributed; 1 for one order over all shards.
        samples: (n,) int64, ascending: samples to include; None for all.

    Raises:
        UserError: the batch size is not divisible by the groups, or a group's shards do not fill its part of one batch.
        ValueError: `samples` are not ascending, or some are not in the shards.
    """

    def __init__(
        self,
        shard_starts: np.ndarray,
        batch_size: int,
        seed: int,
        block_shards: int = 16,
        node_groups: int = 1,
        samples: np.ndarray | None = None,
    ):
        self.batch_size, self.seed, self.samples = batch_size, seed, samples
        self.block_shards, self.node_groups = block_shards, node_groups
        # Internally, shards and samples are numbered among the included ones only; `batch` and `upcoming_shards`
        # translate them back.
        if samples is None:
            self.shards, self.starts = None, np.asarray(shard_starts)
        else:
            self.shards, self.starts = _included(np.asarray(shard_starts), samples)
        if batch_size % node_groups:
            raise UserError(
                f"A global batch of {batch_size} is not divisible by {node_groups} node groups; "
                f"use --batch-size {max(batch_size // node_groups, 1) * node_groups}."
            )
        count, tiers = int(self.starts[-1]), (len(self.starts) - 1) // node_groups
        # a group receives one shard of each tier, so in every epoch it has at least the smallest shard of each
        smallest = np.sort(np.diff(self.starts))[::-1][: tiers * node_groups].reshape(tiers, node_groups)[:, -1]
        self.steps_per_epoch = int(smallest.sum()) // (batch_size // node_groups)
        self.dropped = count - self.steps_per_epoch * batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"{count} samples in {len(self.starts) - 1} shards do not fill a global batch of {batch_size} for "
                f"{node_groups} node groups; use a smaller --batch-size, fewer groups or more and smaller shards."
            )
        # two each, because a batch may extend from one block, or a lookahead from one epoch, into the next
        self._blocks = lru_cache(maxsize=2)(self._assign_blocks)
        self._samples = lru_cache(maxsize=2)(self._permute_block)

    def plan(
        self,
        epoch: int,
        step: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        epochs: int | None = None,
        whole_shards: bool = True,
    ) -> Iterator[PlannedBatch]:
        """Yield this rank's batches from a position on, up to the end of the last of `epochs` (None for no end).

        Args:
            whole_shards: fetch whole shards ahead; False leaves `PlannedBatch.upcoming` None.
        """
        while epochs is None or epoch < epochs:
            for position in range(step, self.steps_per_epoch):
                upcoming = None
                if whole_shards:
                    upcoming = self.upcoming_shards(epoch, position, position, rank, world_size, epochs)
                yield PlannedBatch(epoch, self.batch(epoch, position, rank, world_size), upcoming)
            epoch, step = epoch + 1, 0

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return this rank's slice of global batch `step` of an epoch: (batch_size / world_size,) int64.

        Raises:
            UserError: the number of ranks is not divisible by the node groups.
        """
        group, first, last = self._span(step, step, rank, world_size)
        starts = self._blocks(epoch, group)[1]
        parts = []
        while first < last:
            block = int(np.searchsorted(starts, first, side="right")) - 1  # never an empty block
            parts.append(self._samples(epoch, group, block)[first - starts[block] : last - starts[block]])
            first += len(parts[-1])
        samples = np.concatenate(parts)
        return samples if self.samples is None else self.samples[samples]

    def upcoming_shards(
        self, epoch: int, first: int, last: int, rank: int = 0, world_size: int = 1, epochs: int | None = None
    ) -> np.ndarray:
        """Return the shards that a rank reads in steps `first` to `last`, and those of the block after them.

        After a rank's last block of an epoch comes the first of the next, unless this one is the last of `epochs`.

        Returns:
            (n,) int64, unique, in the order of use.
        """
        group, begin, end = self._span(first, last, rank, world_size)
        blocks, starts = self._blocks(epoch, group)
        low, high = np.searchsorted(starts, [begin, end - 1], side="right") - 1
        final = self.steps_per_epoch - 1
        if starts[high + 1] < self._span(final, final, rank, world_size)[2]:
            following = [blocks[high + 1]]
        elif epoch + 1 == epochs:
            following = []
        else:  # this rank's part of the epoch ends in this block
            following = [self._blocks(epoch + 1, group)[0][0]]
        shards = np.concatenate([*blocks[low : high + 1], *following])
        shards = shards[np.sort(np.unique(shards, return_index=True)[1])]
        return shards if self.shards is None else self.shards[shards]

    def _span(self, first: int, last: int, rank: int, world_size: int) -> tuple[int, int, int]:
        """(group, begin, end) of a rank's slices of steps `first` to `last` in the order of its group."""
        if world_size % self.node_groups:
            raise UserError(
                f"{world_size} processes are not divisible by {self.node_groups} node groups; use a multiple."
            )
        group, position = divmod(rank, world_size // self.node_groups)
        share, local = self.batch_size // self.node_groups, self.batch_size // world_size
        return group, first * share + position * local, last * share + (position + 1) * local

    def _assign_blocks(self, epoch: int, group: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Shards of each block of a group, and (blocks + 1,) the position of each block in the group's order."""
        sizes = np.diff(self.starts)
        draw = uniforms(self.seed, epoch, np.arange(len(sizes)), SHARD_STREAM, 2)
        key, group_key = draw[:, 0], draw[:, 1]
        # tiers of G shards of nearly equal size; each group receives one shard per tier, so groups are equally long
        by_size = np.lexsort((key, -sizes))
        tier = np.empty_like(by_size)
        tier[by_size] = np.arange(len(sizes)) // self.node_groups
        by_tier = np.lexsort((group_key, tier))
        own = np.sort(by_tier[group :: self.node_groups])
        # strata of neighbors in the stored order; each block receives one shard per stratum. Strata are counted from
        # both ends, so that the incomplete one lies in the middle and biases no block toward an end.
        count = -(-len(own) // self.block_shards)
        half = len(own) // (2 * count) * count
        inward = np.concatenate([own[:half], own[half:][::-1]])
        shards = inward[np.lexsort((key[inward], np.arange(len(own)) // count))]
        blocks = [block[np.argsort(key[block], kind="stable")] for block in (shards[b::count] for b in range(count))]
        return blocks, np.cumsum([0, *(int(sizes[block].sum()) for block in blocks)])

    def _permute_block(self, epoch: int, group: int, block: int) -> np.ndarray:
        """Samples of a block in their order: (n,) int64."""
        starts = self.starts
        shards = self._blocks(epoch, group)[0][block]
        samples = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
        key = uniforms(self.seed, epoch, samples, SAMPLE_STREAM, 1)[:, 0]  # draws this block's only
        return samples[np.argsort(key, kind="stable")]


def _included(shard_starts: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S',) shards that contain any of `samples`, and (S' + 1,) position of each one's first sample in `samples`."""
    if len(samples) and (samples[0] < 0 or samples[-1] >= shard_starts[-1] or (np.diff(samples) <= 0).any()):
        raise ValueError(f"samples must be ascending, unique and below {shard_starts[-1]}")
    starts = np.searchsorted(samples, shard_starts)
    shards = np.flatnonzero(np.diff(starts))
    return shards, np.append(starts[shards], len(samples))
