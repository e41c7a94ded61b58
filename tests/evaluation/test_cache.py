import json
import os
import resource
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common import UserError, replacing, save_tensors
from evaluation.cache import feature_name, load_features, save_features


def parts_of(features, size=4):
    index = torch.arange(len(features))
    return zip(features.split(size), index.split(size), index.split(size), strict=True)


def test_stored_features_equal_embedded_ones(tmp_path):
    features, path = torch.randn(11, 5), tmp_path / "a.safetensors"
    assert load_features(path) is None
    save_features(path, parts_of(features[:9]), {"encoder": "x"})
    found, index = load_features(path)
    assert torch.equal(found, features[:9]) and index.tolist() == list(range(9))
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["made_from"]) == {"encoder": "x"}
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_features_are_mapped_rather_than_read(tmp_path):
    """Bytes written to the file later are visible, so the features are its pages."""
    path = tmp_path / "a.safetensors"
    save_features(path, parts_of(torch.zeros(8, 4)), {})
    found, _ = load_features(path)
    with open(path, "r+b") as file:
        file.seek(-8 * 4 * 4, os.SEEK_END)
        file.write(torch.full((4,), 7.0).numpy().tobytes())
    assert 7.0 in found


@pytest.mark.parametrize("change", ["encoder", "shards", "samples", "size", "mean", "std", "precision", "device"])
def test_everything_that_determines_features_determines_the_name(change):
    about = {name: "a" for name in ("encoder", "shards", "samples", "size", "mean", "std", "precision", "device")}
    assert feature_name(about) == feature_name(dict(reversed(about.items())))
    assert feature_name(about) != feature_name(about | {change: "b"})


def test_damaged_files_count_as_missing(tmp_path):
    path = tmp_path / "a.safetensors"
    save_features(path, parts_of(torch.randn(11, 5)), {})
    for length in (path.stat().st_size - 1, 50, 4, 0):
        os.truncate(path, length)
        assert load_features(path) is None


def test_files_of_another_format_count_as_missing(tmp_path):
    path, features, index = tmp_path / "a.safetensors", torch.randn(11, 5), torch.arange(11)
    others = [
        {"features": features},
        {"features": features, "index": index[:7]},
        {"features": features.half(), "index": index},
        {"features": features, "index": index.int()},
        {"features": features[0], "index": index[:5]},
    ]
    for tensors in others:
        save_file(tensors, path)
        assert load_features(path) is None
    save_file({"features": features, "index": index}, path)
    assert load_features(path) is not None
    path.unlink()
    path.mkdir()
    assert load_features(path) is None


@contextmanager
def files_of_at_most(size):
    """Limit the size of files of this process, in place of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [100, 4200])  # while embedding, and while the whole file is written
def test_full_disk_is_explained_and_leaves_nothing(tmp_path, limit):
    features = torch.randn(100, 10)  # 4,000 bytes
    with files_of_at_most(limit), pytest.raises(UserError, match=r"can't be written \(.*large.*free some space"):
        save_features(tmp_path / "a.safetensors", parts_of(features), {})
    assert os.listdir(tmp_path) == []
    save_features(tmp_path / "a.safetensors", parts_of(features), {})
    assert torch.equal(load_features(tmp_path / "a.safetensors")[0], features)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_are_readable_as_far_as_the_umask_allows(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_features(tmp_path / "a.safetensors", parts_of(torch.randn(11, 5)), {})
        with replacing(tmp_path / "b.safetensors") as path:
            save_tensors({"a": torch.zeros(3)}, path, {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_replaced_files_appear_complete_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "a.safetensors"
    with pytest.raises(KeyboardInterrupt), replacing(out) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    with (
        files_of_at_most(100),
        pytest.raises(UserError, match=r"a\.safetensors can't be written"),
        replacing(out) as path,
    ):
        save_tensors({"a": torch.zeros(1000)}, path, {})
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match="can't be written"), replacing(tmp_path / "taken" / "a") as path:
        pass
    assert os.listdir(out.parent) == [] and (tmp_path / "taken").read_text() == "mine"


def test_leftovers_of_killed_processes_are_deleted_after_a_day(tmp_path):
    for name, age_s in {"unfinished-old": 25 * 3600, ".unfinished-old": 25 * 3600, ".unfinished-new": 3600}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_bytes(bytes(10))
        for path in (tmp_path / name / "rows", tmp_path / name):
            os.utime(path, (time.time() - age_s,) * 2)
    save_features(tmp_path / "a.safetensors", parts_of(torch.randn(11, 5)), {})
    assert sorted(os.listdir(tmp_path)) == [".unfinished-new", "a.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_are_rejected_and_leave_nothing(tmp_path, value):
    features = torch.randn(11, 5)
    features[3, 2] = features[9, 0] = features[9, 1] = value
    with pytest.raises(UserError, match="2 of 11 features are not finite"):
        save_features(tmp_path / "a.safetensors", parts_of(features), {})
    assert os.listdir(tmp_path) == []


def test_two_writers_leave_one_complete_file(tmp_path):
    features, path = torch.randn(400, 8), tmp_path / "a.safetensors"
    meet = threading.Barrier(2, timeout=30)

    def write():
        def slowly():
            for part in parts_of(features, 200):
                meet.wait()
                yield part

        save_features(path, slowly(), {})

    threads = [threading.Thread(target=write) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.equal(load_features(path)[0], features) and os.listdir(tmp_path) == ["a.safetensors"]
