"""Accuracy over wall-clock time: this project, lightly, a plain PyTorch loop and a training script on one data set.

    python -m bench.learning                                          the built-in textures, 8 minutes each
    python -m bench.learning --data SHARDS --peer simclr-cifar10.py   other images, and a training script in one file
    python -m bench.learning --contenders ours lightly --minutes 4    some contenders only; their rows are replaced
    python -m bench.learning -- --encoder.width 0.5 --seed 1          options of train.py apply to every contender

Every contender trains the same encoder on the same images for the same time, in a process of its own with all cores;
nothing else should run. `ours-lightly` is this project with the recipe of `lightly` and `plain`, up to the differences
that docs/benchmarks.md lists; `ours` has its own preset. A short run measures the speed of each before its race, so
that its learning rate ends with its time, and chooses precision and DataLoader workers of a peer. A preset whose views
grow keeps the share of its epochs at each size. The same code computes kNN (k = 20) and, at the end, a linear
classifier for all, on frozen features of center crops and after training. Writes bench/results/learning.csv,
docs/learning.png and the table of docs/benchmarks.md.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from bench.contenders import Entry
from bench.harness import environment, read_rows, run_module, show, write_rows
from common import UserError, available_cores, check_range
from config import PretrainConfig
from engine.session import computes_in_bf16
from evaluation.evaluator import EvalConfig, Evaluator
from evaluation.features import ALONE
from evaluation.store import eval_splits
from model import create_encoder, encoder_spec
from pipeline.augment import AugmentConfig
from pipeline.data import open_data
from pipeline.images.pixel_format import RGB8
from pipeline.loader import LoaderConfig, center_crop_batches
from pipeline.shards import ShardSet
from presets import PRETRAIN, parse

ENCODER = ["--encoder.name", "resnet18", "--encoder.width", "0.25", "--encoder.stem", "standard"]
"""A network that a CPU trains in minutes."""
LIGHTLY = shlex.split(
    "--preset cifar10 --batch-size 128 --optim.name sgd --optim.lr 0.06 --optim.scaling none --optim.momentum 0.9 "
    "--optim.weight-decay 5e-4 --optim.warmup-epochs 0 --loss.temperature 0.5 --head.hidden 512 --head.out 128 "
    "--views.size 32 --views.crop-area 0.08 1 --views.jitter-strength 0.5 --views.gray-p 0.2 --views.blur-p 0 "
    "--views.mean 0.485 0.456 0.406 --views.std 0.229 0.224 0.225"
)
"""SimCLR in lightly's benchmark on CIFAR-10 (docs.lightly.ai, cifar10_benchmark.py), with the jitter that
`lightly.transforms.SimCLRTransform` recommends for such images."""
CONTENDERS = ("ours", "ours-lightly", "lightly", "plain", "peer")
WORKERS = (0, 1, 2)
"""Processes of a peer's DataLoader, of which the fastest number is kept."""
WARM_UP, FIRST_EPOCH, CHOICE = 1 / 16, 1 / 4, 1 / 48
"""Share of the time for which the speed is measured: of a peer; of ours, at all sizes together, because later epochs
find resident images and differ from the first; and of each precision and number of workers of a peer."""
console = Console()


@dataclass(frozen=True)
class Race:
    """What all contenders share."""

    train: ShardSet
    test: ShardSet
    seconds: float
    points: int
    preset: str
    """Preset of the contender "ours"."""
    options: list[str]
    """Options of train.py for all contenders."""
    file: str
    """Training script of the contender "peer"."""

    def entry(self, contender: str) -> Entry:
        """The entry of a contender, without what its warm-up chooses."""
        recipe = ["--preset", self.preset] if contender == "ours" else LIGHTLY
        arguments = [*recipe, *ENCODER, *self.options, "--data", self.train.root]
        trainer = {"ours-lightly": "ours", "peer": "file"}.get(contender, contender)
        return Entry(trainer, arguments, 0, self.seconds, self.points, "auto", 0, self.file)

    def config(self, contender: str) -> PretrainConfig:
        """Configuration of a contender; that of "peer" only tells the encoder, the size of the views and the seed.

        Raises:
            UserError: an option is unknown or out of range, or the batch exceeds the images.
        """
        config = parse(PRETRAIN, self.entry(contender).arguments, prog="train.py")
        if config.batch_size > len(self.train):
            raise UserError(f"Batches of {config.batch_size} exceed the {len(self.train)} images; use more images.")
        return config


Take = Callable[[Entry, Path], dict[str, Any]]
"""Run an entry, given a folder for its encoders; see `bench.contenders.run`."""
in_a_process: Take = partial(run_module, "bench.contenders")


def warmed_up(entry: Entry, images: int, take: Take) -> Entry:
    """The entry with the fastest precision and number of workers, and a schedule that ends with its time.

    Args:
        images: number of training images.
    """

    def images_per_s(candidate: Entry, share: float) -> float:
        with tempfile.TemporaryDirectory() as folder:
            short = replace(candidate, images=3 * images, seconds=share * entry.seconds, points=1)
            return final_speed(take(short, Path(folder))["stamps"])

    if entry.trainer == "ours":
        config = parse(PRETRAIN, entry.arguments, prog="train.py")
        views, phases = config.views, dict(config.views.phases)
        if rest := config.epochs - sum(phases.values()):
            phases[views.size] = rest
        image_s = 0.0
        for size, epochs in phases.items():
            fixed = replace(entry, arguments=[*entry.arguments, "--views.size", str(size), "--views.size-schedule"])
            image_s += epochs / config.epochs / images_per_s(fixed, FIRST_EPOCH / len(phases))
        return replace(entry, images=round(entry.seconds / image_s))
    candidates = [replace(entry, precision=p, workers=w) for p, w in product(("bf16", "fp32"), WORKERS)]
    fastest = max(candidates, key=lambda candidate: images_per_s(candidate, CHOICE))
    return replace(fastest, images=round(images_per_s(fastest, WARM_UP) * entry.seconds))


def final_speed(stamps: list[tuple[float, int]]) -> float:
    """Images per second in the last third of a run, from the seconds and images after every step."""
    end_s, end = stamps[-1]
    start_s, start = max(((s, n) for s, n in stamps[:-1] if s <= 2 / 3 * end_s), default=(0.0, 0))
    return (end - start) / (end_s - start_s)


def scores(race: Race, file: Path, views: AugmentConfig, config: PretrainConfig, linear: bool) -> dict[str, float]:
    """`knn_top1` and perhaps `linear_top1` of an encoder, on at most 50,000 images of each split, in float32.

    Args:
        file: weights of the encoder.
        views: views of the size and normalization that it was trained with.
        config: any with this encoder.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = create_encoder(encoder_spec(config.encoder, views.size))
    encoder.load_state_dict(load_file(file))
    splits = [(split.shards, split.samples) for split in eval_splits(race.train, race.test, labeled=True)]
    batches = partial(center_crop_batches, augment=views, config=LoaderConfig(), batch_size=256, device=device)
    evaluate = Evaluator(*splits, batches, ALONE, EvalConfig(k=20), LoaderConfig().max_bad)
    return evaluate(encoder.to(device).eval(), linear=linear)


def rows_of(contender: str, race: Race, take: Take = in_a_process) -> list[dict[str, Any]]:
    """Warm up, train and evaluate one contender; one row per point in time."""
    config = race.config(contender)
    entry = warmed_up(race.entry(contender), len(race.train), take)
    rows, device = [], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = entry.precision
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(device) else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        result = take(entry, Path(folder))
        views = replace(config.views.full_size, mean=tuple(result["mean"]), std=tuple(result["std"]))
        for point in result["points"]:
            last = point is result["points"][-1]
            found = scores(race, Path(folder, point["file"]), views, config, linear=last)
            row = environment(device)
            row |= {"threads": available_cores(), "data": race.train.manifest.get("name", race.train.root)}
            row |= {"train_images": len(race.train), "test_images": len(race.test), "budget_s": race.seconds}
            row |= {"contender": Path(race.file).stem if contender == "peer" else contender}
            row |= {"encoder": f"{config.encoder.name} x {config.encoder.width:g}, {config.encoder.stem} stem"}
            row |= {"batch": result["batch"], "precision": precision, "workers": entry.workers}
            row |= {"seconds": round(point["seconds"], 2), "images_seen": point["images"]}
            row |= {"images_per_s": round(point["images"] / point["seconds"], 1)}
            row |= {"schedule": round(point["step"] / result["planned_steps"], 3)}
            row |= {
                "knn_top1": round(found["knn_top1"], 4),
                "linear_top1": round(found["linear_top1"], 4) if last else None,
            }
            rows.append(row | {"seed": config.seed, "recipe": result["recipe"]})
    return rows


def open_race(arguments: argparse.Namespace) -> Race:
    """Open the images.

    Raises:
        UserError: there are no labeled test images, or the peers can't read them.
    """
    train, test = open_data(arguments.data, LoaderConfig())
    eval_splits(train, test, labeled=True)
    if train.pixel_format != RGB8:
        raise UserError(f"The images of {train.root} are {train.pixel_format}, but the peers read 8-bit RGB; use such.")
    if Path(train.root).exists():  # contenders run in the folder of this project
        train = replace(train, root=str(Path(train.root).resolve()))
    preset = arguments.preset or ("auto" if arguments.data else "textures")
    file = str(Path(arguments.peer).resolve()) if arguments.peer else ""
    return Race(train, test, 60 * arguments.minutes, arguments.points, preset, arguments.options, file)


def available(arguments: argparse.Namespace) -> list[str]:
    """Contenders to start: those that were asked for, or all that are there.

    Raises:
        UserError: one that was asked for is not there.
    """
    missing = {}
    if not find_spec("lightly"):
        missing["lightly"] = "lightly is not installed; run `make bench`, which installs it."
    if not arguments.peer:
        missing["peer"] = "There is no script for the contender peer; use --peer FILE."
    for name in arguments.contenders or ():
        if name in missing:
            raise UserError(missing[name])
    if arguments.peer and not Path(arguments.peer).is_file():
        raise UserError(f"--peer {arguments.peer} is not a file; use the path of a training script.")
    if not arguments.contenders:
        for reason in missing.values():
            console.print(reason)
    return arguments.contenders or [name for name in CONTENDERS if name not in missing]


def other_rows(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Committed rows of other contenders, data sets, encoders, machines, times or seeds than `rows`."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        names = ("data", "encoder", "device", "seed", "contender")
        return float(row["budget_s"]), *(str(row[name]) for name in names)

    return [row for row in read_rows("learning") if key(row) not in set(map(key, rows))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="shards or images with labels and a test split (default: textures)")
    parser.add_argument("--minutes", type=float, default=8, help="training time of each contender (default: 8)")
    parser.add_argument("--points", type=int, default=6, help="evaluations of each contender (default: 6)")
    parser.add_argument("--preset", choices=PRETRAIN, help="preset of ours (default: that of train.py)")
    parser.add_argument("--peer", default="", help="training script in one file, as github.com/dkobak/simclr-cifar10")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all that are available")
    parser.add_argument("options", nargs="*", help="after --: options of train.py for every contender")
    arguments = parser.parse_args()
    try:
        check_range("--minutes", arguments.minutes, 0.01, 10**6)
        check_range("--points", arguments.points, 1, 10**6)
        chosen, race = available(arguments), open_race(arguments)
        rows, failed = [], []
        for contender in chosen:
            console.print(f"{contender} ...")
            try:
                new = rows_of(contender, race)
            except subprocess.CalledProcessError:  # its process has printed the reason
                failed.append(contender)
                continue
            rows += new
            path = write_rows("learning", [*other_rows(new), *new])  # now, because the next one may fail
    except UserError as error:
        sys.exit(str(error))
    if not rows:
        sys.exit("No contender finished; the reasons are above.")
    columns = ("contender", "batch", "precision", "workers", "seconds", "images_per_s", "knn_top1", "linear_top1")
    show([row for row in rows if row["linear_top1"] is not None], columns)  # the last points
    from bench.plot import fill_learning_table, plot_learning  # not at the top: it imports matplotlib

    console.print(f"written: {path}, {plot_learning()} and {fill_learning_table()}")
    if failed:
        sys.exit(f"{' and '.join(failed)} failed; the reasons are above.")


if __name__ == "__main__":
    main()
