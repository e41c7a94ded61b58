"""Indexing of WebDataset tars that were not written by this project.

The tars are read in place and stay unchanged. Compressed tars have no seekable samples, so they must be converted.
An index in the cache is written tar by tar, and an interrupted call resumes behind the last complete one:

    CACHE/indexes/<id>/NAME.index.npy.partial  rows of a tar
    CACHE/indexes/<id>/NAME.tar.json.partial   its entry for the manifest, what was left out, and the version of the tar
"""

import fnmatch
import hashlib
import json
import logging
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from ..common import PIPELINE, UserError, available_cores, file_sha256, progress_bar
from ..images.arrays import npy_bytes
from ..images.files import DecodeError
from ..images.pixel_format import RGB8, PixelFormat, decode_pixels
from ..images.prepare import open_deep, prepare
from .archives import COMPRESSED_TARS, CheckedMember, forgetting
from .cache import ShardCache
from .dataset import (
    ALL_TARS,
    SPLIT_TARS,
    ShardSet,
    cached_index,
    folder_and_tars,
    list_files,
    list_tars,
    open_shards,
    split_roots,
)
from .format import FORMAT, READ_WHOLE, index_name, index_rows, shard_entry, write_manifest
from .measure import MEASURED_IMAGES, channel_moments, measure, mixed_formats
from .remote import HUB, PERMANENT_ERRORS, RetryPolicy, disk_errors, filesystem, is_local, read_file, with_retries
from .samples import CLASS_LIMIT, NO_CLASS, Part, class_number, expand_braces, paired, read_parts
from .web import WebFileSystem

log = logging.getLogger(__name__)
IMAGES_PER_CORE = 16
"""Number of images that are in memory per core, while they are decoded in parallel."""

NOT_IN_PLACE = f"can't be read in place; use `python -m {PIPELINE}.convert webdataset`, which encodes its pixels again"

KEPT = {"name": "", "split": "", "classes": [], "shards": [], "made_by": {}, "pixels": {}}
"""Fields of an existing manifest that indexing keeps, of `pixels` only 8 bits, with their values for a new one."""


class _Tar(NamedTuple):
    """Images of a tar."""

    rows: list[tuple]
    """Index rows."""
    left_out: list[tuple[str, str]]
    """(member, reason) of what can't be used."""
    formats: Counter[PixelFormat]
    """Number of images of each format."""
    moments: list[list[float]]
    """`channel_moments` of some of them."""


def index_splits(
    root: str, cache: ShardCache | None = None, image_extension: str | None = None, bits: int | None = None
) -> list[ShardSet]:
    """Index one shard set, or every split of a folder or URL: train/ and others, or tars in one folder (`SPLIT_TARS`).

    All splits have the classes of the train split.

    Raises:
        UserError, OSError: as `index_shards`.
    """
    cache = cache or ShardCache()
    indexed: list[ShardSet] = []
    splits = [root] if "{" in root or folder_and_tars(root)[1] != ALL_TARS else split_roots(root, cache)
    for split in splits:
        in_cache = "://" in split or folder_and_tars(split)[1] != ALL_TARS
        with _indexing(split, cache) if in_cache else nullcontext():
            classes = indexed[0].classes if indexed else None
            indexed.append(index_shards(split, cache, image_extension, classes, bits))
    return indexed


def ensure_index(root: str, cache: ShardCache) -> None:
    """Index the splits that `open_splits` opens if their tars are in one folder and have no index for these tars yet.

    Of several processes on a machine, one indexes and the others wait.

    Raises:
        UserError, OSError: as `index_shards`.
    """
    classes = None
    for split in split_roots(root, cache)[:2]:
        folder, tars = folder_and_tars(split)
        if tars == ALL_TARS:
            return
        with _indexing(split, cache):
            fs, path = filesystem(folder, cache.retry_policy)
            known = _previous_manifest(LocalFileSystem(), str(cached_index(split, cache)), cache.retry_policy) or KEPT
            if [shard.get("file") for shard in known["shards"]] != list_tars(fs, path, cache.retry_policy, tars):
                log.warning("%s is indexed for its first use, which reads every tar once", split)
                index_shards(split, cache, classes=classes)
            classes = open_shards(split, cache).classes


@contextmanager
def _indexing(split: str, cache: ShardCache) -> Iterator[None]:
    """Hold the lock of an index in the cache."""
    folder = cached_index(split, cache)
    with disk_errors(cache.folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock").acquire()
    with lock:
        yield


def index_shards(
    root: str,
    cache: ShardCache | None = None,
    image_extension: str | None = None,
    classes: list[str] | None = None,
    bits: int | None = None,
) -> ShardSet:
    """Index the WebDataset tars of a folder or URL prefix; a remote one is downloaded once.

    Every image is decoded once; unreadable ones are left out and listed in the manifest. Colors are measured on some
    images of each tar, at equal distances. If the location is read-only,
    the index is kept in the cache, where an interrupted call resumes. An existing index is replaced only after all tars
    have been read; its name, split, classes and 8 bits are kept, and tars that do not match its checksums are listed.

    Args:
        root: folder or URL prefix of the tars, or their names in brace notation, such as
            "https://host/folder/train-{000..146}.tar", for servers that do not list their files; or one of several
            splits in a folder, such as "hf://datasets/OWNER/NAME/*-train-*.tar", whose index is always in the cache.
        image_extension: see `paired`.
        classes: names of the first classes; None keeps those of an existing index.
        bits: 8 reads every image file as 8-bit RGB; None reads all bits, unless an existing index has 8.

    Raises:
        UserError: there are no tars, they hold no readable image or a sample with two images, images differ in channels
            or bits, or a download fails.
        OSError: a tar can't be read or an index can't be written.
    """
    cache = cache or ShardCache()
    root, tars = _find_tars(root, cache.retry_policy)
    location, pattern = folder_and_tars(root)
    fs, path = index_fs, folder = filesystem(location, cache.retry_policy)
    previous = _previous_manifest(fs, path, cache.retry_policy) if pattern == ALL_TARS else None
    cached = pattern != ALL_TARS or root.startswith(HUB) or not _writable(fs, path)
    if cached:
        if previous is not None:  # it would take precedence over an index in the cache
            remedy = "make the folder writable, or copy the tars to one that is"
            raise UserError(f"{root}/dataset.json exists and can't be replaced; {remedy}.")
        index_fs, folder = LocalFileSystem(), str(cached_index(root, cache))
        previous = _previous_manifest(index_fs, folder, cache.retry_policy)
    split = next((name for name, known in SPLIT_TARS.items() if known == pattern), "")
    previous = previous or KEPT | {"split": split}
    if classes is not None:
        previous |= {"classes": classes}
    bits = bits or (8 if previous["pixels"].get("bits") == 8 else None)
    index_fs.makedirs(folder, exist_ok=True)
    checksums = {str(shard.get("file")): shard.get("sha256") for shard in previous["shards"] if isinstance(shard, dict)}
    shards, left_out, formats, moments = [], [], Counter(), []
    measured = -(-MEASURED_IMAGES // len(tars))
    try:
        with progress_bar(len(tars), f"index {root}") as update:
            for name in tars:
                version = _version(fs, f"{path}/{name}", cache.retry_policy) if cached else ""
                read = [version, image_extension, bits, measured]
                if not version or not (found := _resumed(folder, name, read)):
                    tar, size, sha256 = _read_tar(fs, f"{path}/{name}", cache, image_extension, bits, measured)
                    rows = index_rows(tar.rows)
                    index = npy_bytes(rows)
                    index_fs.pipe_file(f"{folder}/{index_name(name)}.partial", index)
                    entry = shard_entry(name, rows, size, sha256, index)
                    found = entry, tar.left_out, list(tar.formats.items()), tar.moments
                    if version:
                        record = json.dumps({"read": read, "found": found})
                        Path(folder, f"{name}.json.partial").write_text(record)
                shard, refused, kinds, some = found
                shards.append(shard)
                formats.update({PixelFormat(*pixel_format): count for pixel_format, count in kinds})
                moments += some
                left_out += [{"name": f"{name}:{member}", "reason": reason} for member, reason in refused]
                if checksums.get(name) not in (None, shard["sha256"]):
                    reason = "differs from its recorded checksum; copy it again unless it was changed on purpose"
                    left_out.append({"name": name, "reason": reason})
                update(advance=1)
        samples = sum(shard["samples"] for shard in shards)
        if not samples:
            first = f" ({left_out[0]['name']}: {left_out[0]['reason']})" if left_out else ""
            raise UserError(
                f"No image could be read from the tars in {root}{first}; they must hold <key>.jpg and <key>.cls."
            )
        if len(formats) > 1:
            raise mixed_formats(root, formats, "pipeline.shards index")
        (pixel_format,) = formats
        known, count = previous["classes"], 1 + max(shard["top_label"] for shard in shards)
        manifest = {
            "name": previous["name"] or posixpath.basename(path),
            "split": previous["split"],
            "classes": known + [str(number) for number in range(len(known), count)],
            "samples": samples,
            "pixels": pixel_format._asdict(),
            "statistics": measure(moments, pixel_format),
            "shards": shards,
            "left_out": left_out,
            "made_by": previous["made_by"] or {"command": "pipeline.shards index"},
        }
        for name in tars:
            index_fs.mv(f"{folder}/{index_name(name)}.partial", f"{folder}/{index_name(name)}")
        write_manifest(index_fs, folder, manifest)
    except BaseException:
        for name in tars:
            if not (cached and Path(folder, f"{name}.json.partial").exists()):
                with suppress(OSError):
                    index_fs.rm_file(f"{folder}/{index_name(name)}.partial")
        raise
    if cached:
        for record in Path(folder).glob("*.json.partial"):
            record.unlink()
    if len(shards) <= READ_WHOLE and index_fs.exists(f"{folder}/index.npy"):
        index_fs.rm_file(f"{folder}/index.npy")
    return open_shards(root, cache)


def _version(fs: AbstractFileSystem, path: str, retry_policy: RetryPolicy) -> str:
    """Digest of what a store says about a file, such as its size, time and checksum; "" if it says nothing."""
    with suppress(*PERMANENT_ERRORS, NotImplementedError):  # reading the file raises a better error
        return with_retries(lambda: fs.ukey(path), path, retry_policy)
    return ""


def _resumed(folder: str, name: str, read: list[str | int | None]) -> list | None:
    """What an interrupted call that read the same version found in a tar; see its record in `index_shards`."""
    try:
        record = json.loads(Path(folder, f"{name}.json.partial").read_text())
        sha256 = file_sha256(Path(folder, f"{index_name(name)}.partial"))
        same = record["read"] == read and record["found"][0]["index_sha256"] == sha256
        return record["found"] if same else None
    except (OSError, ValueError, KeyError):  # missing, or cut off by a crash
        return None


def _find_tars(root: str, retry_policy: RetryPolicy) -> tuple[str, list[str]]:
    """Resolve the argument of `index_shards` to a folder or URL prefix and the names of the tars in it."""
    names: list[str] = []
    if "{" in root:
        folders, expanded = zip(*map(posixpath.split, expand_braces(root)), strict=True)
        if all(name.endswith((".tar", *COMPRESSED_TARS)) for name in expanded):
            if len(set(folders)) > 1:
                raise UserError(f"{root} names tars in several folders; index each folder separately.")
            root, names = folders[0] or ".", list(expanded)
    if not names:
        folder, pattern = folder_and_tars(root)
        fs, path = filesystem(folder, retry_policy)
        names = list_files(fs, path, retry_policy)
        if pattern != ALL_TARS:
            names = fnmatch.filter(names, pattern)
    if tars := [name for name in names if name.endswith(".tar")]:
        return root, tars
    if compressed := next((name for name in names if name.endswith(COMPRESSED_TARS)), ""):
        raise UserError(
            f"{root}/{compressed} is a compressed tar, which can't be indexed in place; use "
            f"`python -m {PIPELINE}.convert webdataset` instead."
        )
    raise UserError(
        f"There is no .tar in {root}; use the folder that holds the shards. If a web server does not list its files, "
        "use a pattern such as https://host/folder/train-{000..146}.tar."
    )


def _writable(fs: AbstractFileSystem, path: str) -> bool:
    if isinstance(fs, WebFileSystem):
        return False
    try:
        fs.pipe_file(f"{path}/dataset.json.partial", b"")
        fs.rm_file(f"{path}/dataset.json.partial")
    except (OSError, NotImplementedError):
        return False
    return True


def _previous_manifest(fs: AbstractFileSystem, path: str, retry_policy: RetryPolicy) -> dict[str, Any] | None:
    """The fields `KEPT` of a folder's manifest, empty where missing or malformed; None if there is no manifest."""
    try:
        found = json.loads(read_file(fs, f"{path}/dataset.json", retry_policy))
    except (FileNotFoundError, PermissionError):
        return None
    except (ValueError, RecursionError):  # the second for deeply nested brackets
        found = {}
    # versions that knew no other pixels wrote sets of 8-bit RGB
    known = isinstance(found, dict) and found.get("format") == FORMAT
    found = {"pixels": RGB8._asdict(), **found} if known else {}
    kept = KEPT | {name: found[name] for name in KEPT if isinstance(found.get(name), type(KEPT[name]))}
    return kept if all(isinstance(name, str) for name in kept["classes"]) else kept | {"classes": []}


def _read_tar(
    fs: AbstractFileSystem, path: str, cache: ShardCache, extension: str | None, bits: int | None, measured: int
) -> tuple[_Tar, int, str]:
    """Read one tar; returns its images, its size in bytes and its SHA-256."""
    try:
        with cache.whole_file(fs, path) as file:
            # first, because it reads sequentially and leaves the tar in the system's file cache
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            file.seek(0)
            return _images(file, path, extension, bits, measured), size, sha256
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a tar; rename it or move it away.") from error
    except PermissionError as error:
        if is_local(fs):
            raise
        remedy = "check the permissions; a gated set on the Hub needs `hf auth login` and accepted terms"
        raise UserError(f"{path} can't be read ({error}); {remedy}.") from error


def _images(file: BinaryIO, path: str, extension: str | None, bits: int | None, measured: int) -> _Tar:
    parts: list[Part] = []
    left_out: list[tuple[str, str]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=CheckedMember, encoding="utf-8") as tar:
            for part in read_parts(tar, forgetting(tar), extension, left_out):
                parts.append(part)  # kept if the tar turns out to be damaged
    except tarfile.TarError as error:
        left_out.append(("the rest of the tar", str(error)))
        last = parts[-1].key if parts else ""
        while parts and parts[-1].key == last:  # it may lack its class
            parts.pop()
    pairs = paired(parts, path, extension, left_out)
    rows, formats, moments, cores = [], Counter(), [], available_cores()
    every = -(-len(pairs) // measured)
    with ThreadPoolExecutor(cores) as pool:
        for first in range(0, len(pairs), IMAGES_PER_CORE * cores):
            part = pairs[first : first + IMAGES_PER_CORE * cores]
            encoded = [_read_at(file, image.offset, image.size) for image, _ in part]
            measure_it = [place % every == 0 for place in range(first, first + len(part))]
            inspected = pool.map(partial(_inspected, bits=bits), encoded, measure_it)
            for (image, label), content, found in zip(part, encoded, inspected, strict=True):
                if isinstance(found, DecodeError):
                    left_out.append((image.name, str(found)))
                    continue
                (_, height, width), pixel_format, row_moments = found
                formats[pixel_format] += 1
                moments += row_moments
                number = class_number(label.text) if label else None
                if label and number is None and label.text not in NO_CLASS:
                    reason = f"the class is not a number below {CLASS_LIMIT}, so the image counts as unlabeled"
                    left_out.append((label.name, reason))
                number = -1 if number is None else number
                rows.append((image.key.encode(), image.offset, image.size, height, width, number, zlib.crc32(content)))
    return _Tar(rows, left_out, formats, moments)


def _inspected(
    encoded: bytes, measured: bool, bits: int | None
) -> tuple[tuple[str, int, int], PixelFormat, list[list[float]]] | DecodeError:
    """Form and format of an image, and its moments if they are measured."""
    try:
        if (image := open_deep(encoded, bits)) and not image.extension:
            return DecodeError(NOT_IN_PLACE)
        form, _, pixel_format = prepare(encoded, bits=bits)
        return form, pixel_format, [channel_moments(decode_pixels(encoded, pixel_format))] if measured else []
    except DecodeError as error:
        return error


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
