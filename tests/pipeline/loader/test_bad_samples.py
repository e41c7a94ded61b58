"""Tests of unreadable images: deterministic replacements, the record of them, and the limit on their number."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common import UserError
from pipeline.augment.config import AugmentConfig
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.loader import ViewLoader
from pipeline.shards.dataset import ShardSet, open_shards
from tests.pipeline.image_sets import pictures, write_folder
from tests.pipeline.loaders import center_crops, damage, view_loader
from tests.pipeline.web_server import cache_at, serving

CPU = torch.device("cpu")
CONFIG = AugmentConfig(size=16)
BACKENDS = ["opencv", "kornia", "dali"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> ShardSet:
    """Thirty labeled images in five shards."""
    root = tmp_path_factory.mktemp("shards")
    return write_split(folder_source(write_folder(root / "in", pictures(each=10))), root / "out", "train", 0, 6)


def epochs(shards: ShardSet, count: int = 2, **options) -> list:
    options = {"batch_size": 10, "seed": 0, "device": CPU, "backend": "opencv", "workers": 2, "max_bad": 0.5} | options
    loader = view_loader(shards, CONFIG, **options)
    batches = [batch for _ in range(count) for batch in loader]
    loader.close()
    return batches


def recorded(path) -> dict[str, str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: (row["shard"], row["reason"]) for row in rows}


@pytest.mark.parametrize(("backend", "detected"), [*((backend, False) for backend in BACKENDS), ("opencv", True)])
def test_bad_images_are_replaced_and_recorded(whole, tmp_path, backend, detected):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")
    bad = [3, 17, 18]
    damaged = damage(whole, tmp_path / "set", bad, detected=detected)
    intact = epochs(whole, backend=backend)
    batches = epochs(damaged, backend=backend, bad_samples_file=tmp_path / "bad_samples.jsonl")
    replaced = 0
    for batch, expected in zip(batches, intact, strict=True):
        assert batch.views.shape == expected.views.shape and torch.isfinite(batch.views).all()
        assert not set(batch.index.tolist()) & set(bad)
        assert batch.label.tolist() == whole.index["label"][batch.index.numpy()].tolist()
        kept = batch.index == expected.index
        assert expected.index[~kept].tolist() == [i for i in expected.index.tolist() if i in bad]
        assert torch.equal(batch.views[kept.repeat(2)], expected.views[kept.repeat(2)])
        replaced += int((~kept).sum())
    assert replaced == 6
    rows = recorded(tmp_path / "bad_samples.jsonl")
    assert rows.keys() == {whole.index["key"][sample].decode() for sample in bad}
    shard, reason = rows[whole.index["key"][3].decode()]
    assert shard == "train-000000.tar" and ("the index" if detected else "can't be decoded") in reason


def test_samples_of_a_missing_shard_are_replaced(whole, tmp_path):
    damaged = damage(whole, tmp_path / "set", lost_shards=[2])
    batches = epochs(damaged, bad_samples_file=tmp_path / "bad_samples.jsonl")
    assert not set(torch.cat([batch.index for batch in batches]).tolist()) & set(range(12, 18))
    rows = recorded(tmp_path / "bad_samples.jsonl")
    assert len(rows) == 6 and all(shard == "train-000002.tar" for shard, _ in rows.values())


@pytest.mark.parametrize("harm", ["gone", "altered"])
@pytest.mark.parametrize("part", [None, np.array([3, 8, 13, 21, 27])])
def test_a_missing_or_damaged_shard_of_a_remote_set_is_replaced_like_a_local_one(whole, tmp_path, harm, part):
    """Unavailable samples are replaced and recorded, also if samples are read by byte ranges."""
    damaged = damage(whole, tmp_path / "set", [13, 14], lost_shards=[2] if harm == "gone" else [], detected=True)
    options = {"samples": part, "batch_size": 4}
    local = epochs(damaged, **options)
    with serving(tmp_path / "set") as server:
        cache = cache_at(tmp_path, limit_bytes=10**6 if part is None else 0)
        remote = open_shards(server.url, cache)
        batches = epochs(remote, cache=cache, bad_samples_file=tmp_path / "bad_samples.jsonl", **options)
    for batch, expected in zip(batches, local, strict=True):
        assert torch.equal(batch.index, expected.index) and torch.equal(batch.views, expected.views)
    bad = set(range(12, 18) if harm == "gone" else [13, 14]) & set(range(30) if part is None else part.tolist())
    assert not set(torch.cat([batch.index for batch in batches]).tolist()) & bad
    rows = recorded(tmp_path / "bad_samples.jsonl")
    assert rows.keys() == {whole.index["key"][sample].decode() for sample in bad}
    assert all(("404" if harm == "gone" else "the index") in reason for _, reason in rows.values())


def test_an_unreachable_store_stops_the_run(whole, tmp_path):
    """An unreachable store is no reason to replace images."""
    with serving(Path(whole.root)) as server:
        remote = open_shards(server.url, cache_at(tmp_path))
    with pytest.raises(UserError, match="can't be read after 6 attempts"):
        epochs(remote, cache=cache_at(tmp_path))


def test_samples_with_a_transient_read_error_are_retried_in_the_next_epoch(whole, tmp_path, monkeypatch):
    failing = [True]

    def fail(path, *arguments, **options):
        if failing and path.endswith("train-000001.tar"):
            raise OSError(errno.EIO, "Input/output error", path)
        return open(path, *arguments, **options)

    monkeypatch.setattr("pipeline.shards.reader.open", fail, raising=False)
    monkeypatch.setattr("pipeline.shards.reader.RETRY_WAITS_S", (0.001,))
    loader = view_loader(whole, CONFIG, batch_size=10, seed=0, device=CPU, backend="opencv", max_bad=0.5, epochs=3,
                        prefetch=0, bad_samples_file=tmp_path / "bad_samples.jsonl")  # fmt: skip
    seen = [set(torch.cat([batch.index for batch in loader]).tolist())]
    failing.clear()
    seen += [set(torch.cat([batch.index for batch in loader]).tolist()) for _ in range(2)]
    loader.close()
    assert not seen[0] & set(range(6, 12)) and seen[1] == seen[2] == set(range(30))
    assert len(recorded(tmp_path / "bad_samples.jsonl")) == 6 and loader.bad_samples.replaced == 6


def test_replacements_do_not_depend_on_ranks_or_resuming(whole, tmp_path):
    damaged = damage(whole, tmp_path / "set", [0, 5, 11, 20])
    batches = epochs(damaged)
    ranks = [epochs(damaged, rank=rank, world_size=2) for rank in range(2)]
    for batch, *shares in zip(batches, *ranks, strict=True):
        assert torch.equal(batch.index, torch.cat([share.index for share in shares]))
    for first in range(1, 6):
        loader = view_loader(damaged, CONFIG, batch_size=10, seed=0, device=CPU, backend="opencv", max_bad=0.5)
        loader.load_state_dict(loader.state_dict() | {"epoch": first // 3, "step": first % 3})
        batch = next(iter(loader))
        loader.close()
        assert torch.equal(batch.index, batches[first].index) and torch.equal(batch.views, batches[first].views)


def test_too_many_bad_images_stop_the_run(whole, tmp_path):
    damaged = damage(whole, tmp_path / "set", range(0, 30, 5))
    with pytest.raises(UserError, match=r"images of .* were bad, listed in .*more than --loader.max-bad 0.1 allows"):
        epochs(damaged, max_bad=0.1, bad_samples_file=tmp_path / "bad_samples.jsonl")
    assert len(epochs(damaged, max_bad=0.2)) == 6


@pytest.mark.parametrize("bad", [range(6), [0, 5, 11, 17, 23, 29]])
def test_an_allowed_fraction_never_stops_a_run(whole, tmp_path, bad):
    """Wherever the bad images are, and with whatever number of ranks a run resumes at whatever step."""
    damaged = damage(whole, tmp_path / "set", bad)
    options = {"batch_size": 4, "max_bad": 0.2, "epochs": 3, "views_per_image": 1}

    def ranks(count: int) -> list[ViewLoader]:
        options_of_all = {"seed": 0, "device": CPU, "backend": "opencv", "world_size": count} | options
        return [view_loader(damaged, CONFIG, rank=rank, **options_of_all) for rank in range(count)]

    for before, after in ((1, 1), (4, 4), (4, 1), (1, 4), (2, 4)):
        started, resumed = ranks(before), ranks(after)
        for loader in started:
            for _ in range(2):
                for step, _ in enumerate(loader):
                    if loader.epoch == 1 and step == 3:
                        break
        replaced = sum(loader.bad_samples.replaced for loader in started)
        started[0].bad_samples.check(replaced, started[0].epoch)
        resumed[0].bad_samples.replaced = replaced  # like a resumed run
        for loader in resumed:
            loader.load_state_dict(started[0].state_dict())
            while list(loader):
                loader.bad_samples.check(sum(each.bad_samples.replaced for each in resumed), loader.epoch)
        for loader in started + resumed:
            loader.close()
        assert 10 < sum(loader.bad_samples.replaced for loader in resumed) <= 18


def test_the_total_over_ranks_is_limited(whole, tmp_path):
    """No rank exceeds the limit alone; a rank without bad samples of its own has no example to name."""
    damaged = damage(whole, tmp_path / "set", range(6))
    loader = view_loader(damaged, CONFIG, batch_size=10, seed=0, device=CPU, backend="opencv", max_bad=0.1)
    loader.bad_samples.check(3, epoch=0)
    loader.bad_samples.check(6, epoch=1)
    with pytest.raises(UserError, match=r"^4 of 30 images of \S+ were bad, which is more than --loader.max-bad 0.1"):
        loader.bad_samples.check(4, epoch=0)
    loader.bad_samples.replaced = 4
    with pytest.raises(UserError, match=r"^\d of 30 images of \S+ were bad"):
        list(loader)
    loader.close()


def test_a_set_without_readable_images_stops_at_once(whole, tmp_path):
    damaged = damage(whole, tmp_path / "set", lost_shards=range(5))
    with pytest.raises(UserError, match=r"can't be used .* nor can 16 replacements"):
        epochs(damaged, max_bad=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_replaces_within_its_samples(whole, tmp_path, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")
    damaged = damage(whole, tmp_path / "set", [4, 9])
    samples = np.array([1, 4, 9, 12, 25])
    options = {"batch_size": 3, "device": CPU, "backend": backend, "max_bad": 0.0}  # for the evaluation to apply
    batches = list(center_crops(damaged, CONFIG, samples, **options))
    index = torch.cat([batch.index for batch in batches])
    assert [len(batch.index) for batch in batches] == [3, 2] and index[[0, 3, 4]].tolist() == [1, 12, 25]
    assert set(index.tolist()) <= {1, 12, 25}
    assert torch.cat([batch.label for batch in batches]).tolist() == whole.index["label"][index.numpy()].tolist()
