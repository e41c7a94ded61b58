"""Reader: exact bytes from local and remote shards, and errors for unreadable samples."""

import errno
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from common import UserError
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.shards.dataset import ShardSet, open_shards
from pipeline.shards.reader import Reader, ReadFailure
from tests.pipeline.image_sets import contents, pictures, write_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    root = tmp_path_factory.mktemp("shards")
    source = folder_source(write_folder(root / "in", pictures(each=10)))
    return write_split(source, root / "out", "train", samples_per_shard=7)


@pytest.fixture
def copy(shards, tmp_path) -> ShardSet:
    (tmp_path / "copy").mkdir()
    fsspec.filesystem("file").put(shards.root + "/*", str(tmp_path / "copy"))
    return open_shards(str(tmp_path / "copy"))


@pytest.fixture
def remote(shards):
    fs = fsspec.filesystem("memory")
    fs.put(shards.root, "/reader/train", recursive=True)
    yield open_shards("memory://reader/train")
    fs.rm("/reader", recursive=True)


def expected(shards: ShardSet, samples: np.ndarray) -> list[bytes]:
    encoded = {key: content for key, (_, content) in contents(shards).items()}
    return [encoded[key.decode()] for key in shards.index["key"][samples]]


def test_samples_in_any_order(shards, remote):
    samples = np.random.default_rng(0).permutation(np.concatenate([np.arange(30), [7, 7, 6]]))
    for each in shards, remote:
        assert Reader(each)(samples) == Reader(each).read(samples) == expected(shards, samples)
        assert Reader(each)(samples[:0]) == Reader(each).read(samples[:0]) == []


def test_from_many_threads(shards):
    reader, draws = Reader(shards), np.random.default_rng(0).integers(0, 30, (40, 8))
    with ThreadPoolExecutor(8) as pool:
        for samples, encoded in zip(draws, pool.map(reader, draws), strict=True):
            assert encoded == expected(shards, samples)


def test_no_file_stays_open(shards):
    before = set(os.listdir("/dev/fd")) if os.path.exists("/dev/fd") else set()
    reader = Reader(shards)
    for _ in range(20):
        reader(np.arange(30))
    assert not os.path.exists("/dev/fd") or len(os.listdir("/dev/fd")) <= len(before)


def test_a_missing_or_truncated_shard_is_reported(copy, remote):
    tar = os.path.join(copy.root, "train-000001.tar")
    os.truncate(tar, int(copy.index[9]["offset"]) + 10)
    reader = Reader(copy)
    assert reader(np.array([8])) == expected_bytes(remote, 8)
    with pytest.raises(UserError, match=r"train-000001\.tar is shorter than its index says"):
        reader(np.array([0, 9]))
    os.remove(tar)
    with pytest.raises(UserError, match=r"can't be read .*train-000001\.tar.*copy it again"):
        reader(np.array([8]))
    fsspec.filesystem("memory").rm_file("/reader/train/train-000002.tar")
    with pytest.raises(UserError, match=r"can't be read .*train-000002\.tar"):
        Reader(remote)(np.arange(30))


def expected_bytes(shards: ShardSet, sample: int) -> list[bytes]:
    return Reader(shards)(np.array([sample]))


def test_bad_samples_are_reported_without_affecting_others(copy, shards):
    """Altered, truncated and missing shards at once."""
    rows = copy.index
    with open(os.path.join(copy.root, "train-000000.tar"), "r+b") as tar:
        tar.seek(int(rows["offset"][2]) + 20)
        byte = tar.read(1)
        tar.seek(-1, os.SEEK_CUR)
        tar.write(bytes([byte[0] ^ 4]))
    os.truncate(os.path.join(copy.root, "train-000001.tar"), int(rows["offset"][9]) + 10)
    os.remove(os.path.join(copy.root, "train-000003.tar"))
    samples = np.random.default_rng(0).permutation(len(shards))
    bad = {2: r"bytes in .*train-000000.tar do not match the checksum in the index"}
    bad |= dict.fromkeys(range(9, 14), "train-000001.tar is shorter than its index says")
    bad |= dict.fromkeys(range(21, 28), "A shard of .* can't be read .*train-000003.tar")
    encoded = Reader(copy).read(samples)
    for sample, data, whole in zip(samples, encoded, expected(shards, samples), strict=True):
        if sample in bad:
            assert isinstance(data, ReadFailure) and re.search(bad[sample], data.reason)
        else:
            assert data == whole


@pytest.mark.parametrize(("field", "value"), [("size", 2**62), ("size", -1), ("offset", -512), ("offset", 2**62)])
def test_a_damaged_index_row_allocates_no_memory(copy, remote, shards, field, value):
    """The index may change after it was compared with its checksum."""
    for each in copy, remote:
        each.index[field][3] = value
        encoded = Reader(each).read(np.arange(7))
        assert isinstance(encoded[3], ReadFailure) and "row in the index" in encoded[3].reason
        assert encoded[:3] + encoded[4:] == expected(shards, np.array([0, 1, 2, 4, 5, 6]))


@pytest.mark.parametrize("number", ["EIO", "ESTALE", "EMFILE"])
def test_transient_errors_are_retried(copy, shards, monkeypatch, number):
    fails = []

    def fail(path, *arguments, **options):
        if fails:
            raise OSError(fails.pop(), "transient", path)
        return open(path, *arguments, **options)

    monkeypatch.setattr("pipeline.shards.reader.open", fail, raising=False)
    monkeypatch.setattr("pipeline.shards.reader.RETRY_WAITS_S", (0.001, 0.002, 0.003))
    samples, code = np.arange(7), getattr(errno, number)  # of one shard
    fails += [code] * 3
    assert Reader(copy).read(samples) == expected(shards, samples) and not fails
    fails += [code] * 4
    if number == "EMFILE":
        with pytest.raises(UserError, match=r"too many open files; raise `ulimit -n`"):
            Reader(copy).read(samples)
    else:
        assert all(isinstance(data, ReadFailure) and data.transient for data in Reader(copy).read(samples))
    assert not fails


def test_a_local_set_needs_neither_cache_nor_threads(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
    reader, before = Reader(shards), set(threading.enumerate())
    reader.prefetch([0, 1])
    assert reader.read(np.arange(30)) == expected(shards, np.arange(30))
    assert not (tmp_path / "cache").exists() and set(threading.enumerate()) <= before
    reader.close()
    assert reader.read(np.arange(3)) == expected(shards, np.arange(3))
