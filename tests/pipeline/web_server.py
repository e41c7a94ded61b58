"""A web server on the loopback that fails as servers fail, and small shard sets for it to serve."""

import gzip
import multiprocessing
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from pipeline.loader.sampler import ShardSampler
from pipeline.shards.cache import ShardCache
from pipeline.shards.dataset import ShardSet, open_shards
from pipeline.shards.format import Sample, write_manifest, write_shard
from pipeline.shards.reader import Reader
from pipeline.shards.remote import RetryPolicy

QUICK = RetryPolicy(attempts=6, first_wait_s=0.002, longest_wait_s=0.01, stall_s=0.3)


def write_set(folder: Path, shards: int, each: int = 6, size: int = 3000) -> ShardSet:
    """A shard set of random bytes, which are no images: nothing here decodes them."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    entries = []
    for shard in range(shards):
        samples = [
            Sample(f"key-{shard}-{i}", ("jpg", 20 + i, 300), draws.bytes(size + i), (shard + i) % 3 - 1)
            for i in range(each)
        ]
        entries.append(write_shard(folder, f"part-{shard:03d}.tar", samples))
    manifest = {"name": "noise", "split": "train", "classes": ["a", "b"], "samples": shards * each, "shards": entries}
    write_manifest(LocalFileSystem(), str(folder), manifest)
    return open_shards(str(folder))


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults` names what goes wrong with the first, second ... request of each tar, then nothing.

    503: that answer. drop: half of the bytes, then the connection is closed. stall: half of them, then nothing more.
    truncate: half of them, as if they were all. flip: one bit is wrong. whole: ranges are disregarded. shift: as many
    bytes as are asked for, but from the beginning of the file.

    `missing` is the answer for what is not there, `lists` whether there are pages of the files in a folder, `head` the
    answer to every HEAD request (None: the right one), `ranges` whether byte ranges are known. Files whose names end in
    `compressed` are sent with gzip, and with `redirects` every file is found only at another address.
    """

    daemon_threads = True

    def __init__(self, folder: Path, faults: tuple[str, ...] = (), suffix: str = ".tar"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.missing, self.lists, self.head, self.ranges = 404, True, None, True
        self.compressed, self.redirects = "none", False
        self.sent_bytes = 0
        self.folder, self.faults, self.suffix = folder, faults, suffix
        self.requests: list[tuple[str, str | None]] = []
        self.count: Counter[str] = Counter()
        self.lock, self.ended = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, name: str, requested: str | None) -> str:
        with self.lock:
            self.requests.append((name, requested))
            self.count[name] += 1
            number = self.count[name] - 1
            return self.faults[number] if name.endswith(self.suffix) and number < len(self.faults) else ""

    def handle_error(self, *_) -> None:
        pass  # a client that went away, as it should from a stalled connection


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        found = (self.server.folder / unquote(self.path[1:])).is_file()
        self.send_response(self.server.head or (200 if found else self.server.missing))
        self.end_headers()

    def do_GET(self) -> None:
        name = unquote(self.path[1:])
        path = self.server.folder / name.removeprefix("elsewhere/")
        if self.server.redirects and path.is_file() and not name.startswith("elsewhere/"):
            self.send_response(302)
            self.send_header("Location", f"/elsewhere{self.path}")
            return self.end_headers()
        fault = self.server.fault(name, self.headers["Range"])
        if fault == "503":
            self.send_error(503)
        elif path.is_dir() and self.server.lists:
            links = "".join(f'<a href="{quote(file.name)}">{file.name}</a>' for file in path.iterdir())
            self.answer(200, links.encode(), len(links))
        elif not path.is_file():
            self.send_error(self.server.missing)
        else:
            self.serve(path.read_bytes(), fault)

    def serve(self, content: bytes, fault: str) -> None:
        total = len(content)
        status, part = 200, content
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if match and fault != "whole" and self.server.ranges:
            first, last = int(match[1]), int(match[2] or total - 1)
            status, part = 206, content[first : last + 1]
            if not part:
                return self.send_error(416)
            self.part = f"bytes {first}-{first + len(part) - 1}/{total}"
        if fault == "shift" and status == 206:
            part = content[: len(part)]
            self.part = f"bytes 0-{len(part) - 1}/{total}"
        if fault == "flip":
            part = bytes([part[0] ^ 1]) + part[1:]
        half = part[: len(part) // 2]
        if fault == "truncate":
            self.part = f"bytes 0-{len(half) - 1}/{len(half)}"
            part = half
        if self.path.endswith(self.server.compressed):
            part = gzip.compress(part)
        self.answer(status, half if fault in ("drop", "stall") else part, len(part))
        if fault == "stall":
            self.server.ended.wait(5)

    def answer(self, status: int, content: bytes, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if status == 206:
            self.send_header("Content-Range", self.part)
        if self.path.endswith(self.server.compressed):
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with self.server.lock:
            self.server.sent_bytes += len(content)
        self.wfile.write(content)


@contextmanager
def serving(folder: Path, *faults: str, suffix: str = ".tar") -> Iterator[Server]:
    server = Server(folder, faults, suffix)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving_elsewhere(folder: Path) -> Iterator[str]:
    """The URL of a faultless server in another process, whose memory and files are not those of this one."""
    context = multiprocessing.get_context("spawn")
    urls = context.SimpleQueue()
    process = context.Process(target=_serve, args=(folder, urls), daemon=True)
    process.start()
    try:
        yield urls.get()
    finally:
        process.terminate()
        process.join()


def _serve(folder: Path, urls) -> None:
    server = Server(folder)
    urls.put(server.url)
    server.serve_forever()


def cache_at(folder: Path, **options) -> ShardCache:
    return ShardCache(folder / "cache", retry_policy=QUICK, **options)


def read_slices(url: str, folder: Path, rank: int, results) -> None:
    """A process's whole life as one of four ranks; here because its module loads quickly."""
    cache = cache_at(folder)
    shards = open_shards(url, cache)
    order = ShardSampler(shards.shard_starts, 8, seed=3, block_shards=4)
    reader, encoded = Reader(shards, cache), []
    for step in range(order.steps_per_epoch):
        reader.prefetch(order.upcoming_shards(0, step, step, rank, 4))
        encoded.append(reader.read(order.batch(0, step, rank, 4)))
    reader.close()
    results.put((rank, encoded))


def epoch(shards: ShardSet, cache: ShardCache | None = None, epochs: int = 1) -> list:
    """All bytes in the order of a run of eight samples per batch and four shards per block."""
    order = ShardSampler(shards.shard_starts, 8, seed=3, block_shards=4)
    reader, encoded = Reader(shards, cache), []
    for number in range(epochs):
        for step in range(order.steps_per_epoch):
            reader.prefetch(order.upcoming_shards(number, step, step))
            encoded += reader.read(order.batch(number, step))
    reader.close()
    return encoded


def cached_files(cache: ShardCache) -> set[str]:
    return {file.name for file in (cache.folder / "files").iterdir()}


def shard_entry(shards: ShardSet, number: int) -> tuple[int, str]:
    entry = shards.manifest["shards"][number]
    return entry["bytes"], entry["sha256"]
