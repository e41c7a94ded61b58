"""Loader options."""

from dataclasses import dataclass
from typing import Literal

from ..common import available_cores, check_range
from ..shards.cache import ShardCache


@dataclass(frozen=True)
class LoaderConfig:
    """Reading and augmentation options; batches depend only on `node_groups` and the rounding of the backend."""

    backend: Literal["auto", "dali", "kornia", "opencv", "triton"] = "auto"
    """Augmentation backend. auto: chosen by device, view size and number of threads; the run says which and why."""
    resident: Literal["auto", "on", "off"] = "auto"
    """Keep decoded images in memory, on the device of the backend, from their first use on. auto: if a quarter of the
    memory holds them all and the backend can use them; several processes of a machine share its memory."""
    workers: int = 0
    """Number of threads per process for augmentation; 0 for this process's share of the cores."""
    prefetch: int = 2
    """Number of batches prepared ahead of the training step; memory holds up to two more. 0 prepares none ahead."""
    max_bad: float = 0.01
    """Largest fraction of images that may be unreadable, and replaced by others, before the run stops."""
    node_groups: int = 1
    """Number of node groups, each reading its own part of the shards in an epoch; for remote data on many nodes."""
    cache_gb: float = 50
    """Disk space in GB for shards of a remote --data; shared by ranks."""
    cache_dir: str = ""
    """Folder for shards of a remote --data and of images; default: $STREAMCLR_CACHE or ~/.cache/streamclr."""

    def __post_init__(self) -> None:
        check_range("--loader.workers", self.workers, 0, 1024)
        check_range("--loader.prefetch", self.prefetch, 0, 1024)
        check_range("--loader.max-bad", self.max_bad, 0, 1)
        check_range("--loader.node-groups", self.node_groups, 1, 10**9)
        check_range("--loader.cache-gb", self.cache_gb, 0, 10**9)

    @property
    def threads(self) -> int:
        """Number of threads of this process: `workers`, or the cores divided by the local number of processes."""
        return self.workers or available_cores()

    def cache(self) -> ShardCache:
        """Create the cache for shards of remote sets and of images."""
        return ShardCache(self.cache_dir or None, limit_bytes=round(self.cache_gb * 1e9))
