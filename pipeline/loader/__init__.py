"""Loader: batches of augmented views from a shard set, prepared ahead of the training loop.

Data flows through the stages in one direction; no stage calls an earlier one::

    sampler.py       ShardSampler      (seed, epoch, step) -> sample indices of this rank
        |                              PlannedBatch: epoch, samples (B,), upcoming shards
        v
    shards/reader.py Reader            samples -> encoded images, or a ReadFailure each     2 threads
        |                              (resident images: decoded ones, read once: resident.py)
    prefetch.py      draw              (epoch, samples) -> AugmentParams
        |
        v
    prefetch.py      augment backend   images, AugmentParams -> views (V B, C, S, S)        1 or 2 threads,
                                                                                              and the backend's own
        |                              (unreadable samples are replaced: bad_samples.py)
        v
    prefetch.py      Batch             views, label (B,), index (B,) on the training stream
        |
        v
    loader.py        ViewLoader        counts the position (epoch, step): its whole state

`Prefetcher` (prefetch.py) connects reader, augmentation and device; `ViewLoader` and `center_crop_batches` (loader.py)
build the stages from options. `subsets.py` selects the samples of a run with few labels.
"""

from .config import LoaderConfig
from .loader import ViewLoader, center_crop_batches
from .prefetch import Batch

__all__ = ["Batch", "LoaderConfig", "ViewLoader", "center_crop_batches"]
