"""STL-10, binary version."""

import tempfile
from functools import partial
from pathlib import Path

from ..common import UserError
from ..shards.archives import unpacked
from .base import Source, modified_ns
from .pixels import numbered_items, read_pixels

SIDE_PX = 96
SPLITS = {"train": "train_y.bin", "test": "test_y.bin", "unlabeled": None}
"""Split -> file of its labels."""


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
    files = unpacked(path, ["class_names.txt", *pixels.values(), *filter(None, SPLITS.values())], Path(scratch.name))
    if "class_names.txt" not in files or not files.keys() & set(pixels.values()):
        raise UserError(f"{path} is not the binary version of STL-10; use stl10_binary.tar.gz.")
    classes = files["class_names.txt"].read_text(encoding="utf-8", errors="replace").split()
    if len(set(classes)) < len(classes) or "\ufffd" in "".join(classes):  # the replacement of invalid bytes
        raise UserError(f"The class_names.txt in {path} is damaged or names a class twice; download it again.")
    modified = modified_ns([path] if path.is_file() else sorted(files.values()))
    sources = {}
    for split, labels_file in SPLITS.items():
        if pixels[split] not in files:
            continue
        raw = files[pixels[split]]
        count, rest = divmod(raw.stat().st_size, 3 * SIDE_PX**2)
        labels: list[int | None] = [None] * count
        if labels_file:
            content = files[labels_file].read_bytes() if labels_file in files else b""
            labels = [label - 1 for label in content]  # published labels start at 1
        if rest or len(labels) != count or not set(labels) <= {None, *range(len(classes))}:
            raise UserError(f"The {split} images and labels in {path} do not match; download it again.")
        items, read = numbered_items(split, labels, classes), partial(read_pixels, raw, SIDE_PX, True)
        sources[split] = Source("stl10", items, read, classes, encodes=True, scratch=scratch, modified=modified)
    return sources
