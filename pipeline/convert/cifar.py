"""CIFAR-10 and CIFAR-100, Python version."""

import io
import pickle
import tempfile
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common import UserError
from ..shards.archives import unpacked
from .base import Source, modified_ns
from .pixels import numbered_items, read_pixels

SIDE_PX = 32


class _Version(NamedTuple):
    name: str
    meta: str
    batches: dict[str, list[str]]
    names_key: bytes
    labels_key: bytes

    def files(self) -> list[str]:
        return [self.meta, *chain(*self.batches.values())]


CIFAR10_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
CIFAR100_BATCHES = {"train": ["train"], "test": ["test"]}
VERSIONS = (
    _Version("cifar10", "batches.meta", CIFAR10_BATCHES, b"label_names", b"labels"),
    _Version("cifar100", "meta", CIFAR100_BATCHES, b"fine_label_names", b"fine_labels"),
)


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
    files = unpacked(path, chain(*(version.files() for version in VERSIONS)), Path(scratch.name))
    present = [version for version in VERSIONS if version.meta in files]
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
                    data = batch[b"data"].pixels
                    if data.shape != (len(batch[version.labels_key]), 3 * SIDE_PX**2):
                        raise ValueError(f"{name} has data of shape {data.shape}")
                    file.write(data.tobytes())
                    labels += batch[version.labels_key]
            if not set(labels) <= set(range(len(classes))):
                raise ValueError(f"a label of {split} has no class")
            items, read = numbered_items(split, labels, classes), partial(read_pixels, raw, SIDE_PX, False)
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
    """Unpickle dictionaries, lists, numbers, strings and uint8 arrays; refuse everything else.

    Not even numpy's own constructors are called: the stand-ins below do nothing but keep the bytes.
    """

    def find_class(self, module: str, name: str) -> object:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
        }
        if (module, name) not in allowed:
            raise UserError(
                f"A CIFAR batch asks for {module}.{name}, which would run code, so it is not the published file; "
                "download it again."
            )
        return allowed[module, name]

    def persistent_load(self, identifier: object) -> object:
        raise UserError("A CIFAR batch refers to data outside of itself; download it again.")


class _Dtype:
    """Stand-in for numpy.dtype."""

    def __init__(self, name: bytes | str = b"", *_: object):
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment do not matter for single bytes


class _Array:
    """Stand-in for numpy.ndarray; `pixels` holds the content."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, raw = state  # as numpy.ndarray.__reduce__ writes it
        if dtype.name not in (b"u1", "u1"):
            raise ValueError(f"an array of {dtype.name!r} where uint8 was expected")
        self.pixels = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_columns else "C")
