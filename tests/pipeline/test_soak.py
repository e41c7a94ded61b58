"""Long runs of whole loaders, local and remote: memory and open files must not grow.

The long runs take $STREAMCLR_SOAK_S seconds each, 120 by default:

    STREAMCLR_SOAK_S=3600 make soak
"""

import ctypes
import gc
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pipeline.augment.config import AugmentConfig
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.loader import ViewLoader
from pipeline.loader.prefetch import Batch
from pipeline.shards.dataset import ShardSet, open_shards
from tests.pipeline.augment import reference_views as reference
from tests.pipeline.image_sets import write_folder
from tests.pipeline.loaders import view_loader
from tests.pipeline.web_server import cache_at, serving_elsewhere

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
CPU = torch.device("cpu")
BACKENDS = ["opencv", "kornia", *(["dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else [])]
SECONDS = float(os.environ.get("STREAMCLR_SOAK_S", "120"))
SHARDS, EACH, BATCH = 48, 4, 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """192 images of many sizes in 48 shards, three blocks of the sampler."""
    root = tmp_path_factory.mktemp("shards")
    pictures = (reference.smooth_field(0, i, 40 + i % 37, 50 + i % 23) for i in range(SHARDS * EACH))
    files = {f"class_{i % 3}/{i}.jpg": reference.encode(picture, "JPEG") for i, picture in enumerate(pictures)}
    return write_split(folder_source(write_folder(root / "in", files)), root / "out", "train", samples_per_shard=EACH)


def loader(shards: ShardSet, backend: str, **options) -> ViewLoader:
    """A loader that reads in every epoch."""
    config = AugmentConfig(size=64)  # a batch of views has 0.8 MB
    options |= {"batch_size": BATCH, "seed": 0, "device": CPU, "backend": backend, "workers": 2, "resident": "off"}
    return view_loader(shards, config, **options)


def remote_loader(shards: ShardSet, url: str, folder: Path) -> ViewLoader:
    """Loader over HTTP whose cache holds five of eight shards, so that shards are evicted in every epoch."""
    size = sum(shard["bytes"] for shard in shards.manifest["shards"])
    cache = cache_at(folder, limit_bytes=size * 5 // 8)
    return loader(open_shards(url, cache), "opencv", cache=cache)


class Usage(NamedTuple):
    """Resource usage of this process at regular intervals."""

    batches: np.ndarray
    memory_mb: np.ndarray
    files: np.ndarray

    @property
    def grown_mb(self) -> float:
        """Growth of memory in MB over all batches by the Theil-Sen slope, which is robust to outliers."""
        i, j = np.triu_indices(len(self.batches), 1)
        slopes = (self.memory_mb[j] - self.memory_mb[i]) / (self.batches[j] - self.batches[i])
        return float(np.median(slopes) * (self.batches[-1] - self.batches[0]))

    @property
    def grown_files(self) -> int:
        """Growth of the minimum from the first half to the second; shards and locks are open only briefly."""
        first, second = np.array_split(self.files, 2)
        return int(second.min() - first.min())


def current_usage() -> tuple[float, int]:
    """Resident memory of this process in MB, and its number of open files."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))


def endless(loader: ViewLoader) -> Iterator[Batch]:
    while True:
        yield from loader


def measure(batches: Iterator[Batch], every: int, limit: int | None = None, seconds: float = np.inf) -> Usage:
    """Consume batches up to a number or a time; the first third, in which caches and buffers fill, is not counted."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # memory left over by other tests would hide growth
    gc.freeze()  # objects of modules need not be traversed again
    rows, started = [], time.monotonic()
    for number in count(1):
        next(batches)
        if number % every == 0:
            rows.append((time.monotonic() - started, number, *current_usage()))
        if time.monotonic() - started > seconds or number == limit:
            break
    gc.unfreeze()
    rows = np.array(rows)
    reached = rows[:, 0] / rows[-1, 0] if limit is None else rows[:, 1] / rows[-1, 1]
    usage = Usage(*rows[reached > 1 / 3, 1:].T)
    memory, files = (f"{values[0]:.1f} to {values[-1]:.1f}" for values in (usage.memory_mb, usage.files))
    trends = f"trend {usage.grown_mb:+.2f} MB, {usage.grown_files:+d} files"
    print(f"{number} batches; after a third of them {memory} MB, {files} open files, {trends}")
    return usage


def test_a_leak_of_one_batch_in_twenty_is_detected(shards):
    leaked, whole = [], loader(shards, "opencv")

    def leaking() -> Iterator[Batch]:
        for number, batch in enumerate(endless(whole)):
            if number % 20 == 0:
                pages = mmap(-1, batch.views.nbytes)  # not a clone, which may reuse memory that earlier tests freed
                pages.write(batch.views.numpy().tobytes())
                leaked.extend([pages, open(os.devnull)])  # noqa: SIM115
            yield batch

    usage = measure(leaking(), every=5, limit=300)
    whole.close()
    assert usage.grown_mb > 5 and usage.grown_files > 3


def test_open_files_stay_constant(shards):
    """Memory is tested by the long runs; in a process that has run hundreds of tests it fluctuates."""
    whole = loader(shards, "opencv")
    usage = measure(endless(whole), every=5, limit=300)
    whole.close()
    assert usage.grown_files < 2


def test_open_files_stay_constant_with_a_cache_smaller_than_the_set(shards, tmp_path):
    with serving_elsewhere(Path(shards.root)) as url:
        whole = remote_loader(shards, url, tmp_path)
        usage = measure(endless(whole), every=5, limit=300)
        whole.close()
    assert usage.grown_files < 2
    kept = list((tmp_path / "cache" / "files").iterdir())
    assert 0 < len(kept) < SHARDS and sum(file.stat().st_size for file in kept) <= whole.reader.cache.limit_bytes


def is_constant(usage: Usage) -> bool:
    """At most 20 MB per hour, less than a leak of a thousandth of every batch."""
    hours = (1 - 1 / 3) * SECONDS / 3600
    return usage.grown_mb < max(20 * hours, 1) and usage.grown_files < 2


@pytest.mark.soak
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_run(shards, backend):
    whole = loader(shards, backend)
    usage = measure(endless(whole), every=50, seconds=SECONDS)
    whole.close()
    assert is_constant(usage)


@pytest.mark.soak
def test_long_run_over_http(shards, tmp_path):
    with serving_elsewhere(Path(shards.root)) as url:
        whole = remote_loader(shards, url, tmp_path)
        usage = measure(endless(whole), every=50, seconds=SECONDS)
        whole.close()
    assert is_constant(usage)
