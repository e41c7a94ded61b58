"""Shards at s3://, gs:// and hf:// URLs, on a fake object store that has no folders and fails at times.

The clients (s3fs, gcsfs, huggingface_hub) belong to fsspec. These tests check that URLs reach them unchanged and that
listing, sizes, byte ranges and retries work on an object store.
"""

import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.registry import _registry, known_implementations
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from common import UserError
from pipeline.augment.config import AugmentConfig
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.shards.dataset import open_shards, open_splits
from pipeline.shards.index import index_shards
from pipeline.shards.reader import Reader
from pipeline.shards.verify import verify_shards
from tests.pipeline.image_sets import pictures, write_folder
from tests.pipeline.loaders import view_loader
from tests.pipeline.web_server import cache_at

URLS = ("s3://bucket/some/prefix", "gs://bucket/prefix/", "hf://datasets/someone/set")


class Throttled(Exception):
    """A store's own exception type, not an OSError."""


class ObjectStore(AbstractFileSystem):
    """Objects by full name; a folder exists if it is a prefix of an object's name."""

    protocol = ("s3", "gs", "hf")
    objects: ClassVar[dict[str, bytes]] = {}
    failures: ClassVar[Counter] = Counter()
    """Number of remaining failures per object."""
    ranges: ClassVar[list[tuple[str, int, int]]] = []
    read_only: ClassVar[bool] = False
    lock: ClassVar = threading.Lock()

    def ls(self, path, detail=True, **_):
        prefix = f"{self._strip_protocol(path)}/"
        inside = sorted({name[len(prefix) :].split("/")[0] for name in self.objects if name.startswith(prefix)})
        if not inside and prefix[:-1] not in self.objects:
            raise FileNotFoundError(path)
        found = [self.info(prefix + name) for name in inside] or [self.info(path)]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if path in self.objects:
            return {"name": path, "size": len(self.objects[path]), "type": "file"}
        if any(name.startswith(f"{path}/") for name in self.objects):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def _open(self, path, mode="rb", block_size=None, autocommit=True, cache_options=None, **options):
        return StoredFile(self, path, mode, block_size or 5 << 20, autocommit, cache_options=cache_options, **options)

    def cat_file(self, path, start=None, end=None, **_):
        path = self._strip_protocol(path)
        size = self.info(path)["size"]
        return self.get_range(path, start or 0, size if end is None else end)

    def get_range(self, path, start, end):
        with self.lock:
            self.ranges.append((path, start, min(end, len(self.objects[path]))))
            if self.failures[path] > 0:
                self.failures[path] -= 1
                raise Throttled("Please reduce your request rate")
        return self.objects[path][start:end]

    def pipe_file(self, path, value, **_):
        if self.read_only:
            raise PermissionError("Access Denied")
        self.objects[self._strip_protocol(path)] = bytes(value)

    def rm_file(self, path):
        del self.objects[self._strip_protocol(path)]

    def cp_file(self, path1, path2, **_):
        self.pipe_file(path2, self.objects[self._strip_protocol(path1)])

    def makedirs(self, path, exist_ok=False):
        pass


class StoredFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return self.fs.get_range(self.path, start, end)


@pytest.fixture(autouse=True)
def store():
    """Register the store for all three protocols during one test."""
    for protocol in ObjectStore.protocol:
        fsspec.register_implementation(protocol, ObjectStore, clobber=True)
    yield ObjectStore
    for protocol in ObjectStore.protocol:
        _registry.pop(protocol)
    ObjectStore.clear_instance_cache()
    ObjectStore.objects.clear()
    ObjectStore.failures.clear()
    ObjectStore.ranges.clear()
    ObjectStore.read_only = False


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """Two splits: thirty images in five shards, and six in one."""
    root = tmp_path_factory.mktemp("local")
    for split, each, size in (("train", 10, 6), ("test", 2, 6)):
        source = folder_source(write_folder(root / f"{split}-images", pictures(each=each)))
        write_split(source, root / "set", split, samples_per_shard=size)
    return root / "set"


def upload(folder: Path, url: str, suffixes: tuple[str, ...] = ("",)) -> None:
    prefix = ObjectStore._strip_protocol(url)
    for file in folder.rglob("*"):
        if file.is_file() and file.name.endswith(suffixes):
            ObjectStore.objects[f"{prefix}/{file.relative_to(folder).as_posix()}"] = file.read_bytes()


@pytest.mark.parametrize("url", URLS)
def test_splits_are_opened_and_verified(local, tmp_path, url):
    upload(local, url)
    cache = cache_at(tmp_path)
    here, (train, test) = open_shards(str(local / "train")), open_splits(url, cache)
    assert np.array_equal(train.index, here.index) and len(test) == 6
    assert verify_shards(train.root, cache) == []
    name = f"{ObjectStore._strip_protocol(url)}/train/train-000003.tar"
    ObjectStore.objects[name] = ObjectStore.objects[name][:-1] + b"x"
    (problem,) = verify_shards(train.root, cache)
    assert problem.startswith(name) and "does not match its checksum" in problem


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("failures", [0, 3])
def test_training_batches_equal_those_of_the_local_set(local, tmp_path, monkeypatch, url, failures):
    """Whole shards through the cache; every object fails `failures` times with the store's own exception."""

    def batches(root: str, **options) -> list:
        loader = view_loader(open_shards(root, options.get("cache")), AugmentConfig(size=16), batch_size=8, seed=1,
                            device=torch.device("cpu"), backend="opencv", epochs=2, **options)  # fmt: skip
        found = [batch for _ in range(2) for batch in loader]
        loader.close()
        return found

    monkeypatch.setattr("pipeline.shards.remote.CHUNK_BYTES", 7000)  # several ranges per shard
    upload(local, url)
    ObjectStore.failures.update(dict.fromkeys(ObjectStore.objects, failures))
    expected = batches(str(local / "train"))
    for batch, reference in zip(batches(f"{url.rstrip('/')}/train", cache=cache_at(tmp_path)), expected, strict=True):
        assert torch.equal(batch.index, reference.index) and torch.equal(batch.views, reference.views)
    if not failures:  # each shard is fetched once, as a whole
        spans: dict[str, list] = {}
        for name, first, last in ObjectStore.ranges:
            spans.setdefault(name, []).append((first, last))
        tars = {name: sorted(parts) for name, parts in spans.items() if name.endswith(".tar")}
        assert len(tars) == 5
        for name, parts in tars.items():
            assert len(parts) > 1 and parts[0][0] == 0 and parts[-1][1] == len(ObjectStore.objects[name])
            assert all(before[1] == after[0] for before, after in pairwise(parts))


@pytest.mark.parametrize("url", URLS)
def test_single_samples_are_read_by_byte_ranges(local, tmp_path, url):
    upload(local, url)
    shards = open_shards(f"{url.rstrip('/')}/train", cache_at(tmp_path))
    reader = Reader(shards, cache_at(tmp_path))
    ObjectStore.ranges.clear()
    ObjectStore.failures.update(dict.fromkeys(ObjectStore.objects, 2))
    samples = np.array([29, 0, 13])
    assert reader.read(samples) == Reader(open_shards(str(local / "train")))(samples)
    rows = shards.index[samples]
    requested = {(first, last) for _, first, last in ObjectStore.ranges}
    assert requested == set(zip(rows["offset"].tolist(), (rows["offset"] + rows["size"]).tolist(), strict=True))


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("url", URLS)
def test_foreign_tars_are_indexed_in_place_or_in_the_cache(local, tmp_path, url, read_only):
    upload(local / "train", url, (".tar",))
    ObjectStore.read_only = read_only
    cache = cache_at(tmp_path)
    with pytest.raises(UserError, match=r"The tars in .* have no index"):
        open_shards(url, cache)
    shards = index_shards(url, cache)
    assert len(shards) == 30 and (shards.index_root == url) != (read_only or url.startswith("hf:"))
    here = open_shards(str(local / "train"))
    assert {key for key in shards.index["key"]} == set(here.index["key"])
    assert open_shards(url, cache).index["crc32"].tolist() == here.index["crc32"].tolist()


@pytest.mark.parametrize("url", URLS)
def test_missing_sets_and_lasting_failures_are_reported(local, tmp_path, url):
    with pytest.raises(UserError, match=r"No shards at .*; (create them with|correct the name, or log in)"):
        open_shards(url, cache_at(tmp_path))
    upload(local / "train", url)
    ObjectStore.failures.update(dict.fromkeys(ObjectStore.objects, 10**6))
    with pytest.raises(UserError, match=r"after 6 attempts \(Please reduce your request rate\); check the connection"):
        open_shards(url, cache_at(tmp_path))


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
    absent = {"class": "no_such_package.Store", "err": "Install no_such_package to access it"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    with pytest.raises(
        UserError, match=r"^absent://bucket can't be opened \(Install .*\): pip install no_such_package\.$"
    ):
        open_shards("absent://bucket")
    with pytest.raises(
        UserError, match=r"^nope://x can't be opened \(Protocol not known: nope\): use a folder, or a URL"
    ):
        open_shards("nope://x")
