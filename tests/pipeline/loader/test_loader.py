"""Tests of the loader: contents of batches, resuming from a position, stopping, prefetching."""

import signal
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from common import UserError
from pipeline.augment.backend import choose_backend
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import center_crop, draw_params
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.loader import ViewLoader
from pipeline.loader.loader import Batch
from pipeline.loader.sampler import ShardSampler
from pipeline.shards.cache import ShardCache
from pipeline.shards.dataset import ShardSet, open_shards
from pipeline.shards.reader import Reader
from tests.pipeline.augment import reference_views as reference
from tests.pipeline.image_sets import pictures, write_folder
from tests.pipeline.loaders import center_crops, view_loader
from tests.pipeline.web_server import cache_at, serving

CPU = torch.device("cpu")
CONFIG = AugmentConfig(size=16)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """Thirty labeled images and one without a class, in five shards."""
    root = tmp_path_factory.mktemp("shards")
    files = pictures(each=10) | {"alone.jpg": reference.encode(reference.smooth_field(5, 5, 30, 30), "JPEG")}
    return write_split(folder_source(write_folder(root / "in", files)), root / "out", "train", samples_per_shard=7)


def loader(shards: ShardSet, **options) -> ViewLoader:
    options = {"batch_size": 8, "seed": 0, "device": CPU, "backend": "opencv", "workers": 2} | options
    return view_loader(shards, CONFIG, **options)


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def views_of(batch: Batch) -> torch.Tensor:
    """Views by view and sample: (2, B, 3, S, S)."""
    return batch.views.unflatten(0, (2, -1))


def concatenated(shares: list[Batch]) -> Batch:
    """Global batch from the shares of the ranks."""
    views = torch.cat([views_of(share) for share in shares], 1).flatten(0, 1)
    return Batch(views, *(torch.cat([share[field] for share in shares]) for field in (1, 2)))


@pytest.mark.parametrize("backend", ["opencv", "kornia", "dali"])
def test_a_batch(shards, backend):
    """Rows i and B + i match the reference views of sample i, so label, index and views belong together."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")
    whole = loader(shards, backend=backend, seed=3)
    batch = next(iter(whole))
    whole.close()
    samples = batch.index.numpy()
    assert batch.views.shape == (16, 3, 16, 16) and batch.views.dtype == torch.float32
    assert batch.views.is_contiguous(memory_format=torch.channels_last)
    assert batch.index.dtype == batch.label.dtype == torch.int64
    assert np.array_equal(batch.label.numpy(), shards.index["label"][samples])
    rows = shards.index[samples]
    params = draw_params(CONFIG, 3, 0, samples, rows["height"], rows["width"])
    expected = reference.reference_views(Reader(shards)(samples), params, CONFIG)
    # rounding, gray weights and padding differ slightly, see tests/pipeline/augment/test_backends.py
    tolerance = {"opencv": 0.8, "kornia": 0.05, "dali": 0.15}[backend]
    assert reference.deviation(batch.views, expected, CONFIG)[0] < tolerance


def test_an_epoch(shards):
    whole = loader(shards)
    first, second = list(whole), list(whole)
    whole.close()
    assert len(whole) == len(first) == len(second) == 3 and whole.sampler.dropped == 7
    for epoch in first, second:
        samples = torch.cat([batch.index for batch in epoch])
        assert len(samples.unique()) == 24
    assert not torch.equal(first[0].index, second[0].index)
    labels = {int(i): int(label) for batch in first + second for i, label in zip(batch.index, batch.label, strict=True)}
    assert set(labels.values()) <= {-1, 0, 1, 2} and labels == {i: shards.index["label"][i] for i in labels}


def test_views_depend_on_the_epoch_but_not_on_the_batch_size(shards):
    def by_sample(epoch: int, **options) -> dict[int, torch.Tensor]:
        part = loader(shards, **options)
        part.load_state_dict(part.state_dict() | {"epoch": epoch})
        views = {int(i): views_of(b)[:, k] for b in part for k, i in enumerate(b.index)}
        part.close()
        return views

    first, smaller, second = by_sample(0), by_sample(0, batch_size=5, workers=1), by_sample(1)
    for sample in first.keys() & smaller.keys():
        assert torch.equal(first[sample], smaller[sample])
    changed = [not torch.equal(first[sample], second[sample]) for sample in first.keys() & second.keys()]
    assert all(changed) and len(changed) > 10


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resuming_continues_with_identical_batches(shards, stop):
    """Also at the end of an epoch (3) and after it, and with other numbers of threads and prefetched batches."""
    whole = loader(shards)
    batches = [*whole, *whole]
    whole.close()
    first = loader(shards, prefetch=1)
    taken = []
    while len(taken) < stop:
        taken += islice(first, stop - len(taken))
    state = first.state_dict()
    first.close()
    assert state == {"epoch": stop // 3, "step": stop % 3, "seed": 0, "batch_size": 8, "node_groups": 1}
    resumed = loader(shards, prefetch=3, workers=1)
    resumed.load_state_dict(state)
    rest = [*resumed, *(resumed if stop < 3 else ())]
    resumed.close()
    assert len(taken) + len(rest) == 6
    for batch, again in zip(batches, taken + rest, strict=True):
        assert same(batch, again)


def test_a_run_resumes_with_another_number_of_ranks(shards):
    alone = loader(shards)
    batches = list(alone)
    alone.close()
    first = loader(shards)
    assert same(next(iter(first)), batches[0])
    state = first.state_dict()
    first.close()
    ranks = [loader(shards, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for expected, *shares in zip(batches[1:], *ranks, strict=True):
        assert all(len(share.index) == 4 and share.views.shape[0] == 8 for share in shares)
        assert same(concatenated(shares), expected)
    for rank in ranks:
        rank.close()


def test_prefetched_batches_are_not_part_of_the_position(shards):
    for prefetch in 0, 1, 5:
        whole = loader(shards, prefetch=prefetch)
        batches = iter(whole)
        assert whole.state_dict()["step"] == 0
        for step in 1, 2:
            next(batches)
            assert whole.state_dict()["step"] == step
        batches.close()
        whole.close()


def test_after_the_last_batch_of_an_epoch_comes_the_next_epoch(shards):
    whole = loader(shards)
    for _ in islice(whole, 3):  # stops without requesting a fourth batch
        pass
    assert len(list(whole)) == 3 and whole.state_dict()["epoch"] == 2
    whole.close()


def test_after_the_last_epoch_there_are_no_batches(shards):
    whole = loader(shards, epochs=1)
    assert len(list(whole)) == 3
    for _ in range(2):
        assert list(whole) == [] and whole.state_dict()["epoch"] == 1
    whole.load_state_dict(whole.state_dict() | {"epoch": 0, "step": 2})
    assert len(list(whole)) == 1
    whole.close()


def test_after_an_error_the_same_batch_is_repeated(shards, monkeypatch):
    """As in a notebook, where the cell is run again after an error."""
    whole = loader(shards, prefetch=0, resident="off")  # a second epoch that reads
    expected = list(whole)
    whole.load_state_dict(whole.state_dict() | {"epoch": 0, "step": 0})
    batches = iter(whole)
    assert same(next(batches), expected[0])
    monkeypatch.setattr(Reader, "read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(batches)
    monkeypatch.undo()
    assert all(map(same, whole, expected[1:])) and whole.state_dict()["epoch"] == 1
    whole.close()


@pytest.mark.parametrize("samples", [None, np.array([3, 8, 20, 28])])
def test_closing_does_not_wait_for_a_server(shards, tmp_path, samples):
    """Neither for whole shards nor for byte ranges that stall, here when Ctrl-C is pressed during the wait."""
    before = set(threading.enumerate())
    with serving(Path(shards.root), *["stall"] * 50) as server:
        cache = ShardCache(tmp_path, limit_bytes=10**6 if samples is None else 0)
        remote = loader(open_shards(server.url, cache), cache=cache, samples=samples, batch_size=2)
        remote.close()  # before anything was read
        remote = loader(open_shards(server.url, cache), cache=cache, samples=samples, batch_size=2)
        ctrl_c = (threading.main_thread().ident, signal.SIGINT)
        threading.Timer(0.5, signal.pthread_kill, ctrl_c).start()
        with pytest.raises(KeyboardInterrupt):
            next(iter(remote))  # the first batch waits for a server that never answers
        started = time.monotonic()
        remote.close()
        assert time.monotonic() - started < 10, "a stalled connection times out after 30 s"
        left = {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before if not thread.daemon}
        assert not left & {"read", "augment", "range"}


def test_another_sample_order_is_rejected(shards):
    whole = loader(shards)
    for name, value in (("seed", 1), ("batch_size", 4), ("node_groups", 2)):
        with pytest.raises(UserError, match=f"started with {name} {value}; use the same value"):
            whole.load_state_dict(whole.state_dict() | {name: value})
    whole.close()


@pytest.mark.parametrize("backend", ["opencv", "kornia"])
def test_breaking_out_leaves_no_threads(shards, backend):
    before = set(threading.enumerate())
    whole = loader(shards, prefetch=3, backend=backend)
    for batch in whole:
        assert len(batch.index) == 8
        break
    whole.close()
    deadline = time.monotonic() + 60
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_breaking_out_does_not_wait_for_batches_that_have_not_started(shards, monkeypatch):
    read = Reader.read
    calls = []

    def slowly(self, samples, stop):
        calls.append(samples)
        if len(calls) > 1:
            time.sleep(0.2)
        return read(self, samples, stop)

    monkeypatch.setattr(Reader, "read", slowly)
    whole = loader(shards, batch_size=1, prefetch=20)
    for _ in whole:
        break
    whole.close()
    assert len(calls) < 6


def test_invalid_sizes_and_backends_are_rejected(shards):
    with pytest.raises(
        UserError, match=r"of 32 is larger than the data set .*\(31 images\); use --batch-size 31 or less"
    ):
        loader(shards, batch_size=32)
    with pytest.raises(UserError, match=r"of 2 is larger than the subset of .*\(1 images\); use more images\.$"):
        loader(shards, batch_size=2, samples=np.arange(1))
    with pytest.raises(UserError, match="batch of 10 does not divide by 4 processes: use --batch-size 8"):
        loader(shards, batch_size=10, world_size=4)
    with pytest.raises(UserError, match="no backend 'cv2'; use one of auto, dali, kornia, opencv"):
        choose_backend("cv2", CPU, 224, 2)


def test_the_next_epoch_is_prefetched_while_the_last_batch_is_used(shards, monkeypatch):
    batch, requested = ShardSampler.batch, []

    def record(self, epoch, step, *ranks):
        requested.append((epoch, step))
        return batch(self, epoch, step, *ranks)

    monkeypatch.setattr(ShardSampler, "batch", record)
    whole = loader(shards, prefetch=2, epochs=2)
    for _ in whole:
        pass
    assert requested[-1] == (1, 1)
    assert len(list(whole)) == 3 and requested == [(epoch, step) for epoch in range(2) for step in range(3)]
    whole.close()


@pytest.mark.parametrize("backend", ["opencv", "kornia", "dali"])
def test_center_crop_batches(shards, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")
    samples = np.array([30, 4, 4, 17, 0, 9, 21])
    batches = list(center_crops(shards, CONFIG, samples, batch_size=3, device=CPU, backend=backend))
    assert [len(batch.index) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.index for batch in batches]).tolist() == samples.tolist()
    assert torch.cat([batch.label for batch in batches]).tolist() == shards.index["label"][samples].tolist()
    rows = shards.index[samples]
    params = center_crop(CONFIG, rows["height"], rows["width"])
    expected = reference.reference_views(Reader(shards)(samples), params, CONFIG)
    views = torch.cat([batch.views for batch in batches])
    assert reference.deviation(views, expected, CONFIG)[0] < (0.3 if backend == "opencv" else 0.05)


def test_center_crop_batches_may_be_abandoned(shards):
    before = set(threading.enumerate())
    for _ in center_crops(shards, CONFIG, np.arange(31), batch_size=4, device=CPU, backend="opencv"):
        break
    assert {thread for thread in threading.enumerate() if thread not in before} == set()


@pytest.mark.parametrize("faults", [(), ("503", "drop", "truncate"), ("stall", "flip")])
def test_a_failing_web_server_changes_no_batch(shards, tmp_path, faults):
    local = loader(shards)
    expected = [batch for _ in range(2) for batch in local]
    local.close()
    samples = np.array([3, 4, 30, 17])
    expected += center_crops(shards, CONFIG, samples, batch_size=3, device=CPU, backend="opencv")
    with serving(Path(shards.root), *faults) as server:
        cache = cache_at(tmp_path / "cache")
        remote = open_shards(server.url, cache)
        over_the_web = loader(remote, cache=cache)
        batches = [batch for _ in range(2) for batch in over_the_web]
        over_the_web.close()
        batches += center_crops(remote, CONFIG, samples, batch_size=3, device=CPU, backend="opencv", cache=cache)
    assert len(batches) == 8 and all(map(same, batches, expected))


def test_the_backends_agree(shards):
    """With the same seed, all backends produce the same views, in levels of 255."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")
    loaders = [loader(shards, backend=backend) for backend in ("opencv", "kornia", "dali")]
    for opencv, kornia, dali in zip(*loaders, strict=True):
        assert torch.equal(opencv.index, kornia.index) and torch.equal(opencv.index, dali.index)
        exact = reference.denormalize(kornia.views, CONFIG)
        assert reference.deviation(opencv.views, exact, CONFIG)[0] < 0.8
        assert reference.deviation(dali.views, exact, CONFIG)[0] < 0.15
    for each in loaders:
        each.close()
