"""Convert image collections into shard sets.

    python -m pipeline.convert textures   OUT                           built-in data set
    python -m pipeline.convert folder     SOURCE OUT [--split train]    class folders, or a tar of class folders
    python -m pipeline.convert imagenet   ILSVRC2012_img_train.tar OUT  tar of class tars, read without unpacking
    python -m pipeline.convert imagenet   ILSVRC2012_img_val.tar OUT --labels ILSVRC2012_devkit_t12.tar.gz
    python -m pipeline.convert imagenet   FOLDER OUT                    train/<wnid>/*.JPEG and val/<wnid>/*.JPEG
    python -m pipeline.convert cifar      cifar-10-python.tar.gz OUT    CIFAR-10 or CIFAR-100, train and test
    python -m pipeline.convert stl10      stl10_binary.tar.gz OUT       train, test and unlabeled
    python -m pipeline.convert webdataset SOURCE OUT [--split train]    WebDataset tars, shuffled and sharded again

Each split becomes the shard set OUT/<split>. Samples are written in a seeded random order, so that every shard holds a
mix of classes and reading shards in sequence is close to a random order. The same source and options produce the same
bytes, regardless of the number of workers and parts. Use --class-level to select the class among nested folders, and
--image-extension to select the image of WebDataset samples with several images. The source of `webdataset` is a folder
of tars, a tar, a brace pattern such as "data/{000..146}.tar", or "pipe:COMMAND" for a shell command that writes a tar;
tars may be compressed. Run the same command again to resume an interrupted conversion. Images that can't be decoded are
left out and listed in OUT/<split>/rejected.csv.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from ..common import UserError, available_cores
from ..images import QUALITY
from ..shards.archives import add_image_extension, one_line
from ..shards.dataset import ShardSet
from . import textures
from .naming import CLASS_LEVELS
from .sources import (
    Source,
    cifar_sources,
    folder_source,
    imagenet_sources,
    stl10_sources,
    textures_source,
    webdataset_source,
)
from .writer import SAMPLES_PER_SHARD, shards_written, write_split

SHOWN = 10
"""Number of rejected images that are printed."""


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
        print("Interrupted; run the same command again to resume.", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = {
        "textures": "built-in data set",
        "folder": "class folders, or a tar of class folders",
        "imagenet": "ImageNet tars as distributed, or folders unpacked from them",
        "cifar": "CIFAR-10 or CIFAR-100, Python version",
        "stl10": "STL-10, binary version",
        "webdataset": "WebDataset tars written by other tools",
    }
    commands = parser.add_subparsers(dest="source", required=True, metavar="|".join(about))
    for name, what in about.items():
        command = commands.add_parser(name, help=what, description=what)
        if name != "textures":
            pipes = "; also a brace pattern or pipe:COMMAND" if name == "webdataset" else ""
            command.add_argument(
                "path", type=str if pipes else Path, metavar="source", help=f"folder or file to convert{pipes}"
            )
        command.add_argument("out", type=Path, help="folder that will hold <split>/")
        if name in ("folder", "webdataset"):
            command.add_argument("--split", default="train", help="name of the split (default: train)")
        else:
            command.add_argument("--split", help="convert only this split (default: all splits)")
        if name == "folder":
            command.add_argument(
                "--class-level",
                choices=CLASS_LEVELS,
                help="nested folder that names the class: the first, the last (which holds the image), or none for no "
                "classes (default: the first, unless that is ambiguous)",
            )
        if name == "webdataset":
            add_image_extension(command)
        if name == "imagenet":
            command.add_argument(
                "--labels", type=Path, help="labels of flat validation images: development kit or text file of synsets"
            )
        _add_options(command)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=_seed, default=0, help="seed of the sample order (default: 0)")
    command.add_argument(
        "--shard-size", type=_positive, default=SAMPLES_PER_SHARD, help="samples per shard (default: %(default)s)"
    )
    command.add_argument(
        "--short-side",
        type=_positive,
        metavar="PIXELS",
        help="shrink images with a longer short side to this size, as JPEG; others keep their bytes",
    )
    command.add_argument(
        "--quality",
        type=_quality,
        default=QUALITY,
        help="JPEG quality of shrunk images, 1 to 100 (default: %(default)s)",
    )
    command.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every image completely (JPEGs in gray) and leave out those that fail; --no-verify reads only "
        "headers, so that a truncated image is not noticed before training",
    )
    command.add_argument(
        "--workers",
        type=_positive,
        default=available_cores(),
        help="number of processes (default: one per core, %(default)s here)",
    )
    command.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="write share I of N of the shards (I from 1 to N), for job arrays; the job that finds all shards written "
        "completes the split",
    )


def _whole_number(smallest: int, largest: float, bounds: str) -> Callable[[str], int]:
    """Option type of whole numbers; `bounds` describes the range in the error."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and smallest <= int(text) <= largest):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number {bounds}")
        return int(text)

    return parse


_seed = _whole_number(0, 2**64 - 1, "from 0 to 2**64 - 1")
_positive = _whole_number(1, math.inf, "above 0")
_quality = _whole_number(1, 100, "from 1 to 100")


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N")
    return int(number), int(count)


def _sources(arguments: argparse.Namespace) -> dict[str, Source]:
    """Map the requested splits to their sources."""
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
        raise UserError(f"There is no split {arguments.split} in the source; use --split {' or '.join(sources)}.")
    return {arguments.split: sources[arguments.split]}


def _report(shards: ShardSet | None, out: Path, split: str, count: int) -> None:
    if shards is None:
        written = shards_written(out, split)
        print(f"{out / split}: {written} of {count} shards are written; the last part completes the split.")
        return
    rejected = shards.manifest["rejected"]
    with open(Path(shards.root, "rejected.csv"), newline="", encoding="utf-8") as file:
        for name, reason in islice(csv.reader(file), 1, 1 + SHOWN):
            print(f"left out {one_line(name)}: {reason}", file=sys.stderr)
    if rejected > SHOWN:
        print(f"... and {rejected - SHOWN} more; see {shards.root}/rejected.csv", file=sys.stderr)
    print(
        f"{shards.root}: {len(shards)} images of {len(shards.classes)} classes in "
        f"{len(shards.manifest['shards'])} shards, {rejected} left out."
    )


if __name__ == "__main__":
    main()
