"""Shards for the tests of the scripts: a few of the built-in textures, of all ten classes."""

import json
from pathlib import Path

import numpy as np

from common import file_sha256
from pipeline.convert import textures
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split


def texture_shards(root: Path, **counts: int) -> Path:
    """Write `counts` textures per split into root/images and, as shards, into root/shards, which is returned."""
    for split, count in counts.items():
        for number in range(count):
            folder = root / "images" / split / textures.CLASSES[number % 10]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.jpg").write_bytes(textures.render(0, split, number))
        write_split(folder_source(root / "images" / split), root / "shards", split, samples_per_shard=32)
    return root / "shards"


def remove_labels(split: Path, count: int | None = None) -> None:
    """Remove the labels of the first `count` samples of each shard; of all samples by default."""
    manifest = json.loads((split / "dataset.json").read_text())
    for shard in manifest["shards"]:
        index = split / shard["file"].replace(".tar", ".index.npy")
        samples = np.load(index)
        samples["label"][:count] = -1
        np.save(index, samples)
        shard["index_sha256"] = file_sha256(index)
    (split / "dataset.json").write_text(json.dumps(manifest))
