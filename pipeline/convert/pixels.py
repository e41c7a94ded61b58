"""Data sets distributed as raw pixels, which are stored as PNG without loss: CIFAR-10, CIFAR-100 and STL-10."""

import io
import pickle
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common import UserError
from ..images.files import png
from ..shards.archives import unpacked
from .base import Item, Source, modified_ns, read_range

CIFAR_SIDE_PX, STL10_SIDE_PX = 32, 96


class _Cifar(NamedTuple):
    name: str
    meta: str
    batches: dict[str, list[str]]
    names_key: bytes
    labels_key: bytes

    def files(self) -> list[str]:
        return [self.meta, *chain(*self.batches.values())]


CIFAR10_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
CIFAR100_BATCHES = {"train": ["train"], "test": ["test"]}
CIFAR = (
    _Cifar("cifar10", "batches.meta", CIFAR10_BATCHES, b"label_names", b"labels"),
    _Cifar("cifar100", "meta", CIFAR100_BATCHES, b"fine_label_names", b"fine_labels"),
)
STL10_LABELS = {"train": "train_y.bin", "test": "test_y.bin", "unlabeled": None}
"""Split -> file of its labels."""


def _items(split: str, labels: Sequence[int | None], classes: list[str]) -> list[Item]:
    return [
        (None if label is None else classes[label], f"{split}-{number:06d}", (number,))
        for number, label in enumerate(labels)
    ]


def read_pixels(raw: Path, side_px: int, columns_first: bool, number: int) -> bytes:
    """Read image `number` from a file of consecutive (3, side_px, side_px) uint8 planes, and encode it as PNG.

    `columns_first` says whether each plane is stored column by column. Errors as in `read_range`.
    """
    size = 3 * side_px**2
    content = read_range(raw, number * size, size)
    if len(content) < size:
        raise UserError(f"{raw} has become shorter; download it again.")
    planes = np.frombuffer(content, np.uint8).reshape(3, side_px, side_px)
    return png(np.ascontiguousarray(planes.transpose((2, 1, 0) if columns_first else (1, 2, 0))))


def cifar_sources(path: Path) -> dict[str, Source]:
    """The splits train and test of CIFAR-10 or CIFAR-100 (with its 100 fine classes), whichever `path` holds.

    A key consists of the split and the position in the published order. The pickled batches are read without
    executing any code in them.

    Args:
        path: cifar-10-python.tar.gz, cifar-100-python.tar.gz, or the folder unpacked from one of them.

    Raises:
        UserError: `path` does not hold CIFAR or is damaged, or a batch contains anything but arrays and lists.
    """
    scratch = tempfile.TemporaryDirectory(prefix="cifar-")
    files = unpacked(path, chain(*(version.files() for version in CIFAR)), Path(scratch.name))
    present = [version for version in CIFAR if version.meta in files]
    if len(present) != 1:
        raise UserError(f"{path} is not the python version of CIFAR-10 or CIFAR-100; use cifar-10-python.tar.gz.")
    version = present[0]
    if lacking := [name for name in version.files() if name not in files]:
        raise UserError(f"{path} lacks {lacking[0]}; download it again.")
    modified = modified_ns([path] if path.is_file() else sorted(files.values()))
    sources = {}
    try:
        classes = [name.decode() for name in _load_pickle(files[version.meta])[version.names_key]]
        if len(set(classes)) < len(classes):
            raise ValueError("two classes of the same name")
        for split, batches in version.batches.items():
            raw, labels = Path(scratch.name, f"{split}.bin"), []
            with open(raw, "wb") as file:
                for name in batches:
                    batch = _load_pickle(files[name])
                    data = batch[b"data"].pixels()
                    if data.shape != (len(batch[version.labels_key]), 3 * CIFAR_SIDE_PX**2):
                        raise ValueError(f"{name} has data of shape {data.shape}")
                    try:
                        file.write(data.tobytes())
                        file.flush()
                    except OSError as error:
                        raise UserError(
                            f"{path} can't be unpacked to {scratch.name} ({error.strerror}); set TMPDIR to a folder "
                            "with enough space."
                        ) from error
                    labels += batch[version.labels_key]
            if not set(labels) <= set(range(len(classes))):
                raise ValueError(f"a label of {split} has no class")
            items, read = _items(split, labels, classes), partial(read_pixels, raw, CIFAR_SIDE_PX, False)
            sources[split] = Source(
                version.name, items, read, classes, encodes=True, scratch=scratch, modified=modified
            )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"The batches in {path} are damaged ({error!r}); download it again.") from error
    return sources


def _load_pickle(path: Path) -> dict:
    try:
        return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path.name}: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle dictionaries, lists, numbers, strings and arrays; refuse everything else.

    Not even numpy's own constructors are called: the stand-ins do nothing but keep their arguments and the state.
    """

    def find_class(self, module: str, name: str) -> type:
        if module.partition(".")[0] != "numpy" or name not in ("_reconstruct", "ndarray", "dtype"):
            raise UserError(
                f"A CIFAR batch asks for {module}.{name}, which would run code, so it is not the published file; "
                "download it again."
            )
        return _StandIn

    def persistent_load(self, identifier: object) -> object:
        raise UserError("A CIFAR batch refers to data outside of itself; download it again.")


class _StandIn:
    """Stand-in for numpy.ndarray and numpy.dtype."""

    def __init__(self, *arguments: object):
        self.arguments = arguments

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def pixels(self) -> np.ndarray:
        """The array, if it is one of uint8."""
        _, shape, dtype, by_columns, raw = self.state  # as numpy.ndarray.__reduce__ writes it
        if dtype.arguments[0] not in (b"u1", "u1"):
            raise ValueError(f"an array of {dtype.arguments[0]!r} where uint8 was expected")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_columns else "C")


def stl10_sources(path: Path) -> dict[str, Source]:
    """The splits train, test and unlabeled, as far as `path` holds them.

    A key consists of the split and the position in the published order.

    Args:
        path: stl10_binary.tar.gz (unpacked into the folder for temporary files, 3 GB) or the folder unpacked from it.

    Raises:
        UserError: `path` does not hold STL-10 or is damaged.
    """
    scratch = tempfile.TemporaryDirectory(prefix="stl10-")
    pixels = {split: f"{split}_X.bin" for split in STL10_LABELS}
    wanted = ["class_names.txt", *pixels.values(), *filter(None, STL10_LABELS.values())]
    files = unpacked(path, wanted, Path(scratch.name))
    if "class_names.txt" not in files or not files.keys() & set(pixels.values()):
        raise UserError(f"{path} is not the binary version of STL-10; use stl10_binary.tar.gz.")
    classes = files["class_names.txt"].read_text(encoding="utf-8", errors="replace").split()
    if len(set(classes)) < len(classes) or "\ufffd" in "".join(classes):  # the replacement of invalid bytes
        raise UserError(f"The class_names.txt in {path} is damaged or names a class twice; download it again.")
    modified = modified_ns([path] if path.is_file() else sorted(files.values()))
    sources = {}
    for split, labels_file in STL10_LABELS.items():
        if pixels[split] not in files:
            continue
        raw = files[pixels[split]]
        count, rest = divmod(raw.stat().st_size, 3 * STL10_SIDE_PX**2)
        labels: list[int | None] = [None] * count
        if labels_file:
            content = files[labels_file].read_bytes() if labels_file in files else b""
            labels = [label - 1 for label in content]  # published labels start at 1
        if rest or len(labels) != count or not set(labels) <= {None, *range(len(classes))}:
            raise UserError(f"The {split} images and labels in {path} do not match; download it again.")
        items, read = _items(split, labels, classes), partial(read_pixels, raw, STL10_SIDE_PX, True)
        sources[split] = Source("stl10", items, read, classes, encodes=True, scratch=scratch, modified=modified)
    return sources
