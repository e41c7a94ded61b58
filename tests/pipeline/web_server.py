"""Local web server with injected faults, small shard sets for it to serve, and helpers for readers and caches."""

import gzip
import multiprocessing
import re
import threading
import zlib
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
    """Write a shard set of random bytes, which these tests never decode."""
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
    """Serves a folder; `faults` lists what goes wrong with the first, second, ... request of each tar.

    503: this status. drop: half of the bytes, then the connection closes. stall: half of the bytes, then nothing more.
    truncate: half of the bytes as if they were all. flip: one flipped bit. whole: byte ranges are ignored. shift: the
    requested number of bytes, but from the beginning of the file.

    Attributes:
        missing: status for missing files.
        lists: whether folders have index pages.
        head: status of every HEAD response; None for the correct one.
        ranges: whether byte ranges are supported.
        compressed: suffix of the files that are sent with gzip.
        redirects: whether every file redirects to another address.
        sent_bytes, requests, count: bytes sent, (name, Range header) of each request, and requests per name.
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
        pass  # clients must abandon a stalled connection


class Handler(BaseHTTPRequestHandler):
    server: Server
    etag = ""

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
        self.etag = f'"{zlib.crc32(content)}"'
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
        self.send_header("ETag", self.etag)
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
    """URL of a server without faults in another process, so that memory and open files can be measured separately."""
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
    """Run one of four ranks in a spawned process; here because this module imports quickly."""
    cache = cache_at(folder)
    shards = open_shards(url, cache)
    sampler = ShardSampler(shards.shard_starts, 8, seed=3, block_shards=4)
    reader, encoded = Reader(shards, cache), []
    for step in range(sampler.steps_per_epoch):
        reader.prefetch(sampler.upcoming_shards(0, step, step, rank, 4))
        encoded.append(reader.read(sampler.batch(0, step, rank, 4)))
    reader.close()
    results.put((rank, encoded))


def epoch(shards: ShardSet, cache: ShardCache | None = None, epochs: int = 1) -> list:
    """All samples in the order of a run with eight samples per batch and four shards per block."""
    sampler = ShardSampler(shards.shard_starts, 8, seed=3, block_shards=4)
    reader, encoded = Reader(shards, cache), []
    for number in range(epochs):
        for step in range(sampler.steps_per_epoch):
            reader.prefetch(sampler.upcoming_shards(number, step, step))
            encoded += reader.read(sampler.batch(number, step))
    reader.close()
    return encoded


def cached_files(cache: ShardCache) -> set[str]:
    return {file.name for file in (cache.folder / "files").iterdir()}


def shard_entry(shards: ShardSet, number: int) -> tuple[int, str]:
    entry = shards.manifest["shards"][number]
    return entry["bytes"], entry["sha256"]
