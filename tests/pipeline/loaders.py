"""Loaders with options of `LoaderConfig` and of the loader itself side by side, and damaged shard sets for them."""

import shutil
import zlib
from dataclasses import fields, replace

import numpy as np

from pipeline.loader import LoaderConfig, ViewLoader, center_crop_batches
from pipeline.shards.dataset import ShardSet, open_shards

NAMES = {field.name for field in fields(LoaderConfig)}


def split(options):
    """(configuration, remaining options); one thread unless `workers` says otherwise."""
    config = LoaderConfig(**{"workers": 1} | {name: value for name, value in options.items() if name in NAMES})
    return config, {name: value for name, value in options.items() if name not in NAMES}


def view_loader(shards, augment, **options):
    config, others = split(options)
    return ViewLoader(shards, augment, config, **others)


def center_crops(shards, augment, samples, **options):
    config, others = split(options)
    return center_crop_batches(shards, augment, samples, config, **others)


def damage(shards: ShardSet, folder, samples=(), lost_shards=(), detected=False) -> ShardSet:
    """Copy a set, overwrite `samples` by zeros, `detected` by their checksums, and remove the tars of `lost_shards`."""
    shutil.copytree(shards.root, folder)
    damaged = open_shards(str(folder))
    index = np.array(damaged.index)
    for sample in samples:
        shard = int(np.searchsorted(shards.shard_starts, sample, side="right")) - 1
        zeros = bytes(int(index["size"][sample]))
        with open(folder / shards.manifest["shards"][shard]["file"], "r+b") as tar:
            tar.seek(int(index["offset"][sample]))
            tar.write(zeros)
        if not detected:
            index["crc32"][sample] = zlib.crc32(zeros)
    for shard in lost_shards:
        (folder / shards.manifest["shards"][shard]["file"]).unlink()
    return replace(damaged, index=index)
