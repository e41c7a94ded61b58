"""Convert image collections into shard sets.

    python -m pipeline.convert textures   OUT                           built-in data set
    python -m pipeline.convert folder     SOURCE OUT [--split train]    class folders, or a tar or zip of them
    python -m pipeline.convert imagenet   ILSVRC2012_img_train.tar OUT  tar of class tars, read without unpacking
    python -m pipeline.convert imagenet   ILSVRC2012_img_val.tar OUT --labels ILSVRC2012_devkit_t12.tar.gz
    python -m pipeline.convert imagenet   FOLDER OUT                    train/<wnid>/*.JPEG and val/<wnid>/*.JPEG
    python -m pipeline.convert cifar      cifar-10-python.tar.gz OUT    CIFAR-10 or CIFAR-100, train and test
    python -m pipeline.convert stl10      stl10_binary.tar.gz OUT       train, test and unlabeled
    python -m pipeline.convert webdataset SOURCE OUT [--split train]    WebDataset tars, shuffled and sharded again
    python -m pipeline.convert hf         DATASET OUT [--streaming]     name on the Hugging Face Hub, or parquet files

Each split becomes the shard set OUT/<split>, in a seeded random order. The same source and options produce the same
bytes, regardless of the number of workers and parts. The source of `webdataset` is a folder of tars, a tar, a brace
pattern such as "data/{000..146}.tar", or "pipe:COMMAND" for a shell command that writes a tar; tars may be compressed.
That of `hf` is a name on the Hub, a folder written by save_to_disk, or a file or folder of parquet.
All images must have the same channels and bits; image files with 8 bits count as RGB.
Run the same command again to resume an interrupted conversion. Images that can't be decoded are left out and listed in
OUT/<split>/rejected.csv.
"""

import argparse
import csv
import difflib
import math
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from ..common import UserError, available_cores, check_range
from ..images.prepare import QUALITY
from ..shards.archives import one_line, refuse_url
from ..shards.dataset import ShardSet, open_shards
from ..shards.duplicates import shared_images
from ..shards.samples import add_image_extension
from . import sources, textures
from .copies import without_copies
from .folder import CLASS_LEVELS
from .huggingface import split_name
from .photos import photo_sources
from .writer import SAMPLES_PER_SHARD, shards_written, write_split

AUTO = "auto"
SHOWN = 10
"""Number of rejected images that are printed."""
COMMANDS: dict[str, tuple[str, Callable[[argparse.Namespace], dict[str, sources.Source]]]] = {
    "textures": (
        "built-in data set",
        lambda options: {split: sources.textures_source(split, options.seed) for split in textures.SPLITS},
    ),
    "folder": (
        "class folders, or a tar or zip of them",
        lambda options: _folder_sources(options),
    ),
    "imagenet": (
        "ImageNet tars as distributed, or folders unpacked from them",
        lambda options: sources.imagenet_sources(options.path, options.labels, options.split),
    ),
    "cifar": ("CIFAR-10 or CIFAR-100, Python version", lambda options: sources.cifar_sources(options.path)),
    "stl10": ("STL-10, binary version", lambda options: sources.stl10_sources(options.path)),
    "webdataset": (
        "WebDataset tars written by other tools",
        lambda options: {options.split: sources.webdataset_source(options.path, options.image_extension)},
    ),
    "hf": (
        "Hugging Face data set, or parquet files of images",
        lambda options: sources.huggingface_sources(
            options.path,
            options.split,
            config=options.config_name,
            revision=options.revision,
            image_column=options.image_column,
            label_column=options.label_column,
            streaming=options.streaming,
            short_side=options.short_side,
            quality=options.quality,
            bits=options.bits,
            pages_as_channels=options.pages_as_channels,
        ),
    ),
}
"""Subcommand -> description, and function that returns the source of each split."""


def main() -> None:
    parser = _parser()
    arguments, unknown = parser.parse_known_args()
    if unknown:
        parser.error(_unknown(unknown[0], arguments))
    try:
        check_range("--seed", arguments.seed, 0, 2**64 - 1)
        check_range("--shard-size", arguments.shard_size, 1, math.inf)
        check_range("--quality", arguments.quality, 1, 100)
        check_range("--workers", arguments.workers, 1, math.inf)
        if arguments.short_side is not None:
            check_range("--short-side", arguments.short_side, 1, math.inf)
        refuse_url(arguments.out, "write to a folder and copy it")
        splits = _sources(arguments)
        for split, source in (without_copies(splits) if arguments.drop_duplicates else splits).items():
            shards = write_split(
                source,
                arguments.out,
                split,
                arguments.seed,
                arguments.shard_size,
                verify=arguments.verify,
                short_side=arguments.short_side,
                quality=arguments.quality,
                bits=arguments.bits,
                pages_as_channels=arguments.pages_as_channels,
                workers=arguments.workers,
                part=arguments.part,
            )
            _report(shards, arguments.out, split, -(-len(source.items) // arguments.shard_size))
    except (UserError, OSError) as error:  # an OSError names its file
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to resume.", file=sys.stderr)
        sys.exit(130)


def _folder_sources(options: argparse.Namespace) -> dict[str, sources.Source]:
    if options.split != AUTO:
        return {options.split: sources.folder_source(options.path, options.class_level)}
    splits, notes = photo_sources(options.path, class_level=options.class_level)
    for note in notes:
        print(note, file=sys.stderr)
    return splits


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=__doc__.replace("-m pipeline.convert", f"-m {__package__}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="|".join(COMMANDS))
    for name, (what, _) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        add = command.add_argument
        if name == "webdataset":
            add("path", metavar="source", help="folder or file to convert; also a brace pattern or pipe:COMMAND")
        elif name == "hf":
            add("path", metavar="dataset", help="name on the Hub, folder written by save_to_disk, or parquet files")
        elif name != "textures":
            add("path", type=Path, metavar="source", help="folder or file to convert")
        add("out", type=Path, help="folder that will hold <split>/")
        if name == "folder":
            text = "name of the split (default: train); auto: folders called train and test or val are the splits, or "
            add("--split", default="train", help=f"{text} a tenth of each class is kept as test, as train.py does")
        elif name == "webdataset":
            add("--split", default="train", help="name of the split (default: train)")
        else:
            kind = split_name if name == "hf" else str
            add("--split", type=kind, help="convert only this split (default: all splits)")
        if name == "folder":
            meaning = "the first, the last (which holds the image), or none for no classes"
            default = "the first, unless that is ambiguous"
            text = f"nested folder that names the class: {meaning} (default: {default})"
            add("--class-level", choices=CLASS_LEVELS, help=text)
        elif name == "webdataset":
            add_image_extension(command)
        elif name == "imagenet":
            text = "labels of flat validation images: development kit or text file of synsets"
            add("--labels", type=Path, help=text)
        elif name == "hf":
            add("--config-name", help="configuration of the data set, if it has several")
            add("--revision", help="branch, tag or commit on the Hub (default: main)")
            add("--image-column", help="column of the images (default: the only one)")
            add("--label-column", help="column of the classes (default: the only ClassLabel, or label, labels or cls)")
            text = "read the rows once and store only the images, in TMPDIR; an interrupted stream starts again"
            add("--streaming", action="store_true", help=text)
        _add_options(command)
    return parser


def _unknown(option: str, arguments: argparse.Namespace) -> str:
    """Reason that refuses an option, with the most similar one of the source."""
    option = option.split("=")[0]
    names = [f"--{name.replace('_', '-')}" for name in vars(arguments) if name not in ("source", "path", "out")]
    found = difflib.get_close_matches(option, names, n=1)
    hint = f" (did you mean {found[0]}?)" if found else ""
    return f"{arguments.source} has no option {option!r}{hint}; see {arguments.source} --help"


def _add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--seed", type=int, default=0, help="seed of the sample order (default: 0)")
    add("--shard-size", type=int, default=SAMPLES_PER_SHARD, help="samples per shard (default: %(default)s)")
    add(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="shrink images with a longer short side to this size, as JPEG if they are 8-bit RGB, else without loss; "
        "others keep their bytes",
    )
    add("--quality", type=int, default=QUALITY, help="JPEG quality of shrunk images, 1 to 100 (default: %(default)s)")
    add(
        "--bits",
        type=int,
        choices=[8],
        help="8: keep the upper eight bits of deeper images, so that every image file is 8-bit RGB (default: all bits)",
    )
    add(
        "--pages-as-channels",
        action="store_true",
        help="make each page of a TIFF a channel, up to 16 (default: the first page is the image)",
    )
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every image completely (JPEGs in gray) and leave out those that fail; --no-verify reads only "
        "headers, so that a truncated image is not noticed before training",
    )
    add(
        "--drop-duplicates",
        action="store_true",
        help="leave out exact copies of earlier images, and from train those of images of the other splits that this "
        "command writes; reads the source twice",
    )
    cores = available_cores()
    add("--workers", type=int, default=cores, help=f"number of processes (default: one per core, {cores} here)")
    add(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="write share I of N of the shards (I from 1 to N), for job arrays; the job that finds all shards written "
        "completes the split",
    )


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N")
    return int(number), int(count)


def _sources(options: argparse.Namespace) -> dict[str, sources.Source]:
    """Map the requested splits to their sources."""
    found = COMMANDS[options.source][1](options)
    if options.split in (None, AUTO):
        return found
    if options.split not in found:
        raise UserError(f"There is no split {options.split} in the source; use --split {' or '.join(found)}.")
    return {options.split: found[options.split]}


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
    copies = shards.manifest.get("statistics", {}).get("duplicates", 0)  # older versions did not count them
    listed = f"; {copies} are exact copies of others, see {shards.root}/duplicates.csv" if copies else ""
    print(
        f"{shards.root}: {len(shards)} images of {len(shards.classes)} classes in "
        f"{len(shards.manifest['shards'])} shards, {rejected} left out{listed}."
    )
    train = out / "train"
    others = split != "train" and (train / "dataset.json").exists()
    if others and (shared := len(shared_images(shards, open_shards(str(train))))):
        print(f"{shared} images of {shards.root} are also in {train}.", file=sys.stderr)


if __name__ == "__main__":
    main()
