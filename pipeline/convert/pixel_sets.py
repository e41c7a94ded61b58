"""CIFAR and STL-10: pixels without image files, which become PNGs, so that nothing is lost."""

import io
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common import UserError
from ..images import png
from ..shards.archives import unpacked
from .sources import Source, modified_ns, raise_if_gone

CIFAR_BATCHES = {
    10: {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
    100: {"train": ["train"], "test": ["test"]},
}
CIFAR_META = {10: ("batches.meta", b"label_names", b"labels"), 100: ("meta", b"fine_label_names", b"fine_labels")}
"""File of the names of classes, their key in it, and the key of the labels in a batch."""
CIFAR_SIDE, STL_SIDE = 32, 96
STL_SPLITS = {"train": True, "test": True, "unlabeled": False}
"""Split -> whether it has labels."""


@dataclass(frozen=True)
class PixelReader:
    """Reads (3, side, side) uint8 planes, one image after the other in a raw file, as PNG."""

    path: Path
    side: int
    columns_first: bool = False
    """Each plane is stored column by column."""

    def __call__(self, number: int) -> bytes:
        size = 3 * self.side**2
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(number * size)
                raw = file.read(size)
        except OSError as error:
            raise_if_gone(self.path, error)
            raise
        if len(raw) < size:
            raise UserError(f"{self.path} has become shorter: download it again.")
        planes = np.frombuffer(raw, np.uint8).reshape(3, self.side, self.side)
        return png(np.ascontiguousarray(planes.transpose((2, 1, 0) if self.columns_first else (1, 2, 0))))


def cifar_sources(path: Path) -> dict[str, Source]:
    """Train and test of CIFAR-10 or CIFAR-100 (with its 100 fine classes), whichever `path` holds.

    A key is the split and the image's place in the published order. The pickled batches are read without executing
    what is in them.

    Args:
        path: cifar-10-python.tar.gz, cifar-100-python.tar.gz, or a folder unpacked from one.

    Raises:
        UserError: `path` holds no CIFAR, is not whole, or a batch holds more than arrays and lists.
    """
    scratch = tempfile.TemporaryDirectory(prefix="cifar-")
    every_name = [name for kind in (10, 100) for names in CIFAR_BATCHES[kind].values() for name in names]
    files = unpacked(path, [*every_name, *(meta for meta, _, _ in CIFAR_META.values())], Path(scratch.name))
    kinds = [kind for kind, (meta, _, _) in CIFAR_META.items() if meta in files]
    if len(kinds) != 1:
        raise UserError(f"{path} is not the python version of CIFAR-10 or CIFAR-100: give cifar-10-python.tar.gz.")
    kind = kinds[0]
    modified = _modified(path, files)
    meta, names_key, labels_key = CIFAR_META[kind]
    try:
        classes = [name.decode() for name in _load_pickle(files[meta])[names_key]]
        if len(set(classes)) < len(classes):
            raise ValueError("two classes of the same name")
        sources = {}
        for split, batches in CIFAR_BATCHES[kind].items():
            if missing := [name for name in batches if name not in files]:
                raise UserError(f"{path} lacks {missing[0]}: download it again.")
            raw, labels = Path(scratch.name, f"{split}.bin"), []
            with open(raw, "wb") as file:
                for name in batches:
                    batch = _load_pickle(files[name])
                    data = batch[b"data"].pixels
                    if data.shape != (len(batch[labels_key]), 3 * CIFAR_SIDE**2):
                        raise ValueError(f"{name} has data of shape {data.shape}")
                    file.write(data.tobytes())
                    labels += batch[labels_key]
            if not set(labels) <= set(range(len(classes))):
                raise ValueError(f"a label of {split} has no class")
            reader = PixelReader(raw, CIFAR_SIDE)
            sources[split] = _source(f"cifar{kind}", split, labels, classes, reader, scratch, modified)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"The batches in {path} are damaged ({error!r}): download it again.") from error
    return sources


def stl10_sources(path: Path) -> dict[str, Source]:
    """STL-10's train, test and unlabeled splits, those that `path` holds; keys as for CIFAR.

    Args:
        path: stl10_binary.tar.gz (3 GB unpacked, into the folder for temporary files) or a folder unpacked from it.

    Raises:
        UserError: `path` holds no STL-10 or is not whole.
    """
    scratch = tempfile.TemporaryDirectory(prefix="stl10-")
    pixels = {split: f"{split}_X.bin" for split in STL_SPLITS}
    labels = {split: f"{split}_y.bin" for split, labeled in STL_SPLITS.items() if labeled}
    files = unpacked(path, [*pixels.values(), *labels.values(), "class_names.txt"], Path(scratch.name))
    if "class_names.txt" not in files or not files.keys() & set(pixels.values()):
        raise UserError(f"{path} is not the binary version of STL-10: give stl10_binary.tar.gz.")
    try:
        classes = files["class_names.txt"].read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise UserError(f"The class_names.txt in {path} is damaged: download it again.") from error
    if len(set(classes)) < len(classes):
        raise UserError(f"The class_names.txt in {path} names a class twice: download it again.")
    sources = {}
    for split in (split for split, name in pixels.items() if name in files):
        count, rest = divmod(files[pixels[split]].stat().st_size, 3 * STL_SIDE**2)
        numbers: list[int | None] = [None] * count
        if split in labels:
            content = files[labels[split]].read_bytes() if labels[split] in files else b""
            numbers = [label - 1 for label in content]  # they begin at 1
        if rest or len(numbers) != count or not set(numbers) <= {None, *range(len(classes))}:
            raise UserError(f"The {split} images and labels in {path} don't belong together: download it again.")
        reader = PixelReader(files[pixels[split]], STL_SIDE, columns_first=True)
        sources[split] = _source("stl10", split, numbers, classes, reader, scratch, _modified(path, files))
    return sources


def _source(
    name: str,
    split: str,
    labels: list[int | None],
    classes: list[str],
    reader: PixelReader,
    scratch: tempfile.TemporaryDirectory,
    modified: list[int],
) -> Source:
    items = [
        (None if label is None else classes[label], f"{split}-{number:06d}", (number,))
        for number, label in enumerate(labels)
    ]
    return Source(name, items, reader, classes, encodes=True, scratch=scratch, modified=modified)


def _modified(path: Path, files: dict[str, Path]) -> list[int]:
    """The modification time of the archive, or of the files unpacked from it earlier."""
    return modified_ns([path] if path.is_file() else sorted(files.values()))


def _load_pickle(path: Path) -> dict:
    try:
        return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except _Forbidden:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path.name}: {error}") from error


class _Forbidden(UserError):
    pass


class _ArraysOnly(pickle.Unpickler):
    """Dictionaries, lists, numbers, strings and uint8 arrays; whatever else a pickle asks for is refused.

    Not even numpy's own constructors are called: what stands here in their place does nothing but keep the bytes.
    """

    def find_class(self, module: str, name: str) -> object:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
        }
        if (module, name) not in allowed:
            raise _Forbidden(
                f"A CIFAR batch asks for {module}.{name}, which would run code: it is not the published file, "
                "download it again."
            )
        return allowed[module, name]

    def persistent_load(self, identifier: object) -> object:
        raise _Forbidden("A CIFAR batch refers to something outside itself: download it again.")


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, name: bytes | str = b"", *_: object):
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass  # byte order and the like, of no account for single bytes


class _Array:
    """Stands for numpy.ndarray; `pixels` are its content."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, raw = state
        if dtype.name not in (b"u1", "u1"):
            raise ValueError(f"an array of {dtype.name!r} where uint8 was expected")
        self.pixels = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_columns else "C")
