"""Options of the loader."""

import os
from dataclasses import dataclass
from typing import Literal

from ..common import available_cores, check_range
from ..shards.cache import ShardCache


@dataclass(frozen=True)
class LoaderConfig:
    """How images are read and augmented; no option changes the batches, except which backend rounds them."""

    backend: Literal["auto", "dali", "kornia", "opencv"] = "auto"
    """Augmentation backend. auto: DALI on CUDA (Kornia where DALI is missing), OpenCV threads on a CPU."""
    workers: int = 0
    """Threads per process for reading and augmenting; 0 for this process's share of the cores."""
    prefetch: int = 2
    """Batches prepared ahead of the training step; 0 prepares each one when it is needed."""
    max_bad: float = 0.01
    """Share of the images that may be unreadable and be replaced by others before the run stops."""
    node_groups: int = 1
    """Groups of nodes, each of which reads its own part of the shards in an epoch; for remote data on many nodes."""
    cache_gb: float = 50
    """Disk space in GB for shards of a remote --data, in $STREAMCLR_CACHE or ~/.cache/streamclr, shared by all ranks."""

    def __post_init__(self) -> None:
        check_range("--loader.workers", self.workers, 0, 1024)
        check_range("--loader.prefetch", self.prefetch, 0, 1024)
        check_range("--loader.max-bad", self.max_bad, 0, 1)
        check_range("--loader.node-groups", self.node_groups, 1, 10**9)
        check_range("--loader.cache-gb", self.cache_gb, 0, 10**9)

    @property
    def threads(self) -> int:
        """Number of threads of this process."""
        return self.workers or max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def cache(self) -> ShardCache:
        """Cache for shards of remote sets."""
        return ShardCache(limit_bytes=round(self.cache_gb * 1e9))
