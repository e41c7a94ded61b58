"""The shard set: plain WebDataset tars, an index beside each, and one `dataset.json` written last.

    ROOT/dataset.json            name, split, classes, counts, checksums, how it was made
    ROOT/train-000000.tar        <key>.jpg, <key>.cls pairs, as the webdataset library writes and reads them
    ROOT/train-000000.index.npy  one `index_dtype` row per sample, so that any sample is one read at a known offset

A folder without `dataset.json` is not a shard set, so one that was interrupted while being written is never trusted.

    python -m pipeline.shards index ROOT    make the index of WebDataset tars from elsewhere
    python -m pipeline.shards verify ROOT   compare a copy with the checksums of the original
"""

import argparse
import io
import json
import posixpath
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import numpy as np

from errors import UserError

FORMAT = "streamclr-shards-1"


def index_dtype(key_length: int) -> np.dtype:
    """One index row: where the encoded image lies in its tar, its size in pixels, its label and its CRC-32."""
    fields = [("key", f"S{max(key_length, 1)}"), ("offset", "<i8"), ("size", "<i8")]
    return np.dtype([*fields, ("height", "<i4"), ("width", "<i4"), ("label", "<i8"), ("crc32", "<u4")])


def index_name(tar_name: str) -> str:
    return tar_name.removesuffix(".tar") + ".index.npy"


@dataclass(frozen=True)
class ShardSet:
    """An opened shard set. `index` holds every sample of every shard, in the order of the manifest."""

    root: str
    manifest: dict[str, Any]
    index: np.ndarray
    """(N,) structured rows of `index_dtype`."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def classes(self) -> list[str]:
        return self.manifest["classes"]

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """(S + 1,) int64: sample i lies in shard s where shard_starts[s] <= i < shard_starts[s + 1]."""
        return np.cumsum([0] + [shard["samples"] for shard in self.manifest["shards"]])


def filesystem(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a folder or URL, and the path in it.

    Raises:
        UserError: no such kind of URL, or its package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(root)
    except (ValueError, ImportError) as error:
        raise UserError(f"{root} can't be opened: {error}") from error
    return fs, path.rstrip("/")


def open_shards(root: str) -> ShardSet:
    """Open a shard set, local or at any URL that fsspec knows.

    Raises:
        UserError: there is none, it is empty or can't be read, or its index does not belong to it.
    """
    fs, path = filesystem(root)
    again = f"run `python -m pipeline.shards index {root}` to make it anew"
    try:
        manifest = json.loads(fs.cat_file(f"{path}/dataset.json"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if fs.isdir(path) and fs.glob(f"{path}/*.tar"):
            cure = f"run `python -m pipeline.shards index {root}` first"
            raise UserError(f"The tars in {root} have no index: {cure}.") from error
        cure = "make them with `python -m pipeline.convert`, or correct the path"
        raise UserError(f"No shards at {root}: {cure}.") from error
    except OSError as error:
        raise UserError(f"{root} can't be read ({error}): see to the connection and the permissions.") from error
    except ValueError as error:
        raise UserError(f"{root}/dataset.json is damaged: {again}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{root}/dataset.json is not of format {FORMAT}: {again}.")
    if not manifest["shards"]:
        raise UserError(f"{root} lists no shards: convert the images again.")
    names = [index_name(shard["file"]) for shard in manifest["shards"]]
    # all at once: a thousand requests one after the other take minutes from an object store
    contents = fs.cat_ranges([f"{path}/{name}" for name in names], None, None, on_error="return")
    parts = []
    for name, content, shard in zip(names, contents, manifest["shards"], strict=True):
        if isinstance(content, FileNotFoundError):
            raise UserError(f"{root}/{name} is missing: {again}.") from content
        if isinstance(content, Exception):
            raise UserError(f"{root}/{name} can't be read ({content}): see to the connection.") from content
        try:
            parts.append(np.load(io.BytesIO(content), allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise UserError(f"{root}/{name} is damaged: {again}.") from error
        if len(parts[-1]) != shard["samples"]:
            raise UserError(f"{root}/{name} disagrees with dataset.json: {again}.")
    return ShardSet(root, manifest, np.concatenate(parts))


def open_splits(root: str) -> tuple[ShardSet, ShardSet | None]:
    """The train split of a folder or URL and its test (or val) split if it has one; or one shard set by itself.

    Raises:
        UserError: as `open_shards`, and if the splits' classes differ.
    """
    fs, path = filesystem(root)

    def has(split: str) -> bool:  # a web server knows no folders, and a folder may still lack its dataset.json
        return fs.exists(f"{path}/{split}/dataset.json") or fs.exists(f"{path}/{split}")

    if not has("train"):
        return open_shards(root), None
    train = open_shards(posixpath.join(root, "train"))
    for split in filter(has, ("test", "val")):
        test = open_shards(posixpath.join(root, split))
        if test.classes != train.classes:
            raise UserError(f"{test.root} has other classes than {train.root}: convert both again.")
        return train, test
    return train, None


def main() -> None:
    from pipeline.shard_files import index_shards, verify_shards  # which builds on this module

    parser = argparse.ArgumentParser(
        prog="python -m pipeline.shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["index", "verify"])
    parser.add_argument("root", help="folder or URL prefix that holds the tars")
    arguments = parser.parse_args()
    try:
        if arguments.command == "index":
            shards = index_shards(arguments.root)
            for refused in shards.manifest["left_out"]:
                print(f"left out {refused['name']}: {refused['reason']}", file=sys.stderr)
            print(f"{len(shards)} images in {len(shards.manifest['shards'])} shards indexed.")
        else:
            problems = verify_shards(arguments.root)
            if problems:
                raise UserError("\n".join(problems))
            print("Every shard is as it was written.")
    except (UserError, OSError) as error:  # an OSError names its file: no space, no permission, no connection
        sys.exit(str(error))


if __name__ == "__main__":
    main()
