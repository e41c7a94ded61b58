"""Images to shards.

    python -m pipeline.convert textures   OUT                           the built-in data set
    python -m pipeline.convert folder     SOURCE OUT [--split train]    class folders, or a tar of class folders
    python -m pipeline.convert imagenet   ILSVRC2012_img_train.tar OUT  a tar of class tars, never unpacked to disk
    python -m pipeline.convert imagenet   ILSVRC2012_img_val.tar OUT --labels ILSVRC2012_devkit_t12.tar.gz
    python -m pipeline.convert imagenet   FOLDER OUT                    train/<wnid>/*.JPEG and val/<wnid>/*.JPEG
    python -m pipeline.convert cifar      cifar-10-python.tar.gz OUT    CIFAR-10 or -100, train and test
    python -m pipeline.convert stl10      stl10_binary.tar.gz OUT       train, test and unlabeled
    python -m pipeline.convert webdataset FOLDER OUT [--split train]    WebDataset tars: sharded and mixed anew

A split becomes the shard set OUT/<split>. Samples are written in a seeded random order, so a shard holds all classes
and reading shards one after the other is already a fair order. The same source and options give the same bytes,
however many workers or parts write them. Where class folders are nested, --class-level selects the one that is the
class; where samples of WebDataset tars hold several images, --image-extension selects the one to use. An interrupted
conversion continues where it stopped when the same command is run again. Images that can't be read are left out and
listed in OUT/<split>/rejected.csv.
"""

import argparse
import csv
import os
import sys
from itertools import islice
from pathlib import Path

from ..common import UserError
from ..images import QUALITY
from ..shards.archives import add_image_extension, one_line
from ..shards.dataset import ShardSet
from . import textures
from .imagenet import imagenet_sources
from .pixel_sets import cifar_sources, stl10_sources
from .sources import CLASS_LEVELS, Source, folder_source, webdataset_source
from .textures import textures_source
from .writer import SAMPLES_PER_SHARD, shards_written, write_split

SHOWN = 10
"""How many rejected images are named on the screen."""


def main() -> None:
    arguments = _parser().parse_args()
    try:
        for split, source in _sources(arguments).items():
            shards = write_split(
                source,
                arguments.out,
                split,
                arguments.seed,
                arguments.shard_size,
                verify=arguments.verify,
                short_side=arguments.short_side,
                quality=arguments.quality,
                workers=arguments.workers,
                part=arguments.part,
            )
            _report(shards, arguments.out, split, -(-len(source.items) // arguments.shard_size))
    except (UserError, OSError) as error:  # an OSError names its file
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on where it stopped.", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = {
        "textures": "the built-in data set",
        "folder": "class folders, or a tar of class folders",
        "imagenet": "its tars as they are distributed, or folders unpacked from them",
        "cifar": "CIFAR-10 or CIFAR-100, python version",
        "stl10": "STL-10, binary version",
        "webdataset": "WebDataset tars from elsewhere",
    }
    commands = parser.add_subparsers(dest="source", required=True, metavar="|".join(about))
    for name, what in about.items():
        command = commands.add_parser(name, help=what, description=what)
        if name != "textures":
            command.add_argument("path", type=Path, help="the folder or file to convert")
        command.add_argument("out", type=Path, help="folder that will hold <split>/")
        if name in ("folder", "webdataset"):
            command.add_argument("--split", default="train", help="name of the split (default: train)")
        else:
            command.add_argument("--split", help="convert this split only (default: every split there is)")
        if name == "folder":
            command.add_argument(
                "--class-level",
                choices=CLASS_LEVELS,
                help="which folder is the class where class folders are nested: the first one, the last one, which "
                "holds the image, or none for no classes (default: the first one, unless that is ambiguous)",
            )
        if name == "webdataset":
            add_image_extension(command)
        if name == "imagenet":
            command.add_argument(
                "--labels", type=Path, help="of flat validation images: the development kit, or a text of synsets"
            )
        _add_options(command)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=_seed, default=0, help="of the order of samples in the shards (default: 0)")
    command.add_argument(
        "--shard-size", type=_positive, default=SAMPLES_PER_SHARD, help="samples per shard (default: %(default)s)"
    )
    command.add_argument(
        "--short-side",
        type=_positive,
        metavar="PIXELS",
        help="make images smaller whose short side has more pixels, as JPEG; others keep their bytes",
    )
    command.add_argument(
        "--quality", type=_quality, default=QUALITY, help="of those JPEGs, 1 to 100 (default: %(default)s)"
    )
    command.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every image to its last pixel (JPEGs in gray) and leave out what fails; --no-verify reads headers "
        "only, so that a truncated image is met in training",
    )
    command.add_argument(
        "--workers", type=_positive, default=_cores(), help="processes (default: one per core, %(default)s here)"
    )
    command.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="write the I-th of N shares of the shards, I from 1 to N, for job arrays; the job that finds all shards "
        "written completes the split",
    )


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2**64 - 1")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 100")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N")
    return int(number), int(of)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sources(arguments: argparse.Namespace) -> dict[str, Source]:
    """split -> source, as the command line asks for them."""
    if arguments.source == "folder":
        return {arguments.split: folder_source(arguments.path, arguments.class_level)}
    if arguments.source == "webdataset":
        return {arguments.split: webdataset_source(arguments.path, arguments.image_extension)}
    if arguments.source == "textures":
        sources = {split: textures_source(split, arguments.seed) for split in textures.SPLITS}
    elif arguments.source == "imagenet":
        sources = imagenet_sources(arguments.path, arguments.labels, arguments.split)
    elif arguments.source == "cifar":
        sources = cifar_sources(arguments.path)
    else:
        sources = stl10_sources(arguments.path)
    if arguments.split is None:
        return sources
    if arguments.split not in sources:
        raise UserError(f"There is no split {arguments.split} here: choose from {', '.join(sources)}.")
    return {arguments.split: sources[arguments.split]}


def _report(shards: ShardSet | None, out: Path, split: str, count: int) -> None:
    if shards is None:
        print(f"{out / split}: {shards_written(out, split)} of {count} shards are written; the last part completes it.")
        return
    rejected = shards.manifest["rejected"]
    with open(Path(shards.root, "rejected.csv"), newline="", encoding="utf-8") as file:
        for name, reason in islice(csv.reader(file), 1, 1 + SHOWN):
            print(f"left out {one_line(name)}: {reason}", file=sys.stderr)
    if rejected > SHOWN:
        print(f"... and {rejected - SHOWN} more, see {shards.root}/rejected.csv", file=sys.stderr)
    print(
        f"{shards.root}: {len(shards)} images of {len(shards.classes)} classes in "
        f"{len(shards.manifest['shards'])} shards, {rejected} left out."
    )


if __name__ == "__main__":
    main()
