"""Remote shards: exact bytes in spite of server failures, resumed downloads, retries, prompt shutdown."""

import io
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem

from common import UserError
from pipeline.loader.sampler import ShardSampler
from pipeline.shards.cache import ShardCache
from pipeline.shards.dataset import list_tars, open_shards, open_splits
from pipeline.shards.format import index_name
from pipeline.shards.reader import Reader, ReadFailure
from pipeline.shards.remote import RetryPolicy, download, filesystem, with_retries
from pipeline.shards.web import WebFileSystem
from tests.pipeline.image_sets import ROOT
from tests.pipeline.web_server import QUICK, cache_at, cached_files, epoch, serving, shard_entry, write_set

FAULTS = ("503", "drop", "stall", "truncate", "flip", "whole")


def download_to(target: Path, fs: AbstractFileSystem, path: str, size: int | None = None) -> None:
    with open(target, "ab", buffering=0) as out:
        download(fs, path, out, size, QUICK, target.parent)


@pytest.mark.parametrize("fault", [*FAULTS, "all of them"])
def test_exact_bytes_from_a_failing_server(local, tmp_path, fault):
    """The first requests for every shard meet one fault, or six different ones."""
    faults = FAULTS if fault == "all of them" else (fault,) * (1 if fault in ("stall", "flip") else 2)
    with serving(Path(local.root), *faults) as server:
        shards = open_shards(server.url, cache_at(tmp_path))
        assert epoch(shards, cache_at(tmp_path)) == epoch(local)
        tars = {name for name, _ in server.requests if name.endswith(".tar")}
        assert len(tars) == 24 and min(server.count[name] for name in tars) >= (1 if fault == "whole" else 2)


def test_only_the_next_block_is_fetched_ahead(local, tmp_path):
    with serving(Path(local.root)) as server:
        shards = open_shards(server.url, cache_at(tmp_path))
        sampler = ShardSampler(shards.shard_starts, 8, seed=3, block_shards=4)
        reader = Reader(shards, cache_at(tmp_path))
        upcoming = sampler.upcoming_shards(0, 0, 0)
        reader.prefetch(upcoming)
        reader.read(sampler.batch(0, 0))
        expected = {local.manifest["shards"][shard]["file"] for shard in upcoming}
        deadline = time.monotonic() + 60
        while not expected <= {name for name, _ in server.requests} and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # time for an unwanted fetch to start
        fetched = {name for name, _ in server.requests if name.endswith(".tar")}
        assert fetched == expected and len(fetched) == 8
        reader.close()


def test_node_groups_fetch_different_shards(local, tmp_path):
    """Two nodes with separate caches fetch each shard once between them."""
    sampler = ShardSampler(local.shard_starts, 8, seed=3, block_shards=4, node_groups=2)
    with serving(Path(local.root)) as server:
        for node in range(2):
            shards = open_shards(server.url, cache_at(tmp_path / str(node)))
            reader = Reader(shards, cache_at(tmp_path / str(node)))
            for step in range(sampler.steps_per_epoch):
                reader.prefetch(sampler.upcoming_shards(0, step, step, node, 2))
                samples = sampler.batch(0, step, node, 2)
                assert reader.read(samples) == Reader(local).read(samples)
            reader.close()
        tars = [server.count[entry["file"]] for entry in local.manifest["shards"]]
        # at the end of an epoch, each node prefetches the first block of the next, which is assigned differently
        assert min(tars) == 1 and sum(tars) <= 24 + 2 * 4


@pytest.mark.parametrize("fault", ["503", "drop", "stall"])
def test_single_samples_from_a_failing_server(small, tmp_path, fault):
    """Without prefetch: by byte ranges, not through the cache."""
    with serving(Path(small.root), fault, fault) as server:
        reader = Reader(open_shards(server.url, cache_at(tmp_path)), cache_at(tmp_path))
        samples = np.array([23, 0, 5, 5, 12])
        assert reader.read(samples) == reader(samples) == Reader(small).read(samples)
        assert reader.read(samples[:0]) == []
        ranges = {requested for name, requested in server.requests if name == "part-003.tar"}
        row = small.index[23]
        assert ranges == {f"bytes={row['offset']}-{row['offset'] + row['size'] - 1}"}
        assert not (tmp_path / "cache" / "files").exists()


def test_an_altered_byte_range_is_reported(small, tmp_path):
    with serving(Path(small.root), "flip") as server:
        reader = Reader(open_shards(server.url, cache_at(tmp_path)), cache_at(tmp_path))
        first, second = reader.read(np.array([0])), reader.read(np.array([0]))
        assert (
            isinstance(first[0], ReadFailure)
            and "part-000.tar do not match the checksum in the index" in first[0].reason
        )
        assert second == Reader(small).read(np.array([0]))


def test_a_broken_download_resumes(small, tmp_path):
    size, _ = shard_entry(small, 0)
    with serving(Path(small.root), "drop", "stall", "drop") as server:
        target = tmp_path / "copy"
        download_to(target, *filesystem(f"{server.url}/part-000.tar", QUICK), size)
        assert target.read_bytes() == Path(small.root, "part-000.tar").read_bytes()
        begins = [int(r.removeprefix("bytes=").rstrip("-")) if r else 0 for _, r in server.requests]
        assert begins == [0, size // 2, size // 2 + size // 4, size - size // 8]


def test_a_download_without_ranges_starts_over(small, tmp_path):
    size, _ = shard_entry(small, 0)
    with serving(Path(small.root), "drop", "whole") as server:
        download_to(tmp_path / "copy", *filesystem(f"{server.url}/part-000.tar", QUICK))
        assert (tmp_path / "copy").read_bytes() == Path(small.root, "part-000.tar").read_bytes()
        assert [requested for _, requested in server.requests] == [None, f"bytes={size // 2}-"]


def test_a_store_that_sends_too_much_without_stating_the_size(tmp_path, monkeypatch):
    fs, path = filesystem("memory://too-long")
    monkeypatch.setattr(type(fs), "open", lambda *_, **__: io.BytesIO(bytes(300)))
    for partial in (b"", bytes(400)):
        (tmp_path / "copy").write_bytes(partial)
        with pytest.raises(UserError, match=r"after 6 attempts \(the store offers 300 bytes, but 200 are expected\)"):
            download_to(tmp_path / "copy", fs, path, 200)


def test_giving_up_names_cause_and_remedy(small, tmp_path, caplog):
    with serving(Path(small.root), *["503"] * 6) as server:
        shards, cache = open_shards(server.url, cache_at(tmp_path)), cache_at(tmp_path)
        reader = Reader(shards, cache)
        reader.prefetch([0])
        with pytest.raises(
            UserError, match=r"part-000\.tar can't be read after 6 attempts \(.*503.*\); check the conn"
        ):
            reader.read(np.array([1]))
        assert server.count["part-000.tar"] == 6
        assert [record.getMessage()[-22:] for record in caplog.records[:2]] == [
            "attempt 3 of 6 follows",
            "attempt 4 of 6 follows",
        ]
        reader.prefetch([0, 1])  # another attempt after the server recovered
        assert reader.read(np.arange(6)) == Reader(small).read(np.arange(6))
        reader.close()
    with pytest.raises(UserError, match=r"can't be read after 6 attempts .*refused"):
        open_shards(server.url, cache_at(tmp_path))


def test_a_missing_shard_is_requested_once(small, tmp_path):
    """Its samples are read failures, and the whole shard is not requested again."""
    with serving(Path(small.root)) as server:
        shards = open_shards(server.url, cache_at(tmp_path))
        tar = Path(small.root, "part-002.tar")
        tar.rename(tmp_path / "away")
        reader = Reader(shards, cache_at(tmp_path))
        for now in ([2], [1, 2], [2, 3]):
            reader.prefetch(now)
            bad, good = reader.read(np.array([12, 6]))
            assert isinstance(bad, ReadFailure) and re.search(r"can't be read \(.*part-002\.tar.*404", bad.reason)
            assert [good] == Reader(small).read(np.array([6])) and not bad.transient
        reader.close()
        requests = [requested for name, requested in server.requests if name == "part-002.tar"]
        assert requests.count(None) == 1 and len(requests) == 4  # the whole shard once, then one sample per read


@pytest.mark.parametrize("damage", ["altered", "truncated"])
def test_intact_samples_of_a_damaged_shard_are_read(small, tmp_path, caplog, damage):
    expected, row = Reader(small).read(np.arange(6, 12)), small.index[8]
    tar = Path(small.root, "part-001.tar")
    content = bytearray(tar.read_bytes())
    content[row["offset"] + 10] ^= 1
    tar.write_bytes(content if damage == "altered" else content[: row["offset"] + 10])
    with serving(Path(small.root)) as server:
        shards, cache = open_shards(server.url, cache_at(tmp_path)), cache_at(tmp_path)
        reader = Reader(shards, cache)
        for now in ([1], [0, 1], [1, 2]):
            reader.prefetch(now)
            encoded = reader.read(np.arange(6, 12))
        reader.close()
        fetched = [requested for name, requested in server.requests if name == "part-001.tar"].count(None)
    assert fetched == (3 if damage == "altered" else QUICK.attempts)
    kept = [True, True, False, *[damage == "altered"] * 3]
    assert [data == original for data, original in zip(encoded, expected, strict=True)] == kept
    reasons = [data.reason for data in encoded if isinstance(data, ReadFailure)]
    assert len(reasons) == kept.count(False)
    assert (
        "do not match the checksum in the index" if damage == "altered" else "is shorter than its index says"
    ) in reasons[0]
    assert sum("part-001.tar" in text and "follows" not in text for text in caplog.messages) == 1
    assert small.manifest["shards"][1]["sha256"] not in cached_files(cache)


def test_backoff_with_jitter(monkeypatch):
    waits = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    for _ in range(500):  # the means below have standard errors of about 1.3 %
        retry_policy = RetryPolicy(attempts=6, first_wait_s=1, longest_wait_s=6, stop=Stop())
        with pytest.raises(UserError, match="can't be read after 6 attempts"):
            with_retries(lambda: 1 / 0, "it", retry_policy)
    waits = np.array(waits).reshape(500, 5)
    assert np.allclose(waits.mean(0), [1, 2, 4, 6, 6], rtol=0.15)
    assert (waits >= np.array([1, 2, 4, 6, 6]) / 2).all() and (waits.std(0) > 0.2).all()


def test_retries_do_not_use_the_global_random_generator(small, tmp_path):
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    with serving(Path(small.root), "503") as server:
        download_to(tmp_path / "copy", *filesystem(f"{server.url}/part-000.tar", QUICK))
    assert random.random() == expected


def test_a_process_exits_without_waiting_for_downloads(small, tmp_path):
    program = (
        "import sys; from pipeline.shards.cache import *; from pipeline.shards.reader import *; "
        "from pipeline.shards import *; "
        "cache = ShardCache(sys.argv[1]); reader = Reader(open_shards(sys.argv[2], cache), cache); "
        "reader.prefetch(range(4)); print('started', flush=True); sys.exit('error: something else')"
    )
    with serving(Path(small.root), *["stall"] * 9) as server:
        command = [sys.executable, "-c", program, str(tmp_path), server.url]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "started\n"
            start = time.monotonic()
            assert process.stderr.read() == "error: something else\n" and process.wait() == 1
            assert time.monotonic() - start < 15  # a stalled connection times out after 30 s


def test_close_stops_downloads_at_once(small, tmp_path):
    before = set(threading.enumerate())
    with serving(Path(small.root), *["stall"] * 3) as server:
        slow = ShardCache(tmp_path / "cache", retry_policy=RetryPolicy(stall_s=5, first_wait_s=60, longest_wait_s=60))
        reader = Reader(open_shards(server.url, slow), slow)
        reader.prefetch(range(4))
        time.sleep(0.1)
        start = time.monotonic()
        reader.close()
        assert time.monotonic() - start < 3
        while any(thread.name.startswith("fetch") for thread in set(threading.enumerate()) - before):
            assert time.monotonic() - start < 20
            time.sleep(0.02)
        assert not list((tmp_path / "cache" / "leases").iterdir())


@pytest.fixture
def in_memory(small):
    fs = fsspec.filesystem("memory")
    fs.put(small.root, "/cache-test/train", recursive=True)
    yield "memory://cache-test"
    fs.rm("/cache-test", recursive=True)


def test_an_fsspec_file_system(small, in_memory, tmp_path):
    cache = cache_at(tmp_path)
    shards, _ = open_splits(in_memory, cache)
    assert epoch(shards, cache) == epoch(small)
    assert cached_files(cache) == {entry["sha256"] for entry in small.manifest["shards"]}


def test_a_broken_download_from_an_object_store_resumes(small, in_memory, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.shards.remote.CHUNK_BYTES", 1000)
    fs, path = filesystem(f"{in_memory}/train/part-000.tar")
    size, _ = shard_entry(small, 0)
    offsets = []

    class Breaking:
        def __init__(self, file):
            self.file, self.size, self.left = file, size, 3

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, offset):
            offsets.append(offset)
            self.file.seek(offset)

        def read(self, count):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("the store's own exception type")
            return self.file.read(count)

    original = type(fs).open
    monkeypatch.setattr(type(fs), "open", lambda self, *a, **k: Breaking(original(self, path, "rb")))
    download_to(tmp_path / "copy", fs, path, size)
    assert (tmp_path / "copy").read_bytes() == Path(small.root, "part-000.tar").read_bytes()
    assert offsets == list(range(0, size, 3000))


def test_web_file_system(small):
    with serving(Path(small.root).parent) as server:
        fs, root = filesystem(f"{server.url}/small/")
        assert isinstance(fs, WebFileSystem) and not root.endswith("/")
        assert fs.exists(f"{root}/dataset.json") and not fs.exists(f"{root}/nothing")
        assert list_tars(fs, root, QUICK) == [f"part-{number:03d}.tar" for number in range(4)]
        content = Path(small.root, "part-000.tar").read_bytes()
        assert fs.cat_file(f"{root}/part-000.tar") == content
        assert fs.cat_file(f"{root}/part-000.tar", 10, 300) == content[10:300]
        assert fs.cat_file(f"{root}/part-000.tar", 10, 10) == b""
        with pytest.raises(FileNotFoundError):
            fs.cat_file(f"{root}/nothing")


@pytest.mark.parametrize("answer", [400, 403, 405, 501])
def test_a_server_without_head_requests(small, tmp_path, answer):
    (tmp_path / "set" / "empty").mkdir(parents=True)
    Path(small.root).rename(tmp_path / "set" / "train")
    (tmp_path / "set" / "nothing").write_bytes(b"")
    with serving(tmp_path / "set") as server:
        server.head, server.lists = answer, False
        train, test = open_splits(server.url, cache_at(tmp_path))
        assert len(train) == 24 and test is None
        fs, root = filesystem(server.url, QUICK)
        assert fs.exists(f"{root}/nothing") and not fs.exists(f"{root}/not there")


@pytest.mark.parametrize("room", [True, False])
def test_a_server_without_ranges_sends_each_shard_once(small, tmp_path, room):
    """Rather than once per sample, unless the cache has no room."""
    samples, size = np.random.default_rng(0).permutation(24), shard_entry(small, 0)[0]
    with serving(Path(small.root)) as server:
        server.ranges = False
        cache = cache_at(tmp_path, limit_bytes=10**6 if room else size - 1)
        reader = Reader(open_shards(server.url, cache), cache)
        server.sent_bytes = 0
        for part in np.split(samples, 6):
            assert reader.read(part) == Reader(small).read(part)
        reader.close()
        assert len(cached_files(cache)) == (4 if room else 0)
        if room:
            assert sum(requested is None for name, requested in server.requests if name.endswith(".tar")) == 4


@pytest.mark.parametrize("fault", ["whole", "shift"])
def test_a_server_that_sends_another_range(small, tmp_path, fault):
    """The whole file or its beginning: the whole shard is fetched instead."""
    with serving(Path(small.root), *[fault] * 3) as server:
        reader = Reader(open_shards(server.url, cache_at(tmp_path)), cache_at(tmp_path))
        samples = np.array([23, 2, 5, 5, 12])
        assert reader.read(samples) == Reader(small).read(samples)
        reader.close()
        target = tmp_path / "copy"
        target.write_bytes(Path(small.root, "part-001.tar").read_bytes()[:1000])  # partial copy
        download_to(target, *filesystem(f"{server.url}/part-001.tar", QUICK), shard_entry(small, 1)[0])
        assert target.read_bytes() == Path(small.root, "part-001.tar").read_bytes()


def test_intact_samples_of_a_damaged_shard_without_ranges(small, tmp_path):
    expected = Reader(small).read(np.arange(6))
    with open(Path(small.root, "part-000.tar"), "r+b") as tar:
        tar.seek(int(small.index["offset"][2]))
        tar.write(b"damage")
    with serving(Path(small.root)) as server:
        server.ranges = False
        reader = Reader(open_shards(server.url, cache_at(tmp_path)), cache_at(tmp_path))
        encoded = reader.read(np.arange(6))
        reader.close()
    assert isinstance(encoded.pop(2), ReadFailure) and expected.pop(2) and encoded == expected


def test_file_names_are_quoted_but_not_the_url(tmp_path):
    """`%`, `#` and `?` are literal in a file name but keep their meaning in the URL."""
    local = write_set(tmp_path / "a #1 [50%25]" / "train", shards=2)
    for number, name in enumerate(["100%.tar", "a#b?c%20d [x].tar"]):
        Path(local.root, f"part-{number:03d}.tar").rename(Path(local.root, name))
        Path(local.root, f"part-{number:03d}.index.npy").rename(Path(local.root, index_name(name)))
    manifest = Path(local.root, "dataset.json")
    text = manifest.read_text().replace("part-000.tar", "100%.tar").replace("part-001.tar", "a#b?c%20d [x].tar")
    manifest.write_text(text)
    with serving(tmp_path) as server:
        shards, _ = open_splits(f"{server.url}/a%20%231%20[50%2525]", cache_at(tmp_path))
        reader = Reader(shards, cache_at(tmp_path))
        assert reader.read(np.arange(12)) == Reader(open_shards(local.root)).read(np.arange(12))
        reader.prefetch([0, 1])
        assert reader.read(np.arange(12)) == Reader(open_shards(local.root)).read(np.arange(12))
        reader.close()
        for root in (shards.root, local.root):
            assert list_tars(*filesystem(root), QUICK) == ["100%.tar", "a#b?c%20d [x].tar"]


def test_listing_a_file_or_a_missing_folder(small):
    assert list_tars(*filesystem(f"{small.root}/part-000.tar"), QUICK) == []
    assert list_tars(*filesystem(f"{small.root}/nothing"), QUICK) == []


def test_a_url_with_a_password_is_refused():
    with pytest.raises(UserError, match="user names and passwords are not supported"):
        filesystem("https://someone:secret@host/folder")


def test_ctrl_c_while_opening_does_not_wait_for_the_server(small, tmp_path):
    """The server stalls on four parallel requests."""
    slow = ShardCache(tmp_path / "cache", retry_policy=RetryPolicy(stall_s=30))
    with serving(Path(small.root), *["stall"] * 9, suffix=".npy") as server:
        threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            open_shards(server.url, slow)
        assert time.monotonic() - start < 10


def test_threads_end_with_their_reader(small, tmp_path):
    before = set(threading.enumerate())
    with serving(Path(small.root)) as server:
        reader = Reader(open_shards(server.url, cache_at(tmp_path)), cache_at(tmp_path))
        reader.read(np.arange(24))
        del reader  # without close()
        deadline = time.monotonic() + 60
        while any(thread.name == "range" for thread in set(threading.enumerate()) - before):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_redirects_are_followed(small, tmp_path):
    with serving(Path(small.root)) as server:
        server.redirects = True
        shards = open_shards(server.url, cache_at(tmp_path))
        assert epoch(shards, cache_at(tmp_path)) == epoch(small)
        samples = np.array([23, 0])
        assert Reader(shards, cache_at(tmp_path / "other")).read(samples) == Reader(small).read(samples)


def test_a_compressing_server(small, tmp_path):
    """Text is decompressed; tars are refused, since offsets refer to uncompressed bytes."""
    with serving(Path(small.root)) as server:
        server.compressed = ".json"
        shards = open_shards(server.url, cache_at(tmp_path))
        server.compressed = ".tar"
        reader = Reader(shards, cache_at(tmp_path))
        with pytest.raises(UserError, match=r"compresses .*part-000\.tar \(gzip\).*turn off the compression"):
            reader.read(np.array([0]))
        reader.prefetch([0])
        with pytest.raises(UserError, match=r"compresses .*part-000\.tar"):
            reader.read(np.array([0]))
        reader.close()
        assert server.count["part-000.tar"] == 2  # another attempt would not help
