"""Cache of remote shards: size limit, damage, and processes that share it and may be killed at any moment."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from pipeline.shards.cache import Lease, ShardCache
from pipeline.shards.dataset import open_shards
from pipeline.shards.reader import Reader, ReadFailure
from pipeline.shards.remote import filesystem
from pipeline.shards.verify import verify_shards
from tests.pipeline.image_sets import ROOT
from tests.pipeline.web_server import QUICK, cache_at, cached_files, epoch, read_slices, serving, shard_entry


def test_an_invalid_checksum_does_not_name_a_file_outside_the_cache(small, tmp_path):
    fs, root = filesystem(small.root)
    for name in ("../../escaped", "", "0" * 63, "A" * 64):
        with pytest.raises(UserError, match="has no valid SHA-256 for"):
            cache_at(tmp_path).fetch(fs, f"{root}/part-000.tar", 1, name)


def test_the_least_recently_used_file_is_evicted(small, tmp_path):
    size, _ = shard_entry(small, 0)
    cache = cache_at(tmp_path, limit_bytes=2 * size + 100)
    fs, root = filesystem(small.root)
    names, uses = [entry["sha256"] for entry in small.manifest["shards"]], count(1_000_000)

    def fetch(number: int) -> None:
        assert cache.fetch(fs, f"{root}/part-{number:03d}.tar", *shard_entry(small, number))
        os.utime(cache.find(*shard_entry(small, number)), (next(uses),) * 2)

    fetch(0), fetch(1), fetch(0), fetch(2)
    assert cached_files(cache) == {names[0], names[2]}
    fetch(3)
    assert cached_files(cache) == {names[2], names[3]}


@pytest.mark.parametrize("shards_held", [8, 9, 12])
def test_an_epoch_within_the_size_limit(local, tmp_path, shards_held):
    """Room for two blocks of four shards: the limit is never exceeded, and each shard is fetched once per epoch."""
    size = max(entry["bytes"] for entry in local.manifest["shards"])
    cache = cache_at(tmp_path, limit_bytes=shards_held * size)
    largest, watching = [0], threading.Event()

    def watch() -> None:
        while not watching.is_set():
            files = list((cache.folder / "files").glob("*"))
            sizes = []
            for file in files:
                try:
                    sizes.append(file.stat().st_size)
                except FileNotFoundError:
                    continue
            largest[0] = max(largest[0], sum(sizes))

    with serving(Path(local.root)) as server:
        shards = open_shards(server.url, cache_at(tmp_path / "index cache"))
        cache.folder.joinpath("files").mkdir(parents=True)
        with ThreadPoolExecutor(1) as pool:
            watcher = pool.submit(watch)
            try:
                assert epoch(shards, cache, epochs=2) == epoch(local, epochs=2)
            finally:
                watching.set()
            watcher.result()
        tars = [server.count[entry["file"]] for entry in local.manifest["shards"]]
        assert all(1 <= count <= 4 for count in tars) and sum(tars) <= 24 * 2 + 8
    assert size < largest[0] <= cache.limit_bytes


def test_a_limit_below_one_block_is_refused(local, small, tmp_path):
    size = max(entry["bytes"] for entry in local.manifest["shards"])
    with serving(Path(local.root)) as server:
        shards = open_shards(server.url, cache_at(tmp_path))
        reader = Reader(shards, cache_at(tmp_path, limit_bytes=4 * size - 1))
        with pytest.raises(UserError, match=r"4 shards in use take .* GB, more than the limit of .*; raise the limit"):
            reader.prefetch([0, 1, 2, 3], [4])
        reader.prefetch([0, 1, 2], [3, 4])
        reader.prefetch([0, 1, 2, 3], [4])  # after the first call, the fourth is read by byte ranges
        assert reader.read(np.arange(24)) == Reader(local).read(np.arange(24))
        assert server.count["part-002.tar"] == 1 and server.count["part-003.tar"] == 6
        reader.close()
        tiny = cache_at(tmp_path / "tiny", limit_bytes=100)
        with pytest.raises(UserError, match=r"has no room for .*index\.npy .*; raise its limit"):
            open_shards(server.url, tiny)


def test_leased_files_are_not_evicted(small, tmp_path):
    size, first = shard_entry(small, 0)
    cache = cache_at(tmp_path, limit_bytes=2 * size + 100)
    fs, root = filesystem(small.root)
    lease = Lease(cache)
    lease.hold([first, shard_entry(small, 1)[1]])

    def fetch(number: int) -> Path | None:
        return cache.fetch(fs, f"{root}/part-{number:03d}.tar", *shard_entry(small, number))

    assert fetch(0) and fetch(1) and fetch(2) is None
    assert cached_files(cache) == {first, shard_entry(small, 1)[1]}
    lease.hold([first])
    assert fetch(2) and fetch(0).stat() and cache.find(*shard_entry(small, 1)) is None
    lease.close()
    assert fetch(1) and fetch(3) and first not in cached_files(cache)


def test_the_lease_of_a_killed_process_ends(small, tmp_path):
    size, first = shard_entry(small, 0)
    cache = cache_at(tmp_path, limit_bytes=size + 100)
    program = (
        "import sys; from pipeline.shards.cache import *; lease = Lease(ShardCache(sys.argv[1])); "
        "lease.hold([sys.argv[2]]); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(cache.folder), first]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        fs, root = filesystem(small.root)
        assert cache.fetch(fs, f"{root}/part-000.tar", size, first)
        assert cache.fetch(fs, f"{root}/part-001.tar", *shard_entry(small, 1)) is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert cache.fetch(fs, f"{root}/part-001.tar", *shard_entry(small, 1))
    assert cached_files(cache) == {shard_entry(small, 1)[1]} and not list((cache.folder / "leases").iterdir())


def test_a_read_only_cache_is_named(small, tmp_path):
    (tmp_path / "file").write_text("")
    with serving(Path(small.root)) as server:
        cache = ShardCache(tmp_path / "file" / "cache", retry_policy=QUICK)
        reader = Reader(open_shards(server.url, cache), cache)
        with pytest.raises(UserError, match=r"can't be used as a cache \(.*\); set \$STREAMCLR_CACHE to"):
            reader.prefetch([0])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_a_full_disk_is_named_without_another_attempt(small, tmp_path):
    size, sha256 = shard_entry(small, 0)
    (tmp_path / "cache" / "files").mkdir(parents=True)
    (tmp_path / "cache" / "files" / f"{sha256}.{size}.partial").symlink_to("/dev/full")
    with serving(Path(small.root)) as server:
        with pytest.raises(UserError, match=r"can't be used as a cache \(.*\); set \$STREAMCLR_CACHE to .* has room"):
            cache_at(tmp_path).fetch(*filesystem(f"{server.url}/part-000.tar", QUICK), size, sha256)
        assert server.count["part-000.tar"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_a_lease_on_a_full_disk_is_named(tmp_path):
    lease = Lease(cache_at(tmp_path))
    lease.path.unlink()
    lease.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"can't be used as a cache \(.*\); set \$STREAMCLR_CACHE to .* has room"):
        lease.hold(["0" * 64])
    lease.close()


def test_verify_names_a_broken_cache(small, tmp_path):
    (tmp_path / "file").write_text("")
    with serving(Path(small.root)) as server:
        cache = ShardCache(tmp_path / "file" / "cache", retry_policy=QUICK)
        with pytest.raises(UserError, match=r"can't be used as a cache \(.*\); set \$STREAMCLR_CACHE to"):
            verify_shards(server.url, cache)


def test_default_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "here"))
    assert ShardCache().folder == tmp_path / "here" and ShardCache("there").folder == Path("there")
    monkeypatch.delenv("STREAMCLR_CACHE")
    assert ShardCache().folder == Path.home() / ".cache" / "streamclr" and ShardCache().limit_bytes == 50 * 10**9


def test_foreign_files_in_the_cache_are_ignored(small, tmp_path):
    size, _ = shard_entry(small, 0)
    cache = cache_at(tmp_path, limit_bytes=size + 100)
    foreign = ["files/.DS_Store", "files/.nfs0001", "files/notes.txt", "files/a.b.partial", "leases/x.held",
               "leases/._y.lock", "intact/x"]  # fmt: skip
    for name in foreign:
        (cache.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (cache.folder / name).write_bytes(b"foreign")
    (cache.folder / "files" / "folder").mkdir()
    fs, root = filesystem(small.root)
    for number in range(2):  # the second evicts the first
        assert cache.fetch(fs, f"{root}/part-{number:03d}.tar", *shard_entry(small, number))
    lease = Lease(cache)
    lease.hold([])
    lease.close()
    assert all((cache.folder / name).read_bytes() == b"foreign" for name in foreign)
    assert cache.find(*shard_entry(small, 1)) and not cache.find(*shard_entry(small, 0))


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("prefetched", [True, False])
def test_damaged_cache_files_are_replaced(small, tmp_path, damage, ranges, prefetched):
    """Until the shard has been fetched again, its samples come from the server."""
    expected, (size, sha256) = Reader(small).read(np.arange(12)), shard_entry(small, 0)
    with serving(Path(small.root)) as server:
        server.ranges = ranges
        cache = cache_at(tmp_path)
        reader = Reader(open_shards(server.url, cache), cache)
        reader.prefetch([0], [1])
        assert reader.read(np.arange(12)) == expected
        if not prefetched:
            reader.close()
        file = cache.folder / "files" / sha256
        content = bytearray(file.read_bytes())
        content[small.index["offset"][1]] ^= 1
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(content if damage == "altered" else content[: small.index["offset"][1] + 5])
        for _ in range(2):
            assert reader.read(np.arange(12)) == expected
            if prefetched:
                reader.prefetch([0], [1])
        if prefetched or not ranges:
            assert cache.find(size, sha256).read_bytes() == Path(small.root, "part-000.tar").read_bytes()
        elif damage == "altered":
            assert not file.exists()
        reader.close()
        whole = [name for name, requested in server.requests if requested is None]
        assert whole.count("part-000.tar") <= 2 and whole.count("part-001.tar") == 1


def test_a_wrong_checksum_in_the_index_does_not_refetch_the_shard(small, tmp_path):
    """The cached bytes equal those of the store, so another download would not help."""
    with serving(Path(small.root)) as server:
        cache = cache_at(tmp_path)
        shards = open_shards(server.url, cache)
        shards.index["crc32"][1] ^= 1
        reader = Reader(shards, cache)
        for _ in range(3):
            reader.prefetch([0], [1])
            encoded = reader.read(np.arange(3))
            assert isinstance(encoded[1], ReadFailure) and not isinstance(encoded[2], ReadFailure)
        reader.close()
        whole = [requested for name, requested in server.requests if name == "part-000.tar" and requested is None]
        assert len(whole) == 1


# ---- multiple processes


def test_ranks_of_one_machine_fetch_each_shard_once(local, tmp_path):
    context = multiprocessing.get_context("spawn")
    with serving(Path(local.root), suffix="none") as server:
        results = context.Queue()
        ranks = [context.Process(target=read_slices, args=(server.url, tmp_path, rank, results)) for rank in range(4)]
        for process in ranks:
            process.start()
        slices = dict(results.get(timeout=60) for _ in ranks)
        for process in ranks:
            process.join()
        fetched = {name: count for name, count in server.count.items() if name != "dataset.json"}
    assert set(fetched.values()) == {1} and len(fetched) == 24 + 1  # plus the common index
    assert list(chain(*(slices[rank][step] for step in range(18) for rank in range(4)))) == epoch(local)


def test_a_fetch_resumes_after_its_process_was_killed(small, tmp_path):
    size, sha256 = shard_entry(small, 0)
    program = (
        "import sys; from pipeline.shards.cache import *; from pipeline.shards.remote import filesystem; "
        "ShardCache(sys.argv[1]).fetch(*filesystem(sys.argv[2]), int(sys.argv[3]), sys.argv[4])"
    )
    cache = cache_at(tmp_path)
    with serving(Path(small.root), "stall") as server:
        url = f"{server.url}/part-000.tar"
        process = subprocess.Popen([sys.executable, "-c", program, cache.folder, url, str(size), sha256], cwd=ROOT)
        deadline = time.monotonic() + 30
        partial = cache.folder / "files" / f"{sha256}.{size}.partial"
        while not (server.count["part-000.tar"] and partial.exists()) and time.monotonic() < deadline:
            time.sleep(0.01)
        while not partial.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        received = partial.stat().st_size
        assert cache.find(size, sha256) is None
        found = cache.fetch(*filesystem(url), size, sha256)
        assert server.requests[-1] == ("part-000.tar", f"bytes={received}-")
        assert found.read_bytes() == Path(small.root, "part-000.tar").read_bytes()
        assert cached_files(cache) == {sha256}


def test_a_file_that_is_read_once_leaves_nothing_behind(small, tmp_path):
    """Neither normally nor if its process is killed."""
    program = (
        "import sys; from pipeline.shards.cache import *; from pipeline.shards.remote import filesystem; "
        "ShardCache(sys.argv[1]).whole_file(*filesystem(sys.argv[2])).__enter__()"
    )
    cache = cache_at(tmp_path)
    with serving(Path(small.root), "stall") as server:
        url = f"{server.url}/part-000.tar"
        process = subprocess.Popen([sys.executable, "-c", program, cache.folder, url], cwd=ROOT)
        deadline = time.monotonic() + 30
        while not server.count["part-000.tar"] and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        with cache.whole_file(*filesystem(url)) as file:
            assert file.read() == Path(small.root, "part-000.tar").read_bytes()
        assert server.count["part-000.tar"] == 2 and not list(cache.folder.iterdir())
