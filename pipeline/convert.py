"""Images to shards.

    python -m pipeline.convert textures OUT                           the built-in data set, train and test
    python -m pipeline.convert folder   SOURCE OUT [--split train]    class folders, or a tar of class folders
    python -m pipeline.convert imagenet ILSVRC2012_img_train.tar OUT  a tar of class tars, never unpacked to disk

A split becomes the shard set OUT/<split>. Samples are written in a seeded random order, so a shard holds all classes
and reading shards one after the other is already a fair order. Every image is decoded once: one that can't be is left
out, named and counted.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from rich.progress import track

from errors import UserError
from pipeline import textures
from pipeline.images import DecodeError, inspect
from pipeline.philox import uniforms
from pipeline.shard_files import Sample, write_manifest, write_shard
from pipeline.shards import ShardSet, open_shards
from pipeline.sources import Source, folder_source, imagenet_source, textures_source

SAMPLES_PER_SHARD = 1024
WRITING_STREAM = 2**32 - 3  # of random numbers: apart from those of the textures, the views and the training order


def write_split(
    source: Source, out: Path, split: str, seed: int = 0, samples_per_shard: int = SAMPLES_PER_SHARD
) -> ShardSet:
    """Write OUT/<split>: into a folder beside it that is renamed when complete.

    Raises:
        UserError: no readable image, the split exists, or its classes differ from those of another split in OUT.
    """
    target, partial = out / split, out / f".{split}.partial"
    if target.exists():
        raise UserError(f"{target} exists already: delete it or choose another folder.")
    if not source.items:
        raise UserError(f"No images in {source.name}: a source holds .jpg, .png or similar files in class folders.")
    classes = _classes(source, out, split)
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted conversion left
    partial.mkdir(parents=True)
    try:
        manifest = _write_shards(source, partial, split, classes, seed, samples_per_shard)
        if not manifest["samples"]:
            first = manifest["left_out"][0]
            raise UserError(f"No image of {source.name} could be read; the first: {first['name']} ({first['reason']}).")
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_shards(str(target))


def _classes(source: Source, out: Path, split: str) -> list[str]:
    """Sorted class names; those of a split that is already there, so that a label means the same in both."""
    names = sorted({label for label, _, _ in source.items if label is not None})
    for manifest in sorted(out.glob("[!.]*/dataset.json")):  # not the hidden folder of an interrupted conversion
        others = open_shards(str(manifest.parent)).classes
        if foreign := sorted(set(names) - set(others)):
            raise UserError(
                f"{split} has classes that {manifest.parent} has not ({', '.join(foreign[:3])}): "
                "convert the split with all classes first, or into another folder."
            )
        return others
    return names


def _write_shards(source: Source, folder: Path, split: str, classes: list[str], seed: int, per_shard: int) -> dict:
    labels = {name: number for number, name in enumerate(classes)} | {None: -1}
    order = np.argsort(uniforms(seed, 0, np.arange(len(source.items)), WRITING_STREAM, 1)[:, 0], kind="stable")
    left_out, counts = [], [0] * len(classes)

    def load(number: int) -> Sample | str:
        label, key, address = source.items[number]
        try:
            encoded = source.read(*address)
            return Sample(key, inspect(encoded), encoded, labels[label])
        except (DecodeError, OSError) as error:
            return str(error)

    def readable(chunk: np.ndarray) -> Iterator[Sample]:
        for number, sample in zip(chunk, pool.map(load, chunk), strict=True):
            if isinstance(sample, str):
                left_out.append({"name": source.items[number][1], "reason": sample})
                continue
            if sample.label >= 0:
                counts[sample.label] += 1
            yield sample

    chunks = [order[first : first + per_shard] for first in range(0, len(order), per_shard)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shards = [
            write_shard(folder, f"{split}-{number:06d}.tar", readable(chunk))
            for number, chunk in enumerate(track(chunks, f"{source.name} {split}", disable=not sys.stderr.isatty()))
        ]
    manifest = {
        "name": source.name,
        "split": split,
        "classes": classes,
        "class_counts": counts,
        "samples": sum(shard["samples"] for shard in shards),
        "shards": shards,
        "left_out": left_out,
        "made_by": {"command": "pipeline.convert", "seed": seed, "samples_per_shard": per_shard},
    }
    write_manifest(LocalFileSystem(), str(folder), manifest)
    return manifest


def ensure_textures(out: Path) -> None:
    """Render the built-in data set unless it is there; of several processes one renders and the others wait."""
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".lock"):
        sources = {split: textures_source(split) for split in textures.SPLITS}
        for split, source in sources.items():  # first away with all that another version of the textures rendered
            if (out / split).exists() and open_shards(str(out / split)).manifest["name"] != source.name:
                shutil.rmtree(out / f".{split}.partial", ignore_errors=True)
                os.replace(out / split, out / f".{split}.partial")  # in one step: a process may be killed at any time
        for split, source in sources.items():
            if not (out / split).exists():
                write_split(source, out, split)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="textures|folder|imagenet")
    textures_parser = commands.add_parser("textures", help="render the built-in data set")
    folder_parser = commands.add_parser("folder", help="class folders, or a tar of class folders")
    imagenet_parser = commands.add_parser("imagenet", help="ILSVRC2012_img_train.tar")
    for command in (folder_parser, imagenet_parser):
        command.add_argument("path", type=Path, help="the folder or tar to convert")
        command.add_argument("--split", default="train", help="name of the split (default: train)")
    for command in (textures_parser, folder_parser, imagenet_parser):
        command.add_argument("out", type=Path, help="folder that will hold <split>/")
        command.add_argument("--seed", type=int, default=0, help="of the order of samples in the shards (default: 0)")
    arguments = parser.parse_args()
    try:
        if arguments.source == "textures":
            splits = {split: textures_source(split, arguments.seed) for split in textures.SPLITS}
        elif arguments.source == "folder":
            splits = {arguments.split: folder_source(arguments.path)}
        else:
            splits = {arguments.split: imagenet_source(arguments.path)}
        for split, source in splits.items():
            _report(write_split(source, arguments.out, split, arguments.seed))
    except (UserError, OSError) as error:  # an OSError names its file: no space, no permission
        sys.exit(str(error))


def _report(shards: ShardSet) -> None:
    for refused in shards.manifest["left_out"]:
        print(f"left out {refused['name']}: {refused['reason']}", file=sys.stderr)
    print(
        f"{shards.root}: {len(shards)} images of {len(shards.classes)} classes in "
        f"{len(shards.manifest['shards'])} shards, {len(shards.manifest['left_out'])} left out."
    )


if __name__ == "__main__":
    main()
