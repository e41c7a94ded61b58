"""Common index of large sets: memory mapping, time to open, and damage to the index or the shards."""

import hashlib
import json
import os
import re
import shutil
import time
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pytest

from common import UserError
from pipeline.shards.dataset import open_shards, open_splits
from pipeline.shards.format import index_dtype
from pipeline.shards.index import index_shards
from pipeline.shards.verify import summarize, verify_shards
from tests.pipeline.image_sets import with_manifest
from tests.pipeline.web_server import cache_at, serving


@pytest.mark.parametrize("recorded", [True, False])
def test_labels_without_a_class_are_found(many, tmp_path, recorded):
    """From the largest label in the manifest, or from all rows if an older version wrote the set."""

    def change(manifest: dict) -> None:
        assert {shard["top_label"] for shard in manifest["shards"]} == {1}
        manifest["classes"] = ["a"]
        for shard in manifest["shards"] if not recorded else ():
            shard.pop("top_label")

    with pytest.raises(UserError, match=r"dataset.json is damaged \(1 classes, but an image with label 1\)"):
        open_shards(str(with_manifest(many, tmp_path / "copy", change)))


def test_verify_and_show_check_every_label(many, tmp_path):
    def change(manifest: dict) -> None:
        manifest["classes"] = ["a"]
        for shard in manifest["shards"]:
            shard["top_label"] = 0  # wrong

    copy = with_manifest(many, tmp_path / "copy", change)
    (problem,) = verify_shards(str(copy))
    assert "dataset.json is damaged (1 classes, but an image with label 1)" in problem
    with pytest.raises(UserError, match="an image with label 1"):
        summarize(open_shards(str(copy)))


def by_shards(root: Path) -> np.ndarray:
    """Rows of the shards' own indexes, joined independently."""
    parts = [np.load(path) for path in sorted(root.glob("part-*.index.npy"))]
    return np.array([tuple(row) for part in parts for row in part.tolist()], np.result_type(*parts))


def test_the_common_index_is_memory_mapped_and_complete(many):
    shards = open_shards(str(many))
    assert len(shards) == 120 and shards.shard_starts.tolist() == list(range(0, 121, 6))
    assert type(shards.index) is np.ndarray and isinstance(shards.index.base, np.memmap)
    assert not shards.index.flags.writeable and shards.index_root == str(many)
    assert np.array_equal(shards.index, by_shards(many))
    widths = {np.load(path).dtype["key"].itemsize for path in many.glob("part-*.index.npy")}
    assert widths == {7, 8} and shards.index.dtype["key"].itemsize == 8
    entry = shards.manifest["index"]
    content = (many / "index.npy").read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert verify_shards(str(many)) == []


def test_a_set_without_a_common_index_still_opens(many, tmp_path):
    """Format of older versions, without index checksums."""
    older = Path(shutil.copytree(many, tmp_path / "older"))
    (older / "index.npy").unlink()
    manifest = json.loads((older / "dataset.json").read_text())
    manifest.pop("index")
    for shard in manifest["shards"]:
        shard.pop("index_sha256")
    (older / "dataset.json").write_text(json.dumps(manifest))
    assert np.array_equal(open_shards(str(older)).index, open_shards(str(many)).index)
    assert verify_shards(str(older)) == []


COMMON_DAMAGE = {
    "missing": (None, "index.npy is missing"),
    "truncated": (lambda content: content[:-1], "index.npy is damaged"),
    "empty": (lambda content: b"", "index.npy is damaged"),
    "no header": (lambda content: bytes(100) + content[100:], "index.npy is damaged"),
}


@pytest.mark.parametrize("case", COMMON_DAMAGE)
def test_damage_to_the_common_index_is_reported(many, tmp_path, case):
    change, message = COMMON_DAMAGE[case]
    copy = Path(shutil.copytree(many, tmp_path / "copy"))
    if change is None:
        (copy / "index.npy").unlink()
    else:
        (copy / "index.npy").write_bytes(change((copy / "index.npy").read_bytes()))
    with pytest.raises(UserError, match=rf"{message}; run `python -m pipeline\.shards index"):
        open_shards(str(copy))


def test_an_index_with_a_wrong_row_count_is_refused(many, tmp_path):
    copy = Path(shutil.copytree(many, tmp_path / "copy"))
    manifest = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(manifest | {"samples": 119}))
    with pytest.raises(UserError, match=r"index\.npy disagrees with dataset\.json"):
        open_shards(str(copy))


@pytest.mark.parametrize("name", ["part-004.index.npy", "index.npy", "part-007.tar"])
@pytest.mark.parametrize("place", [0.02, 0.5, -1])
def test_verify_finds_any_altered_byte(many, tmp_path, name, place):
    copy = Path(shutil.copytree(many, tmp_path / "copy"))
    content = bytearray((copy / name).read_bytes())
    content[int(place * len(content)) if place > 0 else -1] ^= 16
    (copy / name).write_bytes(content)
    try:
        (problem,) = verify_shards(str(copy))
        assert f"{copy / name} does not match its checksum; copy it again" in problem
    except UserError as error:  # damage that prevents opening
        assert name in str(error)


def test_any_damaged_header_byte_is_detected(many, tmp_path):
    """numpy parses the header as Python, so a changed byte may raise any exception or change the dtype."""
    copy = Path(shutil.copytree(many, tmp_path / "copy"))
    whole = (copy / "index.npy").read_bytes()
    for place in range(whole.index(b"}") + 1):
        content = bytearray(whole)
        content[place] ^= 16
        (copy / "index.npy").write_bytes(content)
        try:
            shards = open_shards(str(copy))
        except UserError as error:
            assert re.search(r"index\.npy (is damaged|disagrees)", str(error))
        else:  # an insignificant byte
            assert np.array_equal(shards.index, by_shards(many))


def test_verify_names_damaged_samples(many, tmp_path):
    copy = Path(shutil.copytree(many, tmp_path / "copy"))
    shards = open_shards(str(copy))
    content = bytearray((copy / "part-001.tar").read_bytes())
    for sample in (7, 9):
        content[shards.index["offset"][sample]] ^= 1
    (copy / "part-001.tar").write_bytes(content)
    (copy / "part-002.tar").write_bytes((copy / "part-002.tar").read_bytes()[:-1])
    (copy / "other.tar").write_bytes(content)
    problems = [problem.replace(f"{copy}/", "") for problem in verify_shards(str(copy))]
    assert problems == [
        "part-001.tar does not match its checksum; copy it again (damaged samples: 2, the first key-1-1, key-1-3).",
        "part-002.tar does not match its checksum; copy it again.",
        "other.tar is not in dataset.json; move it away or run `python -m pipeline.shards index`.",
    ]


def synthetic(root: Path, shards: int, each: int) -> int:
    """Write the index and manifest of a large set without tars; the rows are a hole in a sparse file."""
    dtype = index_dtype(20)
    with open(root / "index.npy", "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (shards * each,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + shards * each * dtype.itemsize)
    size = (root / "index.npy").stat().st_size
    sha256 = "0123456789abcdef" * 4
    entries = [
        {"file": f"train-{i:06d}.tar", "samples": each, "bytes": 1 << 27, "sha256": sha256, "index_sha256": sha256}
        | {"top_label": 0}
        for i in range(shards)
    ]
    manifest = {"format": "streamclr-shards-1", "name": "large", "split": "train", "classes": ["a"]}
    manifest |= {"samples": shards * each, "index": {"bytes": size, "sha256": sha256}, "shards": entries}
    (root / "dataset.json").write_text(json.dumps(manifest))
    return size


@pytest.mark.parametrize("field", ["key", "offset", "size", "height", "width", "label", "crc32"])
def test_a_flipped_bit_of_any_field_is_refused(many, tmp_path, field):
    """In the common index, and in a shard's own index if there is no common one."""
    for name, change in (("index.npy", lambda _: None), ("part-003.index.npy", lambda manifest: manifest.pop("index"))):
        copy = with_manifest(many, tmp_path / name, change)
        content = bytearray((copy / name).read_bytes())
        dtype = np.load(copy / name).dtype
        content[len(content) - dtype.itemsize + dtype.fields[field][1]] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is damaged; run `python -m pipeline\.shards index"):
            open_shards(str(copy))


@pytest.mark.parametrize(
    ("field", "value"), [("offset", -1), ("size", 2**62), ("size", -5), ("height", 0), ("width", -1), ("label", -2)]
)
def test_impossible_rows_are_refused_without_a_checksum(many, tmp_path, field, value):
    """Sets written by older versions have no checksums of the shards' indexes."""

    def change(manifest: dict) -> None:
        manifest.pop("index")
        for shard in manifest["shards"]:
            shard.pop("index_sha256")

    copy = with_manifest(many, tmp_path / "copy", change)
    rows = np.load(copy / "part-003.index.npy")
    rows[field][2] = value
    np.save(copy / "part-003.index.npy", rows)
    with pytest.raises(UserError, match=r"part-003\.index\.npy disagrees with dataset\.json"):
        open_shards(str(copy))


def test_a_damaged_index_in_the_cache_is_fetched_again(many, tmp_path):
    with serving(many) as server:
        for _ in range(2):
            shards = open_shards(server.url, cache_at(tmp_path))
            assert np.array_equal(shards.index, by_shards(many))
            file = tmp_path / "cache" / "files" / shards.manifest["index"]["sha256"]
            content = bytearray(file.read_bytes())
            content[-20] ^= 1
            file.unlink()  # the other inode is memory-mapped
            file.write_bytes(content)
        assert server.count["index.npy"] == 2


def test_a_hundred_million_samples_open_in_under_a_second(tmp_path, monkeypatch):
    size = synthetic(tmp_path, shards=100_000, each=1000)
    assert size > 5e9 and (tmp_path / "index.npy").stat().st_blocks * 512 < 1e6  # sparse
    hashed = known_checksum(monkeypatch)
    cache = cache_at(tmp_path)
    open_shards(str(tmp_path), cache)  # hashes the whole index, once
    seconds = []
    for _ in range(3):  # the best of three, and of CPU time: the machine may be busy
        start = time.process_time()
        shards = open_shards(str(tmp_path), cache)
        assert len(shards) == 100_000_000 and shards.shard_starts[-1] == 100_000_000
        assert shards.index[np.array([99_999_999, 5])]["size"].tolist() == [0, 0]
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1 and hashed == [tmp_path / "index.npy"]
    os.utime(tmp_path / "index.npy", (0, 0))  # looks like another version
    open_shards(str(tmp_path), cache)
    assert len(hashed) == 2


def known_checksum(monkeypatch) -> list[Path]:
    """Replace hashing by the checksum of the synthetic set; the returned list collects the hashed files."""
    hashed = []
    monkeypatch.setattr("pipeline.shards.cache.file_sha256", lambda path: hashed.append(path) or "0123456789abcdef" * 4)
    return hashed


def test_opening_needs_no_memory_per_sample(tmp_path, monkeypatch):
    synthetic(tmp_path, shards=100, each=1_000_000)
    known_checksum(monkeypatch)
    tracemalloc.start()
    shards = open_shards(str(tmp_path), cache_at(tmp_path))
    shards.index[np.arange(0, 100_000_000, 1_000_000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize("scheme", ["http", "memory"])
def test_the_common_index_of_a_remote_set_is_fetched_once(many, tmp_path, scheme):
    remote = fsspec.filesystem("memory")
    remote.put(str(many), "/many/train", recursive=True)
    with serving(many, "drop", "flip", suffix="index.npy") as server:
        url = server.url if scheme == "http" else "memory://many/train"
        for _ in range(2):
            shards = open_shards(url, cache_at(tmp_path))
            assert np.array_equal(shards.index, by_shards(many)) and isinstance(shards.index.base, np.memmap)
        if scheme == "http":
            # broken in the middle, resumed but with a flipped bit, fetched again; then served from the cache
            assert server.count["index.npy"] == 3 and server.count["dataset.json"] == 2
            assert not any(name.startswith("part-") for name, _ in server.requests)
    remote.rm("/many", recursive=True)


def test_a_store_that_answers_403_for_missing_files(many, tmp_path):
    """As S3 does without permission to list: 403 instead of 404, and no index pages."""
    cache = cache_at(tmp_path)
    with serving(many.parent) as server:
        server.missing, server.lists = 403, False
        for address in server.url, f"{server.url}/train":
            train, test = open_splits(address, cache)
            assert np.array_equal(train.index, by_shards(many)) and test is None
        assert verify_shards(f"{server.url}/train", cache) == []
        with pytest.raises(UserError, match=r"No shards at .*/test or no permission to read them \(.*403.*\)"):
            open_shards(f"{server.url}/test", cache)
        with pytest.raises(UserError, match=r"There is no \.tar in .*; use .*does not list its files, use a pattern"):
            index_shards(f"{server.url}/train", cache)
