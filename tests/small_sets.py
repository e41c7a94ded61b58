"""Shards that tests of the scripts train on: a few of the built-in textures, of all ten classes."""

from pathlib import Path

from pipeline import textures
from pipeline.convert import write_split
from pipeline.sources import folder_source


def texture_shards(root: Path, **counts: int) -> Path:
    """Shards of so many textures a split, in root/shards; their files are in root/images."""
    for split, count in counts.items():
        for number in range(count):
            folder = root / "images" / split / textures.CLASSES[number % 10]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.jpg").write_bytes(textures.render(0, split, number))
        write_split(folder_source(root / "images" / split), root / "shards", split, samples_per_shard=32)
    return root / "shards"
