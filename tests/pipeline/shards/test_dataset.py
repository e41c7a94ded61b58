"""Shard set: compatibility with the webdataset library, exact offsets, damage, verification and summary."""

import json
import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from rich.console import Console

from common import UserError
from pipeline.convert.sources import webdataset_source
from pipeline.convert.writer import write_split
from pipeline.shards.__main__ import main
from pipeline.shards.dataset import open_shards, open_splits
from pipeline.shards.index import index_shards
from pipeline.shards.verify import show, summarize, verify_shards
from tests.pipeline.augment.reference_views import decode
from tests.pipeline.image_sets import (
    contents,
    pictures,
    read_by_webdataset,
    run_here,
    run_module,
    with_manifest,
    write_tar,
)
from tests.small_sets import remove_labels


@pytest.fixture
def copy(original, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


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


def test_indexing_again_lists_changed_tars(copy):
    made_by = open_shards(str(copy)).manifest["made_by"]
    at = open_shards(str(copy)).index[0]["offset"] - 10  # in the padding of a header
    content = bytearray((copy / "train-000000.tar").read_bytes())
    content[at] ^= 1
    (copy / "train-000000.tar").write_bytes(content)
    result = run_here("pipeline.shards", "index", copy)
    assert "left out train-000000.tar: differs from its recorded checksum; copy it again" in result.stderr
    assert "train-000001.tar" not in result.stderr
    assert open_shards(str(copy)).manifest["made_by"] == made_by


@pytest.fixture
def no_retry(monkeypatch):
    """Fail where the retry policy draws a time to wait."""
    monkeypatch.setattr("pipeline.shards.remote.random.Random", lambda: pytest.fail("it was tried again"))


def test_a_file_instead_of_a_folder_fails_at_once(original, no_retry):
    tar = original / "train-000000.tar"
    for read in open_shards, open_splits, verify_shards:
        with pytest.raises(UserError, match=f"{tar} is a file, not a folder of shards; use its folder, {original}"):
            read(str(tar))
    result = run_here("pipeline.shards", "show", tar)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "is a file" in result.stderr


@pytest.mark.parametrize(
    "url", ["http://", "https:///set", "http://bad host/", "http://a..b/", "http://h:port/", "http://[::1/"]
)
def test_a_malformed_url_fails_at_once(url, no_retry):
    with pytest.raises(UserError, match="is not a valid web address"):
        open_splits(url)


def test_verify_finds_a_flipped_bit(copy):
    assert verify_shards(str(copy)) == []
    assert "all files match their checksums" in run_here("pipeline.shards", "verify", copy).stdout
    row = open_shards(str(copy)).index[6]
    tar = copy / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[row["offset"] + 50] ^= 1
    tar.write_bytes(content)
    (copy / "train-000002.tar").unlink()
    problems = verify_shards(str(copy))
    assert [Path(problem.split(" ")[0]).name for problem in problems] == ["train-000001.tar", "train-000002.tar"]
    result = run_here("pipeline.shards", "verify", copy)
    assert result.returncode == 1 and "does not match its checksum; copy it again" in result.stderr


DAMAGE = {
    "truncated": ("train-000001.index.npy", lambda content: content[:200], "is damaged"),
    "empty": ("train-000001.index.npy", lambda content: b"", "is damaged"),
    "missing": ("train-000001.index.npy", None, "is missing"),
    "of another shard": ("train-000002.index.npy", "train-000001.index.npy", "is damaged"),
    "truncated manifest": ("dataset.json", lambda content: content[:100], "dataset.json is damaged"),
    "another format": ("dataset.json", lambda content: b'{"format": "x"}', "is not in format"),
    "not an object": ("dataset.json", lambda content: b"[]", "is not in format"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_index_damage_is_reported_and_fixed_by_indexing_again(copy, original, case):
    name, change, message = DAMAGE[case]
    if change is None:
        (copy / name).unlink()
    else:
        content = (copy / change).read_bytes() if isinstance(change, str) else change((copy / name).read_bytes())
        (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_shards(str(copy))
    assert f"run `python -m pipeline.shards index {copy}` to create it again" in str(error.value)
    again, whole = index_shards(str(copy)), open_shards(str(original))
    assert np.array_equal(again.index, whole.index)
    assert again.manifest["shards"] == whole.manifest["shards"]
    # class names come from the old manifest if it is readable
    assert again.classes == (["0", "1", "2"] if name == "dataset.json" else whole.classes)


MANIFEST_DAMAGE = {
    "no shards": lambda manifest: manifest.pop("shards"),
    "no classes": lambda manifest: manifest.pop("classes"),
    "numeric classes": lambda manifest: manifest.update(classes=[0, 1, 2]),
    "no samples": lambda manifest: manifest["shards"][0].pop("samples"),
    "negative samples": lambda manifest: manifest["shards"][0].update(samples=-1),
    "impossible size": lambda manifest: manifest["shards"][1].update(bytes=10**30),
    "samples as text": lambda manifest: manifest["shards"][1].update(samples="5"),
    "shard as text": lambda manifest: manifest["shards"].append("train-000003.tar"),
    "no checksum": lambda manifest: manifest["shards"][0].pop("sha256"),
    "incomplete index": lambda manifest: manifest.update(index={"bytes": 5}),
    "label without class": lambda manifest: manifest["classes"].pop(),
    "wrong type of made_by": lambda manifest: manifest.update(made_by="by hand"),
    "no pixels": lambda manifest: manifest.update(pixels=None),
    "no bits": lambda manifest: manifest.update(pixels={"channels": 3}),
    "too many channels": lambda manifest: manifest.update(pixels={"channels": 17, "bits": 8}),
    "path outside": lambda manifest: manifest["shards"][0].update(file="../train-000000.tar"),
    "absolute path": lambda manifest: manifest["shards"][0].update(file="/train-000000.tar"),
    "empty name": lambda manifest: manifest["shards"][0].update(file=""),
}


@pytest.mark.parametrize("case", MANIFEST_DAMAGE)
def test_a_damaged_manifest_is_reported(copy, case):
    manifest = json.loads((copy / "dataset.json").read_text())
    MANIFEST_DAMAGE[case](manifest)
    (copy / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"dataset\.json is damaged \(.+\); copy it again, or run"):
        open_shards(str(copy))


@pytest.mark.parametrize("damage", [{"classes": 3}, {"classes": [1, 2, 3]}, {"name": 5, "split": []}, {"made_by": "x"}])
def test_indexing_replaces_a_damaged_manifest(original, tmp_path, damage):
    copy = with_manifest(original, tmp_path / "copy", lambda manifest: manifest.update(damage))
    shards = index_shards(str(copy))
    assert len(shards) == 12 and len(shards.classes) == 3
    assert (shards.classes == ["0", "1", "2"]) == ("classes" in damage)
    assert shards.manifest["made_by"] and isinstance(shards.manifest["name"], str)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": "streamclr-shards-1", "shards": [{"file": []}, 5]}'])
def test_indexing_replaces_an_unparsable_manifest(copy, text):
    (copy / "dataset.json").write_text(text)
    assert index_shards(str(copy)).classes == ["0", "1", "2"]


def test_show_escapes_brackets_in_names(tmp_path, capsys, monkeypatch):
    """rich would interpret them as markup."""
    monkeypatch.setenv("COLUMNS", "300")  # avoid wrapped lines
    image = pictures()["class_0/image_0.jpg"]
    files = {
        f"{number}.{kind}": content
        for number in (0, 1)
        for kind, content in (("jpg", image), ("cls", b"[/%d]" % number))
    }
    write_split(webdataset_source(write_tar(tmp_path / "[bold].tar", files)), tmp_path / "[red]", "train")
    tables, problems = show(str(tmp_path / "[red]"))
    Console().print(*tables)
    printed = capsys.readouterr().out
    assert problems == []
    assert all(name in printed for name in ("[/0]", "[/1]", "[bold] train", "[red]"))


def test_interrupted_indexing_leaves_no_shard_set(copy, monkeypatch):
    (copy / "dataset.json").unlink()
    monkeypatch.setattr("pipeline.shards.index.write_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index_shards(str(copy))
    with pytest.raises(UserError, match="have no index"):
        open_shards(str(copy))


def test_a_test_split_without_labels_gives_way_to_a_val_split(original, tmp_path):
    for split in ("train", "test", "val"):
        shutil.copytree(original, tmp_path / split)
    assert open_splits(str(tmp_path))[1].root == f"{tmp_path}/test"
    remove_labels(tmp_path / "test")
    assert open_splits(str(tmp_path))[1].root == f"{tmp_path}/val"
    remove_labels(tmp_path / "val")
    assert open_splits(str(tmp_path))[1].root == f"{tmp_path}/test"


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


def test_dataset_json_records_the_conversion_options(original):
    manifest = json.loads((original / "dataset.json").read_text())
    assert manifest["made_by"] == {"command": "pipeline.convert", "seed": 0, "samples_per_shard": 5}
    assert manifest["samples"] == 12 and manifest["class_counts"] == [4, 4, 3]
    for shard in manifest["shards"]:
        assert shard["bytes"] == (original / shard["file"]).stat().st_size


# ---- summary


def test_show(many, original, monkeypatch, capsys):
    result = run_module("pipeline.shards", "show", many)
    assert result.returncode == 0, result.stderr
    lines = [[cell.strip() for cell in re.split("[│┃]", line)] for line in result.stdout.splitlines()]
    cells = {line[1]: line[2] for line in lines if len(line) > 3}
    assert cells["name"] == "noise train" and cells["shards"] == "20 with 6 images"
    assert cells["images"] == "120, 40 of them unlabeled; 0 were left out"
    assert cells["a"] == cells["b"] == "40"
    assert cells["0 to 31"] == "120"  # short sides of 20 to 25 pixels
    assert cells["0 to 3"] == "120"  # kB
    for root, code, found in (original, None, ["pipeline.convert", "class_2"]), (original / "nowhere", "No shards", []):
        monkeypatch.setattr("sys.argv", ["shards", "show", str(root)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr().out
        assert str(end.value.code).startswith(str(code)) and all(text in printed for text in found)
        assert bool(printed) == bool(found)


def test_verify_and_show_take_a_folder_of_splits(original, tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        shutil.copytree(original, tmp_path / split)

    def status(command: str) -> int | str | None:
        monkeypatch.setattr("sys.argv", ["shards", command, str(tmp_path)])
        try:
            return main()
        except SystemExit as error:
            return error.code

    assert status("verify") is None
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(tmp_path / "train"),
        str(tmp_path / "test"),
    ]
    assert status("show") is None and capsys.readouterr().out.count("shard set") == 2
    (tmp_path / "train" / "train-000001.index.npy").unlink()
    (tmp_path / "test" / "train-000001.tar").unlink()
    missing = [f"{tmp_path}/train/train-000001.index.npy is missing", f"{tmp_path}/test/train-000001.tar is missing"]
    assert [line.split(";")[0] for line in status("verify").splitlines()] == missing
    assert status("show").split(";")[0] == missing[0] and capsys.readouterr().out.count("shard set") == 1


@pytest.mark.parametrize("command", ["index", "verify", "show"])
def test_interrupting_shows_no_traceback(original, monkeypatch, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("verify.open_shards", "index.index_shards"):
        monkeypatch.setattr(f"pipeline.shards.{name}", interrupted)
    monkeypatch.setattr("sys.argv", ["shards", command, str(original)])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 130


def test_show_abridges_many_classes(many):
    shards = open_shards(str(many))
    names = [f"class {number}" for number in range(1000)]
    tables = summarize(replace(shards, manifest=shards.manifest | {"classes": names}))
    shown = list(tables[1].columns[0].cells)
    assert len(shown) == 21 and shown[:2] == ["class 0", "class 1"]
    assert shown[10] == "... 980 more" and shown[-1] == "class 999"
