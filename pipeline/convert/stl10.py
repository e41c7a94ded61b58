"""STL-10, binary version."""

import tempfile
from pathlib import Path

from ..common import UserError
from ..shards.archives import unpacked
from .base import Source
from .pixels import PixelArchive, PixelReader, modified_times

SIDE_PX = 96
SPLITS = {"train": True, "test": True, "unlabeled": False}
"""Split -> whether it has labels."""


def stl10_sources(path: Path) -> dict[str, Source]:
    """The splits train, test and unlabeled, as far as `path` holds them.

    A key consists of the split and the position in the published order.

    Args:
        path: stl10_binary.tar.gz (unpacked into the folder for temporary files, 3 GB) or the folder unpacked from it.

    Raises:
        UserError: `path` does not hold STL-10 or is damaged.
    """
    scratch = tempfile.TemporaryDirectory(prefix="stl10-")
    pixels = {split: f"{split}_X.bin" for split in SPLITS}
    labels = {split: f"{split}_y.bin" for split, labeled in SPLITS.items() if labeled}
    files = unpacked(path, [*pixels.values(), *labels.values(), "class_names.txt"], Path(scratch.name))
    if "class_names.txt" not in files or not files.keys() & set(pixels.values()):
        raise UserError(f"{path} is not the binary version of STL-10; use stl10_binary.tar.gz.")
    try:
        classes = files["class_names.txt"].read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise UserError(f"The class_names.txt in {path} is damaged; download it again.") from error
    if len(set(classes)) < len(classes):
        raise UserError(f"The class_names.txt in {path} names a class twice; download it again.")
    archive = PixelArchive("stl10", classes, scratch, modified_times(path, files))
    sources = {}
    for split in (split for split, name in pixels.items() if name in files):
        count, rest = divmod(files[pixels[split]].stat().st_size, 3 * SIDE_PX**2)
        numbers: list[int | None] = [None] * count
        if split in labels:
            content = files[labels[split]].read_bytes() if labels[split] in files else b""
            numbers = [label - 1 for label in content]  # published labels start at 1
        if rest or len(numbers) != count or not set(numbers) <= {None, *range(len(classes))}:
            raise UserError(f"The {split} images and labels in {path} do not match; download it again.")
        sources[split] = archive.source(split, numbers, PixelReader(files[pixels[split]], SIDE_PX, columns_first=True))
    return sources
