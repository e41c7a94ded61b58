"""WebDataset tars from elsewhere: indexed where they are, whole, cut short or damaged."""

import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from errors import UserError
from pipeline.reader import Reader
from pipeline.shard_index import index_shards
from pipeline.shard_report import verify_shards
from pipeline.shards import open_shards, open_splits
from tests.pipeline.image_sets import damaged, pictures, read_by_webdataset, run_module, write_tar
from tests.pipeline.web_server import serving


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
    rest, changed = shards.manifest["left_out"]
    assert rest["name"] == "shard-001.tar:the rest of the tar" and changed["name"] == "shard-001.tar"
    assert verify_shards(str(root)) == []  # the checksum is that of the file as it is


def test_a_damaged_header_in_a_foreign_tar(tmp_path):
    root = foreign_tars(tmp_path / "foreign", [labelled(0), labelled(4)])
    with tarfile.open(root / "shard-000.tar") as tar:
        third = tar.getmembers()[2].offset
    content = bytearray((root / "shard-000.tar").read_bytes())
    content[third + 2] ^= 1
    (root / "shard-000.tar").write_bytes(content)
    shards = index_shards(str(root))
    (entry,) = shards.manifest["left_out"]
    assert entry["name"] == "shard-000.tar:the rest of the tar" and "bad checksum" in entry["reason"]
    assert {"004", "007"} <= {key.decode() for key in shards.index["key"]}


def test_a_foreign_set_at_a_read_only_address(tmp_path, monkeypatch):
    """Its index is made over http, past broken connections, and kept in the cache; so is that of a folder."""
    root = foreign_tars(tmp_path / "foreign", [labelled(0), labelled(4)])
    files = {file.name for file in root.iterdir()}
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
    with serving(root, "drop", "503", suffix="000.tar") as server:
        with pytest.raises(
            UserError, match=rf"have no index: run `python -m pipeline\.shards index {server.url}` first"
        ):
            open_shards(server.url)
        result = run_module("pipeline.shards", "index", server.url)
        assert result.returncode == 0 and "7 images in 2 shards indexed." in result.stdout, result.stderr
        shards = open_shards(server.url)
        assert shards.root == server.url and Path(shards.index_root).is_relative_to(tmp_path / "cache" / "indexes")
        assert {file.name for file in root.iterdir()} == files
        assert run_module("pipeline.shards", "verify", server.url).returncode == 0
        encoded = Reader(shards).read(np.arange(7))
        monkeypatch.setattr("pipeline.shard_index._writable", lambda *_: False)
        there = index_shards(str(root))
        assert {file.name for file in root.iterdir()} == files and there.index_root != there.root
        monkeypatch.undo()
        here = index_shards(str(root))
        assert np.array_equal(here.index, shards.index) and np.array_equal(there.index, shards.index)
        assert Reader(here).read(np.arange(7)) == encoded and here.index_root == str(root)
        (root / "shard-001.tar").write_bytes((root / "shard-000.tar").read_bytes())
        monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
        (problem,) = verify_shards(server.url)
        assert "shard-001.tar is not the file that was written" in problem


def test_a_foreign_set_of_many_shards_gets_a_common_index(tmp_path):
    image = pictures()["class_0/image_0.jpg"]
    root = foreign_tars(tmp_path / "foreign", [{f"{i}.": {"jpg": image, "cls": i % 2}} for i in range(17)])
    shards = index_shards(str(root))
    assert (root / "index.npy").exists() and isinstance(shards.index.base, np.memmap) and len(shards) == 17
    (root / "shard-016.tar").unlink()
    assert len(index_shards(str(root))) == 16 and not (root / "index.npy").exists()
    assert verify_shards(str(root)) == []


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
