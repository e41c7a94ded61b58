"""WebDataset tars written by other tools: plain or compressed, as files or as the output of a command."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..common import PIPELINE, UserError
from ..shards.archives import COMPRESSED_TARS, clean_key, members, open_tar, refuse_url
from ..shards.dataset import open_shards
from ..shards.samples import NO_CLASS, class_number, expand_braces, paired, read_parts
from .base import Source, modified_ns, read_range

PIPE = "pipe:"
DECOMPRESSORS: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
"""First bytes of a compressed file -> function that opens it for reading."""


def webdataset_source(path: str | Path, image_extension: str | None = None) -> Source:
    """The image of each WebDataset sample and its class (`<key>.cls`), if it has one.

    Numeric classes keep their numbers and, in one of our own shard sets, their names; other texts become class names.
    Members of other kinds are dropped.

    Samples are written in a seeded order, which requires random access by byte offset. Plain tars provide it;
    compressed tars and the output of commands are first stored uncompressed in the folder for temporary files.

    Args:
        path: a tar; a folder of tars; a brace pattern such as "data/{000..146}.tar"; or "pipe:COMMAND" (braces are
            expanded), which runs a shell command that writes a tar. Commands come from this argument only: files
            found in a folder are always read as files, whatever their names are.
        image_extension: see `paired`.

    Raises:
        UserError: there are no tars, a tar is damaged or holds links or paths that lead out of it, a command fails,
            a sample has two images, or one tar holds a key twice.
    """
    files, folder = _find_tars(str(path))
    scratch = tempfile.TemporaryDirectory(prefix="webdataset-")
    tars = {name: _plain_tar(file, Path(scratch.name, name)) for name, file in files.items()}
    left_out: list[tuple[str, str]] = []
    samples = [
        sample for name, tar in tars.items() for sample in _samples(tar, name, files[name], image_extension, left_out)
    ]
    numbers = {label: class_number(label) for *_, label in samples if label is not None}
    if None in numbers.values():
        classes = sorted(numbers)
        names = {label: label for label in classes}
    else:
        listed = None if Path(path) == folder else set(files)
        classes = _class_names(folder, listed, 1 + max(numbers.values(), default=-1))
        names = {label: classes[number] for label, number in numbers.items()}
    repeated = len({key for _, key, *_ in samples}) < len(samples)  # in tars whose keys all start at 000000
    items, taken = [], set()
    for tar, sample_key, offset, size, label in samples:
        key = clean_key(f"{PurePosixPath(tar).with_suffix('')}/{sample_key}") if repeated else sample_key
        if key in taken:
            raise UserError(f"{files[tar]} holds the key {sample_key} twice; rename one of the samples.")
        taken.add(key)
        items.append((names.get(label), key, (tar, offset, size)))
    modified = modified_ns(file for file in files.values() if isinstance(file, Path))
    read = partial(read_member, tars)
    return Source(_name(str(path), folder), items, read, classes, left_out, scratch=scratch, modified=modified)


def read_member(tars: dict[str, Path], tar: str, offset: int, size: int) -> bytes:
    """Read a member of one of several uncompressed tars by the byte offset in it; errors as in `read_range`."""
    return read_range(tars[tar], offset, size)


def _find_tars(path: str) -> tuple[dict[str, Path | str], Path]:
    """Find the tars that a path, brace pattern or pipe stands for.

    Returns:
        Name -> file, or the command as "pipe:COMMAND"; and the folder that holds the files.
    """
    if path.startswith(PIPE):
        return {f"pipe-{n:06d}.tar": command for n, command in enumerate(expand_braces(path))}, Path(".")
    folder = Path(path)
    refuse_url(folder, f"index it in place by `python -m {PIPELINE}.shards index`, or copy it to a folder first")
    if os.path.isdir(folder):  # unlike Path's methods, not an error for a long brace pattern
        inside = sorted(folder.iterdir())
        tars = [file for file in inside if file.name.endswith(".tar")]
        tars = tars or [file for file in inside if file.name.endswith(COMPRESSED_TARS)]
        if not tars:
            raise UserError(f"There is no .tar in {path}; use the folder that holds the shards.")
        return {file.name: file for file in tars}, folder
    files = [folder] if os.path.exists(folder) else [Path(name) for name in expand_braces(path)]
    folder = Path(os.path.commonpath([file.parent for file in files]))
    return {file.relative_to(folder).as_posix(): file for file in files}, folder


def _plain_tar(source: Path | str, scratch: Path) -> Path:
    """Return a plain tar as is; store any other one uncompressed in the file `scratch`."""
    if isinstance(source, str):
        _run_command(source, scratch)
        return scratch
    if not source.is_file():
        return source  # `open_tar` says what is wrong
    with open(source, "rb") as file:
        if not any(map(file.peek().startswith, DECOMPRESSORS)):
            return source
        _store(file, scratch, source)
    return scratch


def _run_command(pipe: str, target: Path) -> None:
    """Store the tar that a command writes, decompressed if necessary."""
    from webdataset.gopen import gopen

    try:
        stream = gopen(pipe)
    except ValueError as error:  # WDS_SECURE is set
        raise UserError(f"webdataset refuses to run {pipe} ({error}); unset WDS_SECURE.") from error
    stream.ignore_errors = True  # its exceptions show Python internals instead of the command
    try:
        _store(stream.stream, target, pipe)
    finally:
        stream.close()
    if stream.status:
        raise UserError(f"The command in {pipe} failed with exit code {stream.status}; run it in a shell to see why.")


def _store(file: io.BufferedReader, target: Path, name: Path | str) -> None:
    """Write a file to `target`, decompressed if it is compressed; `name` is its name in errors."""
    target.parent.mkdir(parents=True, exist_ok=True)
    start = file.peek()
    opener = next((opener for mark, opener in DECOMPRESSORS.items() if start.startswith(mark)), None)
    try:
        with open(target, "wb") as out:
            shutil.copyfileobj(opener(file) if opener else file, out, 1 << 20)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if getattr(error, "errno", None) is None:  # damage; gzip and bz2 report it as an OSError without a number
            raise UserError(f"{name} is truncated or damaged ({error}); download or copy it again.") from error
        raise UserError(
            f"{name} can't be unpacked to {target.parent} ({error.strerror}); set TMPDIR to a folder with enough space."
        ) from error


def _samples(
    tar_path: Path, name: str, shown: Path | str, extension: str | None, left_out: list[tuple[str, str]]
) -> list[tuple[str, str, int, int, str | None]]:
    """List (tar, key, offset, size, class) of the samples in one tar that have an image."""
    refused: list[tuple[str, str]] = []
    with open_tar(tar_path) as tar:
        parts = list(read_parts(tar, members(tar, shown), extension, refused))
    pairs = paired(parts, shown, extension, refused)
    left_out += [(f"{name}:{member}", reason) for member, reason in refused]
    return [
        (name, image.key, image.offset, image.size, label.text if label and label.text not in NO_CLASS else None)
        for image, label in pairs
    ]


def _class_names(folder: Path, tars: set[str] | None, count: int) -> list[str]:
    """Class names of our own shard set that the tars belong to, followed by numbers up to `count` classes.

    Args:
        folder: may hold the manifest of a shard set.
        tars: file names; None for all tars of the folder.
        count: number of classes.
    """
    names: list[str] = []
    if (folder / "dataset.json").is_file():
        with suppress(UserError):  # damaged, or not of this format
            manifest = open_shards(str(folder)).manifest
            if tars is None or tars <= {shard["file"] for shard in manifest["shards"]}:
                names = manifest["classes"]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{folder}/dataset.json names two classes {twice[0]}; rename one of them.")
    return names + [str(number) for number in range(len(names), count)]


def _name(path: str, folder: Path) -> str:
    """Name of the data set."""
    if path.startswith(PIPE):
        return "webdataset"
    last = (Path(path) if os.path.exists(path) else folder).resolve().name
    return next((last.removesuffix(end) for end in (".tar", *COMPRESSED_TARS) if last.endswith(end)), last)
