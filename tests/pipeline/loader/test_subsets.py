"""Tests of subsets: class-balanced and nested, or listed by key; and of epochs over a subset."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from pipeline.augment.config import AugmentConfig
from pipeline.convert.imagenet import imagenet_sources
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.loader import ViewLoader
from pipeline.loader.loader import worth_whole_shards
from pipeline.loader.sampler import ShardSampler
from pipeline.loader.subsets import keys_subset, label_subset
from pipeline.shards.dataset import ShardSet, open_shards
from pipeline.shards.reader import Reader
from tests.pipeline.image_sets import pictures, write_folder, write_imagenet
from tests.pipeline.loaders import view_loader
from tests.pipeline.web_server import cache_at, serving

CPU = torch.device("cpu")
CONFIG = AugmentConfig(size=16)
labels_of = st.lists(st.integers(-1, 6), min_size=1, max_size=120).map(np.array).filter(lambda x: (x >= 0).any())


# ---- selection


@given(labels=labels_of, fraction=st.floats(0.001, 1), seed=st.integers(0, 2**64 - 1))
def test_a_fraction_of_the_labels_is_balanced(labels, fraction, seed):
    subset = label_subset(labels, fraction, seed)
    sizes = {label: int((labels == label).sum()) for label in set(labels.tolist()) - {-1}}
    taken = {label: int((labels[subset] == label).sum()) for label in sizes}
    assert subset.dtype == np.int64 and (np.diff(subset) > 0).all() and (labels[subset] >= 0).all()
    assert len(subset) == max(round(fraction * sum(sizes.values())), len(sizes))
    assert min(taken.values()) >= 1
    unfinished = [taken[label] for label in sizes if taken[label] < sizes[label]]
    if unfinished:  # no class exceeds one with samples left by more than one
        assert max(taken.values()) - min(unfinished) <= 1


@given(labels=labels_of, fractions=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)), seed=st.integers(0, 99))
def test_a_smaller_fraction_is_part_of_a_larger_one(labels, fractions, seed):
    small, large = (label_subset(labels, fraction, seed) for fraction in sorted(fractions))
    assert set(small.tolist()) <= set(large.tolist())
    assert np.array_equal(small, label_subset(labels, min(fractions), seed))


def test_the_seed_selects_samples_and_classes():
    labels = np.arange(1000) % 10
    first, second = (label_subset(labels, 0.105, seed) for seed in (0, 1))
    assert len(first) == len(second) == 105 and 0 < len(np.intersect1d(first, second)) < 30
    favored = [set(np.flatnonzero(np.bincount(labels[part]) == 11)) for part in (first, second)]
    assert len(favored[0]) == len(favored[1]) == 5 and favored[0] != favored[1]
    assert np.array_equal(label_subset(labels, 1.0, 0), np.arange(1000))


def test_invalid_fractions_are_rejected():
    for fraction in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(UserError, match=r"fraction of labels is .*; it must be above 0 and at most 1"):
            label_subset(np.zeros(4, int), fraction, 0)
    with pytest.raises(UserError, match="no labels; use labeled shards"):
        label_subset(np.full(4, -1), 0.1, 0)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> ShardSet:
    """Twelve images with ImageNet's names, converted from its tar of class tars."""
    root = tmp_path_factory.mktemp("imagenet")
    files = {}
    for number, image in enumerate(pictures(each=4).values()):
        wnid = f"n0144076{number % 3}"
        files[f"{wnid}/{wnid}_{10183 + number}.JPEG"] = image
    sources = imagenet_sources(write_imagenet(root / "train.tar", files))
    return write_split(sources["train"], root / "out", "train", samples_per_shard=5)


def test_a_published_list_of_names(imagenet, tmp_path):
    (tmp_path / "list.txt").write_text("n01440760_10183.JPEG\n\nn01440762_10185\n n01440760_10183.JPEG \n")
    subset = keys_subset(imagenet, tmp_path / "list.txt")
    assert (np.diff(subset) > 0).all()
    assert {key.decode() for key in imagenet.index["key"][subset]} == {"n01440760_10183", "n01440762_10185"}
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfn01440760_10183.JPEG\r\nn01440762_10185\r\n")
    assert np.array_equal(keys_subset(imagenet, tmp_path / "windows.txt"), subset)


def test_names_are_matched_like_the_converter_stores_them(tmp_path):
    image = pictures(each=1)["class_0/image_0.jpg"]
    files = {"v1.0/a.b.jpg": image, "v1.0/c.jpg": image, "d.png": image}
    shards = write_split(folder_source(write_folder(tmp_path / "in", files)), tmp_path / "out", "train")
    (tmp_path / "list.txt").write_text("v1.0/a.b.jpg\nd\n")
    subset = keys_subset(shards, tmp_path / "list.txt")
    assert {key.decode() for key in shards.index["key"][subset]} == {"v1.0/a_b", "d"}


def test_invalid_lists_are_rejected(imagenet, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("n01440760_10183.JPEG\n" + "".join(f"x_{i}.JPEG\n" for i in range(5)))
    with pytest.raises(UserError, match=r"list.txt lists 5 keys that .* does not contain, such as x_0, x_1, x_2; use"):
        keys_subset(imagenet, path)
    path.write_text("n01440760_10183\n")
    twice = np.array(imagenet.index)
    twice["key"][:2] = b"n01440760_10183"
    with pytest.raises(UserError, match="1 keys that several samples of"):
        keys_subset(replace(imagenet, index=twice), path)
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        keys_subset(imagenet, path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="can't be read"):
        keys_subset(imagenet, path)
    with pytest.raises(UserError, match="can't be read"):
        keys_subset(imagenet, tmp_path / "none")


# ---- sample order of a subset


@st.composite
def samplers(draw, multiple: int = 1, groups: int = 1) -> tuple[ShardSampler, np.ndarray]:
    """Draw a sampler of a subset of a few shards of unequal size, and the first sample of each shard."""
    starts = np.cumsum([0, *draw(st.lists(st.integers(1, 40), min_size=groups, max_size=10 * groups))])
    size = int(starts[-1])
    chosen = np.array(draw(st.lists(st.sampled_from([True, True, False]), min_size=size, max_size=size)), bool)
    samples = np.flatnonzero(chosen)
    sizes = np.sort(np.histogram(samples, starts)[0])[::-1]
    sizes = sizes[sizes > 0]
    fill = int(sizes[: len(sizes) // groups * groups].reshape(-1, groups)[:, -1].sum()) * groups // multiple
    if not fill:
        starts = np.arange(0, 50 * groups + 1, 50)
        samples, fill = np.arange(0, 50 * groups, 2), 25 * groups // multiple
    batch_size = multiple * draw(st.integers(1, fill))
    seed, block_shards = draw(st.integers(0, 2**64 - 1)), draw(st.integers(1, 5))
    return ShardSampler(starts, batch_size, seed, block_shards, groups, samples), starts


epochs = st.integers(0, 1000)


def global_batches(sampler: ShardSampler, epoch: int, world_size: int = 1) -> np.ndarray:
    """Slices of all ranks, concatenated: (steps, batch)."""
    steps, ranks = range(sampler.steps_per_epoch), range(world_size)
    return np.stack([np.concatenate([sampler.batch(epoch, s, r, world_size) for r in ranks]) for s in steps])


@given(drawn=samplers(), epoch=epochs)
def test_each_sample_of_the_subset_once_per_epoch(drawn, epoch):
    sampler, _ = drawn
    seen = global_batches(sampler, epoch).ravel()
    assert len(np.unique(seen)) == len(seen) == len(sampler.samples) - sampler.dropped and seen.dtype == np.int64
    assert 0 <= sampler.dropped < sampler.batch_size and np.isin(seen, sampler.samples).all()


@given(drawn=samplers(multiple=24), epoch=epochs, data=st.data())
def test_batches_do_not_depend_on_the_number_of_ranks_or_resuming(drawn, epoch, data):
    sampler, starts = drawn
    alone = global_batches(sampler, epoch)
    for world_size in (2, 3, 4, 8):
        assert np.array_equal(global_batches(sampler, epoch, world_size), alone)
    step = data.draw(st.integers(0, sampler.steps_per_epoch - 1))
    fresh = ShardSampler(starts, sampler.batch_size, sampler.seed, sampler.block_shards, samples=sampler.samples)
    assert np.array_equal(fresh.batch(epoch, step), alone[step])


@given(groups=st.sampled_from([1, 2, 3]), epoch=epochs, data=st.data())
def test_upcoming_shards_are_those_that_contain_the_subset(groups, epoch, data):
    sampler, starts = data.draw(samplers(multiple=2 * groups, groups=groups))
    used = set((np.searchsorted(starts, sampler.samples, side="right") - 1).tolist())
    for rank in range(2 * groups):
        first = data.draw(st.integers(0, sampler.steps_per_epoch - 1))
        last = data.draw(st.integers(first, sampler.steps_per_epoch - 1))
        read = np.concatenate([sampler.batch(epoch, step, rank, 2 * groups) for step in range(first, last + 1)])
        upcoming = sampler.upcoming_shards(epoch, first, last, rank, 2 * groups).tolist()
        needed = set((np.searchsorted(starts, read, side="right") - 1).tolist())
        assert needed <= set(upcoming) <= used and len(set(upcoming)) == len(upcoming)
    seen = global_batches(sampler, epoch, 2 * groups)
    assert len(np.unique(seen)) == seen.size == len(sampler.samples) - sampler.dropped


def test_a_subset_of_all_samples_has_the_order_of_the_whole_set():
    starts = np.cumsum([0, *np.random.default_rng(0).integers(1, 60, 40)])
    whole = ShardSampler(starts, 32, 5, 4, 2)
    part = ShardSampler(starts, 32, 5, 4, 2, samples=np.arange(starts[-1]))
    for epoch in range(2):
        assert np.array_equal(global_batches(whole, epoch, 2), global_batches(part, epoch, 2))


def test_a_subset_is_well_mixed():
    """Rank correlation with the stored order, for one sample in ten of a set sorted by class."""
    samples = np.flatnonzero(np.random.default_rng(0).random(128_000) < 0.1)
    sampler = ShardSampler(np.arange(0, 128_001, 1000), 64, 0, samples=samples)
    seen = global_batches(sampler, 0).ravel()
    assert abs(np.corrcoef(np.arange(len(seen)), np.argsort(np.argsort(seen)))[0, 1]) < 0.05


def test_no_shards_are_upcoming_after_the_last_epoch():
    sampler = ShardSampler(np.arange(0, 801, 10), 32, seed=1, block_shards=4)
    starts = sampler.starts
    for epochs_, more in ((1, 0), (2, 4), (None, 4)):
        upcoming = sampler.upcoming_shards(0, 24, 24, epochs=epochs_)
        own = np.unique(np.searchsorted(starts, sampler.batch(0, 24), side="right") - 1)
        assert set(own) <= set(upcoming) and len(upcoming) <= 4 + 4 and (len(upcoming) > 4) == bool(more)


@pytest.mark.parametrize("samples", [[3, 2], [1, 1], [-1, 2], [5, 40]])
def test_invalid_subsets_are_rejected(samples):
    with pytest.raises(ValueError, match="samples must be ascending, unique and below 40"):
        ShardSampler(np.arange(0, 41, 10), 1, 0, samples=np.array(samples))


# ---- the loader


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """Sixty labeled images in nine shards."""
    root = tmp_path_factory.mktemp("shards")
    return write_split(folder_source(write_folder(root / "in", pictures(each=20))), root / "out", "train", 0, 7)


SUBSET = np.array([0, 1, 5, 8, 13, 20, 21, 22, 33, 34, 50, 51, 58])


def loader(shards: ShardSet, **options) -> ViewLoader:
    options = {
        "batch_size": 4,
        "seed": 0,
        "device": CPU,
        "backend": "opencv",
        "workers": 2,
        "samples": SUBSET,
    } | options
    return view_loader(shards, CONFIG, **options)


def batches_of(loader: ViewLoader, count: int) -> list:
    batches = [batch for _ in range(count) for batch in loader]
    loader.close()
    return batches


@pytest.mark.parametrize("backend", ["opencv", "kornia", "dali"])
def test_one_view_is_the_first_of_two(shards, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")
    ones, twos = (batches_of(loader(shards, backend=backend, views_per_image=v), 1) for v in (1, 2))
    assert len(ones) == len(twos) == 3
    for one, two in zip(ones, twos, strict=True):
        assert one.views.shape == (4, 3, 16, 16) and one.views.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.index, two.index) and torch.equal(one.label, two.label)
        assert torch.equal(one.views, two.views[:4])


def test_epochs_over_a_subset_resume_anywhere(shards):
    batches = batches_of(loader(shards), 3)
    assert len(batches) == 9
    for epoch in range(3):
        seen = torch.cat([batch.index for batch in batches[3 * epoch : 3 * epoch + 3]]).tolist()
        assert len(set(seen)) == 12 and set(seen) <= set(SUBSET.tolist())
    for stop in (1, 3, 5):
        resumed = loader(shards)
        resumed.load_state_dict(resumed.state_dict() | {"epoch": stop // 3, "step": stop % 3})
        for batch, expected in zip(batches_of(resumed, 3 - stop // 3), batches[stop:], strict=True):
            assert torch.equal(batch.views, expected.views) and torch.equal(batch.index, expected.index)
    ranks = [batches_of(loader(shards, rank=rank, world_size=2), 1) for rank in range(2)]
    for batch, *shares in zip(batches[:3], *ranks, strict=True):
        assert torch.equal(batch.index, torch.cat([share.index for share in shares]))


def test_a_position_in_another_subset_is_rejected(shards):
    whole, part = loader(shards, samples=None), loader(shards)
    assert "samples_crc32" not in whole.state_dict()
    for before, now in ((whole, part), (part, whole), (part, loader(shards, samples=SUBSET[:-1]))):
        with pytest.raises(UserError, match="started on other samples of the data set"):
            now.load_state_dict(before.state_dict())
        now.close()


def test_a_subset_smaller_than_a_batch_is_rejected(shards):
    with pytest.raises(
        UserError, match=r"batch of 14 is larger than the subset of .*\(13 images\); use --batch-size 13"
    ):
        loader(shards, batch_size=14)


def test_replacements_come_from_the_subset(shards, tmp_path):
    index = np.array(shards.index)
    bad = [5, 21]
    index["crc32"][bad] ^= 1
    damaged = replace(shards, index=index)
    batches = batches_of(loader(damaged, max_bad=0.5), 3)
    seen = set(torch.cat([batch.index for batch in batches]).tolist())
    assert seen <= set(SUBSET.tolist()) - set(bad)
    whole = batches_of(loader(damaged, max_bad=0.5, samples=None), 1)
    assert not set(torch.cat([batch.index for batch in whole]).tolist()) & set(bad)


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_a_subset_of_a_remote_set(shards, tmp_path, monkeypatch, cache_bytes):
    """Whole shards if all that contain the subset fit into the cache, or else byte ranges; the batches are the same."""
    part = SUBSET[::3]  # five samples of four shards
    local = batches_of(loader(shards, samples=part), 2)
    requested = []
    monkeypatch.setattr(
        Reader, "prefetch", lambda self, *args, p=Reader.prefetch: requested.append(args) or p(self, *args)
    )
    with serving(Path(shards.root)) as server:
        cache = cache_at(tmp_path / "cache")
        cache.limit_bytes = cache_bytes
        remote = open_shards(server.url, cache)
        batches = batches_of(loader(remote, samples=part, cache=cache, epochs=2), 2)
    assert worth_whole_shards(remote, part, cache_bytes) == bool(cache_bytes) == bool(requested)
    for batch, expected in zip(batches, local, strict=True):
        assert torch.equal(batch.views, expected.views)
    fetched = {path.name for path in (cache.folder / "files").glob("*")}
    holding = np.unique(np.searchsorted(shards.shard_starts, part, side="right") - 1)
    assert fetched <= {shards.manifest["shards"][s]["sha256"] for s in holding} and bool(fetched) == bool(cache_bytes)
    assert zlib.crc32(part.astype("<i8").tobytes()) == loader(shards, samples=part).state_dict()["samples_crc32"]
