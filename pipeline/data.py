"""The data of a run: the splits that `--data` names, or the built-in textures."""

from pathlib import Path

from .convert.textures import ensure_textures
from .loader.config import LoaderConfig
from .shards.dataset import ShardSet, open_splits
from .shards.index import ensure_index

TEXTURES = "data/textures"
"""Folder of the built-in textures, below the current one."""


def open_data(data: str, config: LoaderConfig) -> tuple[ShardSet, ShardSet | None]:
    """Open the train split and, if there is one, the test (or val) split.

    If a folder like hf://datasets/OWNER/NAME holds the tars of all splits, they are indexed on their first use.

    Args:
        data: folder or URL of shards; "" for the built-in textures, rendered if they are missing.
        config: tells how much disk space the cache of a remote set may take.

    Raises:
        UserError: the shards are missing or damaged.
    """
    if not data:
        ensure_textures(Path(TEXTURES))
    cache = config.cache()
    ensure_index(data or TEXTURES, cache)
    return open_splits(data or TEXTURES, cache)
