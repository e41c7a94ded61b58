"""Shards that tests of the scripts train on: a few of the built-in textures, of all ten classes."""

import hashlib
import json
from pathlib import Path

import numpy as np

from pipeline.convert import textures
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split


def texture_shards(root: Path, **counts: int) -> Path:
    """Shards of so many textures a split, in root/shards; their files are in root/images."""
    for split, count in counts.items():
        for number in range(count):
            folder = root / "images" / split / textures.CLASSES[number % 10]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.jpg").write_bytes(textures.render(0, split, number))
        write_split(folder_source(root / "images" / split), root / "shards", split, samples_per_shard=32)
    return root / "shards"


def remove_labels(split: Path, count: int | None = None) -> None:
    """Make the first `count` samples of each shard unlabeled, all of them by default."""
    manifest = json.loads((split / "dataset.json").read_text())
    for shard in manifest["shards"]:
        index = split / shard["file"].replace(".tar", ".index.npy")
        samples = np.load(index)
        samples["label"][:count] = -1
        np.save(index, samples)
        shard["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    (split / "dataset.json").write_text(json.dumps(manifest))
