"""Tests of the sample sequence: every sample once per epoch, independent of ranks, nearly sequential, well mixed."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from pipeline.loader.sampler import ShardSampler
from pipeline.philox import uniforms

RANKS = (1, 2, 3, 4, 8)
IMAGENET = np.minimum(np.arange(1253) * 1024, 1_281_167)  # 1251 shards of 1024 images and one of 143


@st.composite
def samplers(draw, multiple: int = 1, groups: int = 1) -> ShardSampler:
    """Draw a sampler of a few shards of unequal size, some empty, with a batch size divisible by `multiple`."""
    shards = draw(st.lists(st.integers(0, 40), min_size=groups, max_size=12 * groups))
    starts = np.cumsum([0, *shards])
    tiers = np.sort(shards)[::-1][: len(shards) // groups * groups].reshape(-1, groups)
    largest = tiers[:, -1].sum() * groups // multiple
    if not largest:
        shards = [multiple] * groups
        starts, largest = np.cumsum([0, *shards]), groups
    batch_size = multiple * draw(st.integers(1, int(largest)))
    seed, block_shards = draw(st.integers(0, 2**64 - 1)), draw(st.integers(1, 5))
    return ShardSampler(starts, batch_size, seed, block_shards, groups)


epochs = st.integers(0, 1000)


def epoch_of(sampler: ShardSampler, epoch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """(steps, batch / world_size)."""
    steps = range(sampler.steps_per_epoch)
    return np.stack([sampler.batch(epoch, step, rank, world_size) for step in steps])


def global_batches(sampler: ShardSampler, epoch: int, world_size: int) -> np.ndarray:
    """Slices of all ranks, concatenated: (steps, batch)."""
    return np.concatenate([epoch_of(sampler, epoch, rank, world_size) for rank in range(world_size)], axis=1)


def shard_of(sampler: ShardSampler, samples: np.ndarray) -> np.ndarray:
    return np.searchsorted(sampler.starts, samples, side="right") - 1


@given(sampler=samplers(), epoch=epochs)
def test_each_sample_once_per_epoch_except_for_the_dropped_ones(sampler, epoch):
    samples = epoch_of(sampler, epoch).ravel()
    total = sampler.starts[-1]
    assert len(np.unique(samples)) == len(samples) == total - sampler.dropped
    assert 0 <= sampler.dropped < sampler.batch_size
    assert samples.min() >= 0 and samples.max() < total and samples.dtype == np.int64


@given(sampler=samplers(multiple=24), epoch=epochs)
def test_any_number_of_ranks_sees_the_same_global_batches(sampler, epoch):
    alone = epoch_of(sampler, epoch)
    for world_size in RANKS:
        assert np.array_equal(global_batches(sampler, epoch, world_size), alone)


@given(sampler=samplers(multiple=24), epoch=epochs, data=st.data())
def test_resuming_at_any_position_with_any_number_of_ranks(sampler, epoch, data):
    """Neither a new sampler nor one that was used at another position changes the sequence."""
    step = data.draw(st.integers(0, sampler.steps_per_epoch - 1))
    before, after = (data.draw(st.sampled_from(RANKS)) for _ in range(2))
    whole = np.concatenate([global_batches(sampler, e, before) for e in (epoch, epoch + 1)])
    fresh = ShardSampler(sampler.starts, sampler.batch_size, sampler.seed, sampler.block_shards)
    rest = np.concatenate([global_batches(fresh, e, after) for e in (epoch, epoch + 1)][::-1])
    rest = np.roll(rest, sampler.steps_per_epoch, axis=0)  # the second epoch comes first here
    assert np.array_equal(rest[step:], whole[step:])
    resumed = ShardSampler(sampler.starts, sampler.batch_size, sampler.seed, sampler.block_shards)
    assert np.array_equal(resumed.batch(epoch, step), whole[step])


@given(sampler=samplers(), epoch=epochs)
def test_samples_stay_in_blocks_of_shards(sampler, epoch):
    """At most one block of shards is in use at a time, and every shard is used once."""
    one_by_one = ShardSampler(sampler.starts, 1, sampler.seed, sampler.block_shards)
    shards_in_order = shard_of(sampler, epoch_of(one_by_one, epoch).ravel())
    shards, first, count = np.unique(shards_in_order, return_index=True, return_counts=True)
    last = len(shards_in_order) - 1 - np.unique(shards_in_order[::-1], return_index=True)[1]
    assert np.array_equal(count, np.diff(sampler.starts)[shards])
    started = np.searchsorted(np.sort(first), np.arange(len(shards_in_order)), side="right")
    finished = np.searchsorted(np.sort(last), np.arange(len(shards_in_order)), side="left")
    assert (started - finished).max() <= sampler.block_shards


def test_samples_of_a_block_are_sorted_by_random_keys():
    """The keys must never change: a run resumed with a later version continues with the same sequence."""
    sampler = ShardSampler(np.arange(0, 401, 50), 400, seed=5)  # eight shards, one block
    keys = uniforms(5, 3, np.arange(400), 2**32 - 2, 1)[:, 0]
    assert np.array_equal(sampler.batch(3, 0), np.argsort(keys))
    assert sampler.batch(3, 0)[:5].tolist() == [134, 19, 121, 235, 137]


def rank_correlation(samples: np.ndarray) -> float:
    """Spearman's rank correlation of the sequence with the stored one."""
    place = np.empty(len(samples))
    place[np.argsort(samples)] = np.arange(len(samples))
    return float(np.corrcoef(np.arange(len(samples)), place)[0, 1])


@pytest.mark.parametrize("shards", [100, 128, 1252])
def test_the_order_is_uncorrelated_with_the_stored_order(shards):
    """With the default block size, for any seed and epoch."""
    starts = IMAGENET if shards == 1252 else np.arange(shards + 1) * 100
    batch_size = 4096 if shards == 1252 else 100
    for seed in range(2 if shards == 1252 else 30):
        sampler = ShardSampler(starts, batch_size, seed)
        assert abs(rank_correlation(epoch_of(sampler, seed).ravel())) < 0.02


def test_batches_contain_many_shards_from_all_parts_of_the_set():
    sampler = ShardSampler(np.arange(128 * 100 + 1, step=100), 256, seed=0)
    for batch in epoch_of(sampler, 0):
        shards = shard_of(sampler, batch)
        assert len(np.unique(shards)) >= 14  # of the sixteen of a block
        assert len(np.unique(shards // 8)) >= 14 and (np.diff(shards) == 0).mean() < 0.15


def test_epochs_and_seeds_differ():
    starts = np.arange(0, 4001, 100)
    sampler = ShardSampler(starts, 100, seed=0)
    first = epoch_of(sampler, 0).ravel()
    for other in (epoch_of(sampler, 1), epoch_of(ShardSampler(starts, 100, seed=1), 0)):
        assert (first == other.ravel()).mean() < 0.01
    assert np.array_equal(epoch_of(sampler, 0).ravel(), first)  # independent of requests in between
    ragged = ShardSampler(starts, 300, seed=0)
    assert set(epoch_of(ragged, 0).ravel()) != set(epoch_of(ragged, 1).ravel())  # the dropped samples vary


def test_memory_does_not_depend_on_the_number_of_samples():
    def peak_mb(sampler: ShardSampler, steps: range) -> float:
        tracemalloc.start()
        for step in steps:
            sampler.batch(0, step)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        return peak

    def shards_of_1000(count: int) -> ShardSampler:
        return ShardSampler(np.arange(count + 1) * 1000, 4096, seed=0)

    few, many = shards_of_1000(64), shards_of_1000(10_000)  # 64 thousand and ten million samples
    smallest = peak_mb(few, range(4))
    assert smallest < 10
    assert peak_mb(many, range(4)) < smallest + 3  # some numbers per shard during their distribution
    assert peak_mb(many, range(4, 40)) < smallest + 3
    assert peak_mb(many, range(2000, 2004)) < smallest + 3


# ---- upcoming shards


@given(sampler=samplers(), epoch=epochs, data=st.data())
def test_upcoming_shards(sampler, epoch, data):
    first = data.draw(st.integers(0, sampler.steps_per_epoch - 1))
    last = data.draw(st.integers(first, sampler.steps_per_epoch - 1))
    upcoming = sampler.upcoming_shards(epoch, first, last).tolist()
    read = {int(s) for step in range(first, last + 1) for s in shard_of(sampler, sampler.batch(epoch, step))}
    assert len(set(upcoming)) == len(upcoming) and read <= set(upcoming)


def test_upcoming_shards_are_those_of_this_block_and_the_next_also_across_epochs():
    sampler = ShardSampler(np.arange(0, 801, 10), 32, seed=1, block_shards=4)  # 20 blocks of 40 samples, 25 steps
    blocks = [set(shard_of(sampler, b)) for e in (0, 1) for b in epoch_of(sampler, e).reshape(20, 40)]
    for steps, wanted in [((0, 0), [0, 1]), ((0, 1), [0, 1, 2]), ((2, 2), [1, 2, 3]), ((24, 24), [19, 20])]:
        upcoming = sampler.upcoming_shards(0, *steps)
        assert set(upcoming) == set().union(*(blocks[b] for b in wanted))
        assert set(upcoming[:4]) == blocks[wanted[0]]  # first those used first


# ---- node groups


@given(groups=st.sampled_from([2, 3, 4]), epoch=epochs, data=st.data())
def test_node_groups(groups, epoch, data):
    """Every sample at most once, exactly `dropped` missing, and no shard in two groups."""
    sampler = data.draw(samplers(multiple=2 * groups, groups=groups))
    alone, twice = (global_batches(sampler, epoch, ranks * groups) for ranks in (1, 2))
    assert np.array_equal(alone, twice)  # independent of the number of ranks per group
    fresh = ShardSampler(sampler.starts, sampler.batch_size, sampler.seed, sampler.block_shards, groups)
    assert np.array_equal(
        fresh.batch(epoch, sampler.steps_per_epoch - 1, 0, groups), alone[-1][: alone.shape[1] // groups]
    )
    total = int(sampler.starts[-1])
    assert len(np.unique(alone)) == alone.size == total - sampler.dropped
    assert alone.min() >= 0 and alone.max() < total
    parts = np.split(alone, groups, axis=1)
    owners = [set(shard_of(sampler, part.ravel()).tolist()) for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners))
    for rank in range(2 * groups):
        upcoming = sampler.upcoming_shards(epoch, 0, sampler.steps_per_epoch - 1, rank, 2 * groups)
        assert set(shard_of(sampler, epoch_of(sampler, epoch, rank, 2 * groups).ravel())) <= set(upcoming.tolist())


@pytest.mark.parametrize("groups", [2, 4])
def test_shards_are_redistributed_over_node_groups_every_epoch(groups):
    sizes = np.random.default_rng(0).integers(90, 110, 129)
    sampler = ShardSampler(np.cumsum([0, *sizes]), 64, seed=0, node_groups=groups)
    assert sampler.dropped < 129 * 20 / groups + 110 * groups  # few, although sizes differ
    first, second = (
        set(shard_of(sampler, np.concatenate([sampler.batch(e, s, 0, groups) for s in range(sampler.steps_per_epoch)])))
        for e in (0, 1)
    )
    expected = 129 / groups**2  # shards that a group receives again by chance
    assert abs(len(first & second) - expected) < 0.5 * expected
    seen = set()
    for epoch in range(12 * groups):
        seen |= {
            int(s)
            for step in range(sampler.steps_per_epoch)
            for s in shard_of(sampler, sampler.batch(epoch, step, 0, groups))
        }
    assert len(seen) == 129  # a group sees every shard eventually


def test_node_groups_drop_nothing_of_equal_shards():
    sampler = ShardSampler(np.arange(65) * 100, 64, seed=0, node_groups=4)
    assert sampler.steps_per_epoch == 100 and sampler.dropped == 0


def test_indivisible_node_groups_are_rejected():
    starts = np.arange(0, 101, 10)
    with pytest.raises(UserError, match="batch of 10 is not divisible by 4 node groups; use --batch-size 8"):
        ShardSampler(starts, 10, 0, node_groups=4)
    with pytest.raises(UserError, match="100 samples in 10 shards do not fill a global batch of 96 for 4 node groups"):
        ShardSampler(starts, 96, 0, node_groups=4)
    with pytest.raises(UserError, match="6 processes are not divisible by 4 node groups"):
        ShardSampler(starts, 8, 0, node_groups=4).batch(0, 0, 0, 6)
