"""The data of a run: what `--data` names, shards or images, or the built-in textures."""

import os
from functools import partial
from pathlib import Path

import torch.distributed as dist

from .common import UserError
from .convert.photos import convert_photos, is_photos
from .convert.textures import ensure_textures
from .loader.config import LoaderConfig
from .shards.dataset import ShardSet, open_splits
from .shards.index import ensure_index

TEXTURES = "data/textures"
"""Folder of the built-in textures, below the current one."""


def open_data(data: str, config: LoaderConfig) -> tuple[ShardSet, ShardSet | None]:
    """Open the train split and, if there is one, the test (or val) split.

    Images are converted to shards in the cache, unless they are there already: see `pipeline.convert.photos`. If a
    folder like hf://datasets/OWNER/NAME holds the tars of all splits, they are indexed on their first use.

    Args:
        data: folder or URL of shards; folder, zip or tar of images; "" for the built-in textures, rendered if they are
            missing.
        config: tells where the cache is, and how much of it shards of a remote set may take.

    Raises:
        UserError: the shards are missing, damaged or not the same for all ranks, or the images can't be converted.
    """
    cache, data = config.cache(), os.path.expanduser(data)
    if not data:
        ensure_textures(Path(TEXTURES))
    elif is_photos(data):
        data = str(convert_photos(Path(data), cache, partial(same_for_all_ranks, data)))
    ensure_index(data or TEXTURES, cache)
    splits = open_splits(data or TEXTURES, cache)
    found = str([(split.checksum, len(split), split.classes, split.pixel_format) for split in splits if split])
    if same_for_all_ranks(f"shards of {data}", found) != found:
        raise UserError(
            f"The shards of {data or TEXTURES} are not the same for all processes; copy them and their index, in "
            f"{splits[0].index_root}, from one machine to the others."
        )
    return splits


def same_for_all_ranks(name: str, value: str) -> str:
    """The value that the first rank of this run passed for `name`.

    Ranks that see different images would train on different batches without an error. This needs no collective call,
    so a single rank may ask, too.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    store = dist.distributed_c10d._get_default_store()
    return store.compare_set(f"streamclr/data/{name}", "", value).decode()
