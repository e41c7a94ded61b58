"""Which sample comes when: a function of (seed, epoch, position) and of nothing else."""

from functools import lru_cache

import numpy as np

from ..common import UserError
from ..philox import uniforms

SHARD_STREAM, SAMPLE_STREAM = 2**32 - 1, 2**32 - 2  # apart from the views, which count from 0


class ShardSampler:
    """A seeded global order in which reads stay nearly sequential.

    Shards are dealt to blocks, blocks come one after the other, and samples are permuted within a block. Every block
    gets shards from all parts of the set, so a set that is sorted in any way still gives mixed batches. Every sample
    comes once per epoch; the last `dropped` ones of the order, which do not fill a global batch, wait for another
    epoch. Rank r of W takes the r-th slice of every global batch, so any number of ranks sees the same global batches.

    With `node_groups` = G, each epoch deals the shards anew to G groups of ranks, and a rank reads shards of its own
    group alone: remote traffic does not grow with the number of nodes. A global batch is then G equal parts, one from
    each group; it depends on G, but not on the number of ranks in a group.

    With `samples`, the order runs over these alone, and shards that hold none of them are not there for it.

    Memory: some bytes per shard and the permutations of two blocks, however many samples there are.

    Args:
        shard_starts: (S + 1,) where each shard's samples start, as in `ShardSet.shard_starts`; below 2**32 samples.
        batch_size: samples in a global batch.
        seed: of the whole run.
        block_shards: how many shards, at most, are mixed with each other.
        node_groups: into how many groups ranks and shards are divided; 1 for one order over all shards.
        samples: (n,) int64, ascending: the samples that take part; None for all.

    Raises:
        UserError: the batch does not divide by the groups, or a group's shards do not fill its part of one batch.
        ValueError: `samples` are not ascending, or not all of them in the shards.
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
        # From here on shards and samples are counted among those that take part; `batch` and `upcoming_shards` give
        # them their names again.
        if samples is None:
            self.shards, self.starts = None, np.asarray(shard_starts)
        else:
            self.shards, self.starts = _taking_part(np.asarray(shard_starts), samples)
        if batch_size % node_groups:
            raise UserError(
                f"A global batch of {batch_size} does not divide by {node_groups} node groups: "
                f"use a batch size of {max(batch_size // node_groups, 1) * node_groups}."
            )
        count, tiers = int(self.starts[-1]), (len(self.starts) - 1) // node_groups
        # what every group has in every epoch, whichever shard of a tier it is dealt: the smallest of each tier
        smallest = np.sort(np.diff(self.starts))[::-1][: tiers * node_groups].reshape(tiers, node_groups)[:, -1]
        self.steps_per_epoch = int(smallest.sum()) // (batch_size // node_groups)
        self.dropped = count - self.steps_per_epoch * batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"A global batch of {batch_size} is more than {count} samples in {len(self.starts) - 1} shards "
                f"fill for {node_groups} node groups: use a smaller batch, fewer groups or more and smaller shards."
            )
        # two, since a batch may reach from one block, or a look ahead from one epoch, into the next
        self._blocks = lru_cache(maxsize=2)(self._deal_blocks)
        self._samples = lru_cache(maxsize=2)(self._permute_block)

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """(batch_size / world_size,) int64: this rank's slice of global batch `step` of an epoch.

        Raises:
            UserError: the ranks do not divide by the node groups.
        """
        group, first, last = self._span(step, step, rank, world_size)
        starts = self._blocks(epoch, group)[1]
        parts = []
        while first < last:
            block = int(np.searchsorted(starts, first, side="right")) - 1  # of empty blocks, none is ever found
            parts.append(self._samples(epoch, group, block)[first - starts[block] : last - starts[block]])
            first += len(parts[-1])
        places = np.concatenate(parts)
        return places if self.samples is None else self.samples[places]

    def upcoming_shards(
        self, epoch: int, first: int, last: int, rank: int = 0, world_size: int = 1, epochs: int | None = None
    ) -> np.ndarray:
        """(n,) int64: the shards that a rank reads in steps `first` to `last`, then those of one block more.

        They come in the order of need, none twice; past a rank's last block of an epoch the next epoch begins, unless
        this one is the last of `epochs`.
        """
        group, begin, end = self._span(first, last, rank, world_size)
        blocks, starts = self._blocks(epoch, group)
        low, high = np.searchsorted(starts, [begin, end - 1], side="right") - 1
        final = self.steps_per_epoch - 1
        if starts[high + 1] < self._span(final, final, rank, world_size)[2]:
            beyond = [blocks[high + 1]]
        elif epoch + 1 == epochs:
            beyond = []
        else:  # what this rank takes of the epoch ends in this block
            beyond = [self._blocks(epoch + 1, group)[0][0]]
        shards = np.concatenate([*blocks[low : high + 1], *beyond])
        shards = shards[np.sort(np.unique(shards, return_index=True)[1])]
        return shards if self.shards is None else self.shards[shards]

    def _span(self, first: int, last: int, rank: int, world_size: int) -> tuple[int, int, int]:
        """(group, begin, end): where in the order of its group a rank's slices of steps `first` to `last` lie."""
        if world_size % self.node_groups:
            raise UserError(
                f"{world_size} processes do not divide by {self.node_groups} node groups: use a multiple of them."
            )
        group, place = divmod(rank, world_size // self.node_groups)
        share, local = self.batch_size // self.node_groups, self.batch_size // world_size
        return group, first * share + place * local, last * share + (place + 1) * local

    def _deal_blocks(self, epoch: int, group: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of each block of a group, and (blocks + 1,) where each block starts in the group's order."""
        sizes = np.diff(self.starts)
        draw = uniforms(self.seed, epoch, np.arange(len(sizes)), SHARD_STREAM, 2)
        key, deal = draw[:, 0], draw[:, 1]
        # tiers of G shards of nearly the same size, each group gets one of every tier: the groups stay equally long
        by_size = np.lexsort((key, -sizes))
        tier = np.empty_like(by_size)
        tier[by_size] = np.arange(len(sizes)) // self.node_groups
        dealt = np.lexsort((deal, tier))
        own = np.sort(dealt[group :: self.node_groups])
        # strata of neighbors in the stored order, each block gets one of every stratum; counted from both ends, so
        # that the one that does not suffice for all blocks lies in the middle and draws no block towards an end
        count = -(-len(own) // self.block_shards)
        half = len(own) // (2 * count) * count
        inwards = np.concatenate([own[:half], own[half:][::-1]])
        shards = inwards[np.lexsort((key[inwards], np.arange(len(own)) // count))]
        blocks = [block[np.argsort(key[block], kind="stable")] for block in (shards[b::count] for b in range(count))]
        return blocks, np.cumsum([0, *(int(sizes[block].sum()) for block in blocks)])

    def _permute_block(self, epoch: int, group: int, block: int) -> np.ndarray:
        """(n,) int64: the samples of a block in their order."""
        starts = self.starts
        shards = self._blocks(epoch, group)[0][block]
        samples = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
        key = uniforms(self.seed, epoch, samples, SAMPLE_STREAM, 1)[:, 0]  # addressed: only this block's are drawn
        return samples[np.argsort(key, kind="stable")]


def _taking_part(shard_starts: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S',) the shards that hold any of `samples`, and (S' + 1,) where theirs start in `samples`."""
    if len(samples) and (samples[0] < 0 or samples[-1] >= shard_starts[-1] or (np.diff(samples) <= 0).any()):
        raise ValueError(f"not ascending samples below {shard_starts[-1]}, none twice")
    starts = np.searchsorted(samples, shard_starts)
    shards = np.flatnonzero(np.diff(starts))
    return shards, np.append(starts[shards], len(samples))
