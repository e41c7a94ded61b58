"""From a shard set to batches on the device: sample order, prefetching, unreadable images, subsets."""

from .config import LoaderConfig
from .loader import ViewLoader, center_crop_batches
from .prefetch import Batch

__all__ = ["Batch", "LoaderConfig", "ViewLoader", "center_crop_batches"]
