"""The shard set: its tars as the webdataset library reads them, its index to the byte, tars from elsewhere, damage."""

import json
import os
import shutil
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from errors import UserError
from pipeline.convert import write_split
from pipeline.shard_files import index_shards, verify_shards
from pipeline.shards import open_shards, open_splits
from pipeline.sources import folder_source
from tests.pipeline.image_sets import contents, damaged, pictures, run_module, write_folder, write_tar
from tests.pipeline.reference_views import decode


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Twelve images in three shards of a train split; one image has no class."""
    root = tmp_path_factory.mktemp("original")
    files = pictures()
    files["alone.jpg"] = files.pop("class_2/image_11.jpg")
    write_split(folder_source(write_folder(root / "in", files)), root / "out", "train", samples_per_shard=5)
    return root / "out" / "train"


@pytest.fixture
def copy(original, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def read_by_webdataset(root: Path) -> dict[str, dict[str, bytes]]:
    """key -> {extension: content}, as the webdataset library groups them."""
    tars = [str(path) for path in sorted(root.glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    return {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("_")} for s in samples}


def test_webdataset_reads_the_shards(original):
    shards = open_shards(str(original))
    samples = read_by_webdataset(original)
    assert list(samples) == [key.decode() for key in shards.index["key"]]
    for row, (key, sample) in zip(shards.index, samples.items(), strict=True):
        assert sample.keys() - {"cls"} == {"png" if key.endswith("image_2") else "jpg"}
        assert ("cls" in sample) == (row["label"] >= 0)
        assert int(sample.get("cls", -1)) == row["label"]
    label, encoded = contents(shards)["class_1/image_4"]
    assert samples["class_1/image_4"]["jpg"] == encoded and label == "class_1"


def test_index_points_at_the_exact_bytes(original):
    shards = open_shards(str(original))
    by_tarfile = contents(shards)
    assert len(shards) == len(by_tarfile) == 12
    assert shards.shard_starts.tolist() == [0, 5, 10, 12]
    for number, row in enumerate(shards.index):
        shard = np.searchsorted(shards.shard_starts, number, side="right") - 1
        tar = (original / shards.manifest["shards"][shard]["file"]).read_bytes()
        encoded = tar[row["offset"] : row["offset"] + row["size"]]
        label, expected = by_tarfile[row["key"].decode()]
        assert encoded == expected and zlib.crc32(encoded) == row["crc32"]
        assert decode(encoded).shape[1:] == (row["height"], row["width"])
        assert label == (None if row["label"] < 0 else shards.classes[row["label"]])


def foreign_tars(root: Path, files: list[dict[str, bytes]]) -> Path:
    """Tars as webdataset's own writer makes them, one per dictionary."""
    root.mkdir()
    for number, samples in enumerate(files):
        with webdataset.TarWriter(str(root / f"shard-{number:03d}.tar")) as writer:
            for name, content in samples.items():
                key, extension = name.split(".", 1)
                sample = content if isinstance(content, dict) else {extension: content}
                writer.write({"__key__": key, **sample})
    return root


def labelled(first: int) -> dict[str, dict[str, bytes]]:
    images = list(pictures().values())
    return {f"{i:03d}.": {"jpg": images[i], "cls": i % 3} for i in range(first, first + 4) if i != 2}


def test_foreign_tars_get_an_index(tmp_path):
    """As `python -m pipeline.shards index` makes it: with a damaged image, a class in words, files of other kinds."""
    jpeg = pictures()["class_0/image_0.jpg"]
    odd = {
        "bad.": {"jpg": damaged()["truncated"], "cls": 1},
        "deep/words.": {"jpeg": jpeg, "cls": b"owl", "json": {"a": 1}},
        "notes.txt": b"nothing",
        "masked.": {"jpg": jpeg, "mask.png": jpeg},
    }
    root = foreign_tars(tmp_path / "foreign", [labelled(0), labelled(4) | odd])
    result = run_module("pipeline.shards", "index", root)
    assert result.returncode == 0, result.stderr
    assert "9 images in 2 shards indexed." in result.stdout
    assert "left out shard-001.tar:bad.jpg: a damaged or truncated JPEG" in result.stderr
    assert "left out shard-001.tar:deep/words.cls: the class is not a number" in result.stderr
    shards = open_shards(str(root))
    by_webdataset = {key: sample for key, sample in read_by_webdataset(root).items() if {"jpg", "jpeg"} & sample.keys()}
    by_webdataset.pop("bad")
    assert [key.decode() for key in shards.index["key"]] == list(by_webdataset)
    for row, (key, sample) in zip(shards.index, by_webdataset.items(), strict=True):
        assert row["crc32"] == zlib.crc32(sample.get("jpg") or sample["jpeg"])
        assert row["label"] == (-1 if key in ("deep/words", "masked") else int(sample["cls"]))
    assert shards.classes == ["0", "1", "2"] and verify_shards(str(root)) == []


@pytest.mark.parametrize(
    ("cut", "taken"), [("in an image", 5), ("before a class", 6), ("in a class header", 6), ("end mark", 7)]
)
def test_a_truncated_foreign_tar(tmp_path, cut, taken):
    """Only samples are taken that another one follows: a class may be what is missing from the last."""
    root = foreign_tars(tmp_path / "foreign", [labelled(4)])
    pairs = [(f"{key}jpg", f"{key}cls", sample) for key, sample in labelled(8).items()]
    members = {name: content for jpg, cls, s in pairs for name, content in ((jpg, s["jpg"]), (cls, b"%d" % s["cls"]))}
    write_tar(root / "shard-001.tar", members)  # the class behind its image, where webdataset puts it before
    whole = index_shards(str(root))
    row = whole.index[6]  # the third sample of the second tar
    after = int(row["offset"] + -(-row["size"] // 512) * 512)
    kept = {
        "in an image": int(row["offset"] + 100),
        "before a class": after,
        "in a class header": after + 100,
        "end mark": int(whole.index[7]["offset"] + -(-whole.index[7]["size"] // 512) * 512 + 1024),  # its class too
    }[cut]
    os.truncate(root / "shard-001.tar", kept)
    shards = index_shards(str(root))
    keys = [key.decode() for key in shards.index["key"]]
    assert keys == ["004", "005", "006", "007", "008", "009", "010"][:taken]
    assert shards.index["label"].tolist() == [1, 2, 0, 1, 2, 0, 1][: len(keys)]
    (entry,) = shards.manifest["left_out"]
    assert entry["name"] == "shard-001.tar:the rest of the tar"
    assert verify_shards(str(root)) == []  # the checksum is that of the file as it is


def test_tars_without_an_index_name_the_cure(tmp_path):
    root = foreign_tars(tmp_path / "foreign", [labelled(0)])
    with pytest.raises(UserError, match=rf"have no index: run `python -m pipeline.shards index {root}` first"):
        open_shards(str(root))
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "No shards at"), ("nowhere", "No shards at"), ("foo://x", "can't be opened")):
        with pytest.raises(UserError, match=message):
            open_splits(name if "://" in name else str(tmp_path / name))
    with pytest.raises(UserError, match=r"There is no \.tar in"):
        index_shards(str(tmp_path / "empty"))
    foreign_tars(tmp_path / "text", [{"a.txt": b"nothing"}])
    with pytest.raises(UserError, match="No image could be read from the tars"):
        index_shards(str(tmp_path / "text"))
    result = run_module("pipeline.shards", "verify", tmp_path / "nowhere")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "No shards at" in result.stderr


def test_verify_finds_a_flipped_bit(copy):
    assert verify_shards(str(copy)) == []
    assert "Every shard is as it was written." in run_module("pipeline.shards", "verify", copy).stdout
    row = open_shards(str(copy)).index[6]
    tar = copy / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[row["offset"] + 50] ^= 1
    tar.write_bytes(content)
    (copy / "train-000002.tar").unlink()
    problems = verify_shards(str(copy))
    assert [Path(problem.split(" ")[0]).name for problem in problems] == ["train-000001.tar", "train-000002.tar"]
    result = run_module("pipeline.shards", "verify", copy)
    assert result.returncode == 1 and "not the file that was written: copy it again" in result.stderr


DAMAGE = {
    "cut": ("train-000001.index.npy", lambda content: content[:200], "is damaged"),
    "empty": ("train-000001.index.npy", lambda content: b"", "is damaged"),
    "gone": ("train-000001.index.npy", None, "is missing"),
    "of another shard": ("train-000002.index.npy", "train-000001.index.npy", "disagrees with dataset.json"),
    "half a manifest": ("dataset.json", lambda content: content[:100], "dataset.json is damaged"),
    "another format": ("dataset.json", lambda content: b'{"format": "x"}', "is not of format"),
    "no object": ("dataset.json", lambda content: b"[]", "is not of format"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_to_the_index_is_named_and_indexing_anew_helps(copy, original, case):
    name, change, message = DAMAGE[case]
    if change is None:
        (copy / name).unlink()
    else:
        content = (copy / change).read_bytes() if isinstance(change, str) else change((copy / name).read_bytes())
        (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_shards(str(copy))
    assert f"run `python -m pipeline.shards index {copy}` to make it anew" in str(error.value)
    again, whole = index_shards(str(copy)), open_shards(str(original))
    assert np.array_equal(again.index, whole.index)
    assert again.manifest["shards"] == whole.manifest["shards"]
    # the names of the classes come from the old manifest where that can be read
    assert again.classes == (["0", "1", "2"] if name == "dataset.json" else whole.classes)


def test_indexing_that_is_interrupted_leaves_no_shard_set(copy, monkeypatch):
    monkeypatch.setattr("pipeline.shard_files.write_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index_shards(str(copy))
    with pytest.raises(UserError, match="have no index"):
        open_shards(str(copy))


def test_a_remote_shard_set(original):
    remote = fsspec.filesystem("memory")
    remote.put(str(original), "/bucket/set/train", recursive=True)
    here, there = open_shards(str(original)), open_shards("memory://bucket/set/train")
    assert np.array_equal(here.index, there.index) and here.manifest == there.manifest
    train, test = open_splits("memory://bucket/set")
    assert len(train) == 12 and test is None
    assert verify_shards("memory://bucket/set/train") == []
    remote.rm_file("/bucket/set/train/dataset.json")
    with pytest.raises(UserError, match="have no index"):
        open_splits("memory://bucket/set")
    assert np.array_equal(index_shards("memory://bucket/set/train").index, here.index)
    with pytest.raises(UserError, match="No shards at"):
        open_splits("memory://bucket/nothing")
    remote.rm("/bucket", recursive=True)


def test_dataset_json_says_how_it_was_made(original):
    manifest = json.loads((original / "dataset.json").read_text())
    assert manifest["made_by"] == {"command": "pipeline.convert", "seed": 0, "samples_per_shard": 5}
    assert manifest["samples"] == 12 and manifest["class_counts"] == [4, 4, 3]
    for shard in manifest["shards"]:
        assert shard["bytes"] == (original / shard["file"]).stat().st_size
