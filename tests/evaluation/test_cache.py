import json
import os
import threading

import pytest
import torch
from safetensors import safe_open

from errors import UserError
from evaluation.cache import feature_name, load_features, save_features


def parts_of(features, size=4):
    index = torch.arange(len(features))
    return zip(features.split(size), index.split(size), index.split(size), strict=True)


def test_what_is_kept_is_what_was_embedded(tmp_path):
    features, path = torch.randn(11, 5), tmp_path / "a.safetensors"
    assert load_features(path) is None
    save_features(path, parts_of(features[:9]), 11, {"encoder": "x"})  # two bad ones were left out
    found, index = load_features(path)
    assert torch.equal(found, features[:9]) and index.tolist() == list(range(9))
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["made_from"]) == {"encoder": "x"}
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_features_are_mapped_and_not_read(tmp_path):
    """What is written into the file afterwards is seen, so the features are those pages."""
    path = tmp_path / "a.safetensors"
    save_features(path, parts_of(torch.zeros(8, 4)), 8, {})
    found, _ = load_features(path)
    with open(path, "r+b") as file:
        file.seek(-8 * 4 * 4, os.SEEK_END)
        file.write(torch.full((4,), 7.0).numpy().tobytes())
    assert 7.0 in found


@pytest.mark.parametrize("change", ["encoder", "shards", "samples", "size", "mean", "std", "precision", "device"])
def test_whatever_decides_the_features_decides_the_name(change):
    about = {name: "a" for name in ("encoder", "shards", "samples", "size", "mean", "std", "precision", "device")}
    assert feature_name(about) == feature_name(dict(reversed(about.items())))
    assert feature_name(about) != feature_name(about | {change: "b"})


def test_damaged_features_are_made_anew(tmp_path):
    path = tmp_path / "a.safetensors"
    save_features(path, parts_of(torch.randn(11, 5)), 11, {})
    for length in (path.stat().st_size - 1, 50, 4, 0):
        os.truncate(path, length)
        assert load_features(path) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_leaves_nothing(tmp_path, value):
    features = torch.randn(11, 5)
    features[3, 2] = features[9, 0] = features[9, 1] = value
    with pytest.raises(UserError, match="2 of 11 features hold values that are not finite"):
        save_features(tmp_path / "a.safetensors", parts_of(features), 11, {})
    assert os.listdir(tmp_path) == []


def test_two_writers_leave_one_whole_file(tmp_path):
    features, path = torch.randn(400, 8), tmp_path / "a.safetensors"
    meet = threading.Barrier(2, timeout=30)

    def write():
        def slowly():
            for part in parts_of(features, 200):
                meet.wait()
                yield part

        save_features(path, slowly(), 400, {})

    threads = [threading.Thread(target=write) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.equal(load_features(path)[0], features) and os.listdir(tmp_path) == ["a.safetensors"]
