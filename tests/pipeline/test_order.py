"""The global order: each sample once per epoch, the same for any number of ranks, reads close together."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import Order


@st.composite
def orders(draw, ranks: int = 1) -> Order:
    """An order over a few shards of unequal size, some empty, whose batch divides by `ranks`."""
    shards = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= ranks))
    batch_size = ranks * draw(st.integers(1, sum(shards) // ranks))
    starts = np.cumsum([0, *shards])
    return Order(starts, batch_size, draw(st.integers(0, 2**64 - 1)), block_shards=draw(st.integers(1, 5)))


def epoch_of(order: Order, epoch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """(steps, batch / world_size)."""
    steps = range(order.steps_per_epoch)
    return np.stack([order.batch(epoch, step, rank, world_size) for step in steps])


@given(order=orders(), epoch=st.integers(0, 1000))
def test_each_sample_once_per_epoch_but_for_the_dropped(order, epoch):
    samples = epoch_of(order, epoch).ravel()
    total = order.shard_starts[-1]
    assert len(np.unique(samples)) == len(samples) == total - order.dropped
    assert 0 <= order.dropped < order.batch_size
    assert samples.min() >= 0 and samples.max() < total
    assert np.array_equal(np.sort(order.permutation(epoch)), np.arange(total))


@given(order=orders(ranks=8), epoch=st.integers(0, 1000))
def test_any_number_of_ranks_sees_the_same_global_batches(order, epoch):
    alone = epoch_of(order, epoch)
    for world_size in (2, 4, 8):
        slices = [epoch_of(order, epoch, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(slices, axis=1), alone)


@given(order=orders(), epoch=st.integers(0, 1000))
def test_samples_stay_in_blocks_of_shards(order, epoch):
    """Never more than a block of shards is begun and not yet finished, and no shard is begun twice."""
    shard_of = np.searchsorted(order.shard_starts, order.permutation(epoch), side="right") - 1
    shards, first, count = np.unique(shard_of, return_index=True, return_counts=True)
    last = len(shard_of) - 1 - np.unique(shard_of[::-1], return_index=True)[1]
    assert np.array_equal(count, np.diff(order.shard_starts)[shards])
    begun = np.searchsorted(np.sort(first), np.arange(len(shard_of)), side="right")
    finished = np.searchsorted(np.sort(last), np.arange(len(shard_of)), side="left")
    assert (begun - finished).max() <= order.block_shards


def test_blocks_are_wide_enough_to_mix():
    order = Order(np.arange(0, 64 * 100 + 1, 100), 256, seed=0)
    for batch in epoch_of(order, 0)[:-1]:
        assert len(np.unique(batch // 100)) > 10  # of the sixteen shards of a block


def test_epochs_and_seeds_differ():
    starts = np.arange(0, 4001, 100)
    order = Order(starts, 100, seed=0)
    first = order.permutation(0).copy()
    for other in (order.permutation(1), Order(starts, 100, seed=1).permutation(0)):
        assert (first == other).mean() < 0.01
    assert np.array_equal(order.permutation(0), first)  # back again, whatever was asked for since
    assert set(order.permutation(0)[-10:]) != set(order.permutation(1)[-10:])  # it is not always the same that wait
