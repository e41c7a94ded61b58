"""Data sets of the Hugging Face `datasets` library (from the Hub or a local folder) and parquet files of images."""

import logging
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from ..common import UserError, available_cores, progress_bar
from ..images.files import DecodeError
from ..images.prepare import QUALITY, Prepared, prepare
from ..shards.samples import CLASS_LIMIT, NO_CLASS
from .base import Source, modified_ns, read_range

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

log = logging.getLogger(__name__)
SPLIT_NAMES = {"validation": "val", "valid": "val"}
"""Split of a data set -> split of a shard set, if they differ."""
LABEL_COLUMNS = ("label", "labels", "cls")
"""Columns that hold the classes if no column is a ClassLabel."""
SAVED_FILES = ("state.json", "dataset_dict.json")
"""`save_to_disk` writes one of these."""
ROWS_IN_MEMORY = 256
"""Number of streamed rows that are processed in parallel."""


def split_name(name: str) -> str:
    """Name of a split in a shard set: "val" for "validation"."""
    return SPLIT_NAMES.get(name, name)


def huggingface_sources(
    path: str,
    split: str | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    short_side: int | None = None,
    quality: int = QUALITY,
    bits: int | None = None,
    pages_as_channels: bool = False,
) -> dict[str, Source]:
    """The splits of a data set; encoded images keep their bytes. A key consists of the split and the row number.

    Args:
        path: name on the Hub, folder written by `save_to_disk`, folder of parquet files (or of other files that
            `load_dataset` reads), or a parquet file.
        split: split to read, as named by `split_name`; also the name of the images in a file or saved set that does not
            name its split. None reads all splits; a test split without labels is then left out if there is a
            validation split, because evaluation would take the test split and fail.
        config: name of one of several configurations of the data set.
        revision: branch, tag or commit on the Hub.
        image_column: column of images; None for the only one.
        label_column: column of class numbers or names; None for the only ClassLabel, or a column of `LABEL_COLUMNS`.
        streaming: read the rows once in order and store the images in the folder for temporary files, instead of
            preparing Arrow files in the cache of `datasets`, from which rows are read in any order. Folders written
            by `save_to_disk` hold Arrow files already and are always read in place.
        short_side, quality, bits, pages_as_channels: see `pipeline.images.prepare.prepare`; a short side shrinks
            streamed images before they are stored.

    Raises:
        UserError: `datasets` is not installed; the data set can't be found, reached or read; a column can't be chosen;
            or a split is missing or empty.
    """
    name = path if not Path(path).exists() else Path(path).resolve().name.removesuffix(".parquet")
    name += "".join(f"{mark}{value}" for mark, value in ((":", config), ("@", revision)) if value)
    shrink = None
    if short_side is not None:
        shrink = partial(prepare, verify=False, short_side=short_side, quality=quality, bits=bits)
        shrink = partial(shrink, pages_as_channels=pages_as_channels)
    splits = {split_name(key): rows for key, rows in _load(path, split, config, revision, streaming).items()}
    if split and split not in splits:
        raise UserError(f"There is no split {split} in {path}; use --split {' or '.join(splits)}.")
    chosen = [split] if split else sorted(splits, key=lambda key: key != "train")  # later splits take its classes
    sources = {}
    for key in chosen:
        rows = splits[key]
        image, label = _columns(rows.features, path, image_column, label_column)
        if hasattr(rows, "cache_files"):
            labels, stored = _stored(rows, image, label)
        else:
            labels, stored = _streamed(rows, image, label, f"{path} {key}", path, shrink)
        if not labels:
            others = [f"--split {other}" for other in splits if other != key]
            raise UserError(f"The split {key} of {path} is empty; use {' or '.join(others) or 'another data set'}.")
        names, classes = _named(labels, rows.features.get(label), f"column {label} of {path}")
        items = [(names[number], f"{key}-{number:06d}", (number,)) for number in range(len(names))]
        sources[key] = Source(name, items, classes=classes, **stored)
    labeled = [key for key, source in sources.items() if any(label is not None for label, *_ in source.items)]
    if split is None and "val" in labeled and "test" in sources and "test" not in labeled:
        del sources["test"]
        log.warning("left out the split test, since it has no labels; convert it with --split test if you need it")
    return sources


def read_row(rows: "Dataset", number: int) -> bytes:
    """Read the encoded image in row `number` of a data set in Arrow format with one column.

    Raises:
        OSError: the row refers to a file that can't be read.
    """
    return _encoded(rows[number].column(0)[0].as_py())


def read_copy(copy: Path, ends: np.ndarray, number: int) -> bytes:
    """Read image `number` from a file of consecutive images, of which the i-th ends at byte ends[i]."""
    start = int(ends[number - 1]) if number else 0
    return read_range(copy, start, int(ends[number]) - start)


def _encoded(value: bytes | dict | None) -> bytes:
    """Content of an image, stored directly, as {"bytes", "path"}, or in a file; b"" if the row has no image."""
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            with fsspec.open(value["path"], "rb") as file:
                return file.read()
        value = value["bytes"]
    return value or b""


def _load(path: str, split: str | None, config: str | None, revision: str | None, streaming: bool) -> dict[str, Any]:
    """Split -> Dataset or, if streaming, IterableDataset."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"Reading {path} requires the package datasets ({error}): pip install datasets.") from error
    with _library_errors(path):
        if any(Path(path, file).is_file() for file in SAVED_FILES):
            loaded = datasets.load_from_disk(path)
        elif Path(path).is_file():
            loaded = datasets.load_dataset("parquet", data_files={split or "train": path}, streaming=streaming)
        else:
            loaded = datasets.load_dataset(path, config, revision=revision, streaming=streaming)
    return loaded if isinstance(loaded, dict) else {str(loaded.split or split or "train"): loaded}


@contextmanager
def _library_errors(path: str) -> Iterator[None]:
    """Turn errors of the `datasets` library, which raises those of many others, into UserErrors."""
    from datasets.exceptions import DatasetGenerationError
    from datasets.table import CastError
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        text = (str(cause).strip() or type(cause).__name__).partition("\n")[0].rstrip(".:")
        if isinstance(cause, CastError):
            columns = [", ".join(names) for names in (cause.table_column_names, cause.requested_column_names)]
            remedy = "use files of one kind, or choose a --config-name"
            different = f"{columns[0]} instead of {columns[1]}"
            raise UserError(f"The files of {path} have different columns ({different}); {remedy}.") from error
        if "corresponds to no data" in text or isinstance(error, IndexError):  # the latter from `load_from_disk`
            remedy = "use another data set, or --streaming and the --split of another part"
            raise UserError(f"{path} has an empty split ({text}); {remedy}.") from error
        if isinstance(error, GatedRepoError) or "is a gated dataset" in text:
            page = f"accept its terms at https://huggingface.co/datasets/{path}"
            raise UserError(f"{path} is gated; {page} and log in with `hf auth login` or set HF_TOKEN.") from error
        remedy = "use a name on the Hub, a folder written by save_to_disk, or parquet files"
        if "onfig" in text:
            remedy = "choose one by --config-name"
        elif isinstance(error, FileNotFoundError):
            remedy += ", and log in with `hf auth login` if the data set is private"
        elif isinstance(error, OSError):
            remedy = "check the connection and the disk, and run the same command again"
        raise UserError(f"{path} can't be read ({text}); {remedy}.") from error


def _columns(
    features: "Features | None", path: str, image_column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    """Choose the columns of images and labels; see `huggingface_sources`."""
    from datasets import ClassLabel, Image

    if features is None:
        raise UserError(f"The columns of {path} are unknown while streaming; run without --streaming.")
    for option, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column and column not in features:
            raise UserError(f"{path} has no column {column}; use {option} with one of {', '.join(features)}.")
    images = [column for column, kind in features.items() if isinstance(kind, Image)]
    images = images or [column for column, kind in features.items() if _holds_bytes(kind)]
    if image_column:
        if image_column not in images and not _holds_bytes(features[image_column]):
            kind = features[image_column]
            raise UserError(
                f"The column {image_column} of {path} holds {kind}, not images; use another --image-column."
            )
        images = [image_column]
    if not images:
        remedy = "use a data set that stores encoded images"
        raise UserError(f"{path} has no column of images (only {', '.join(features)}); {remedy}.")
    if images[1:]:
        raise UserError(f"{path} has several columns of images; use --image-column {' or '.join(images)}.")
    if label_column:
        return images[0], label_column
    labels = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    if labels[1:]:
        raise UserError(f"{path} has several columns of classes; use --label-column {' or '.join(labels)}.")
    labels += [column for column in LABEL_COLUMNS if column in features and _kind(features[column])]
    return images[0], next(iter(labels), None)


def _holds_bytes(feature: Any) -> bool:
    """Whether a column holds bytes or {"bytes", "path"}, as images do in parquet files without metadata."""
    feature = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _kind(feature: Any) -> type | None:
    """Type of the values of a label column: int or str; None for any other."""
    dtype = getattr(feature, "dtype", "")
    return int if dtype.startswith(("int", "uint")) else str if dtype in ("string", "large_string") else None


def _named(labels: Sequence[Any], feature: Any, column: str) -> tuple[list[str | None], list[str]]:
    """Class names of all rows (None for no class), and the names in the order of their numbers."""
    if feature is None:
        return [None] * len(labels), []
    kind = _kind(feature)
    if kind is str:
        names = [None if label is None or label in NO_CLASS else label for label in labels]
        return names, sorted(set(names) - {None})
    if kind is None:
        raise UserError(f"The {column} holds {feature}, not one class per image; use another --label-column.")
    top = max((label for label in labels if label is not None), default=-1)
    classes = getattr(feature, "names", None) or [str(number) for number in range(min(top + 1, CLASS_LIMIT))]
    if top >= len(classes):
        raise UserError(
            f"The {column} holds the class {top}, but there are {len(classes)}; use another --label-column."
        )
    return [None if label is None or label < 0 else classes[label] for label in labels], list(classes)


def _stored(rows: "Dataset", image: str, label: str | None) -> tuple[list[Any], dict[str, Any]]:
    """Labels of a data set on disk, and the fields of its `Source`."""
    labels = rows.select_columns([label]).with_format("arrow")[:].column(0).to_pylist() if label else [None] * len(rows)
    read = partial(read_row, rows.select_columns([image]).with_format("arrow"))
    return labels, {"read": read, "modified": modified_ns(Path(file["filename"]) for file in rows.cache_files)}


def _streamed(
    rows: "IterableDataset",
    image: str,
    label: str | None,
    title: str,
    path: str,
    shrink: Callable[[bytes], Prepared] | None,
) -> tuple[list[Any], dict[str, Any]]:
    """Labels of a streamed data set, and the fields of the `Source` that reads a temporary copy of its images."""

    def fetch(row: dict[str, Any]) -> bytes:
        try:
            encoded = _encoded(row[image])
            return shrink(encoded).encoded if shrink else encoded
        except FileNotFoundError:  # a row that refers to a missing file; the writer rejects what is stored instead
            return b""
        except DecodeError:
            return encoded

    scratch = tempfile.TemporaryDirectory(prefix="huggingface-")
    copy, labels, ends, checksum = Path(scratch.name, "images"), [], [], 0
    known = (rows.info.splits or {}).get(str(rows.split))
    stream = _in_parts(rows.select_columns([image, *filter(None, [label])]).decode(False), path)
    with (
        open(copy, "wb") as file,
        ThreadPoolExecutor(available_cores()) as pool,
        progress_bar(known and known.num_examples, f"{title}: stream") as update,
    ):
        for part in stream:
            with _library_errors(path):
                images = list(pool.map(fetch, part))
            try:
                file.writelines(images)
                file.flush()
            except OSError as error:
                remedy = "set TMPDIR to a folder with room for all images, or use --short-side"
                raise UserError(f"{title} can't be stored in {copy.parent} ({error.strerror}); {remedy}.") from error
            for encoded in images:
                ends.append((ends[-1] if ends else 0) + len(encoded))
                checksum = zlib.crc32(encoded, checksum)
            labels += [row[label] if label else None for row in part]
            update(advance=len(part))
    read = partial(read_copy, copy, np.array(ends, np.int64))
    # a stream has no modification times; its checksum tells as well whether an interrupted conversion may be resumed
    return labels, {"read": read, "scratch": scratch, "modified": [checksum]}


def _in_parts(rows: Iterable[dict[str, Any]], path: str) -> Iterator[list[dict[str, Any]]]:
    with _library_errors(path):
        iterator = iter(rows)
        while part := list(islice(iterator, ROWS_IN_MEMORY)):
            yield part
