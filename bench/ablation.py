"""Remedies for small batches and small data sets: the same small run, with one change at a time.

    python -m bench.ablation                                   the built-in textures: 63 runs of 50 epochs
    python -m bench.ablation --data SHARDS --epochs 100        other images, with labels and a test split
    python -m bench.ablation --seeds 0 --batches 64            some of the runs

Every change is compared with the unchanged run of the same batch size and seed on the same kind of machine, which has
the same initial weights and sees the same images in the same order. AdamW's learning rate grows with the square root of
the batch size (arXiv 2205.10287), so that one recipe suits all of them; crops and grayscale are those of the paper
(arXiv 2002.05709).
`--processes` runs at a time train on one thread each. A row is added to bench/results/ablation.csv as each run ends,
and runs that are there already are skipped, so the same command continues a table that was interrupted. At the end,
the table of docs/training.md is filled from all rows.
"""

import argparse
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import RESULTS, environment, read_rows, run_module, write_rows
from common import UserError, check_range
from config import PretrainConfig
from engine.environment import device_name
from evaluation.store import eval_splits
from pipeline.data import open_data
from pipeline.loader import LoaderConfig
from presets import PRETRAIN, parse

RECIPE = shlex.split(
    "--precision fp32 --encoder.name resnet18 --encoder.width 0.25 --encoder.stem standard --head.hidden 128 "
    "--head.out 64 --loss.temperature 0.2 --optim.name adamw --optim.lr 5.3e-4 --optim.scaling sqrt "
    "--optim.weight-decay 1e-4 --optim.warmup-epochs 5 --views.size 32 --views.crop-area 0.08 1 --views.gray-p 0.2 "
    "--views.blur-p 0"
)
"""Options of every run. At a batch size of 128, the learning rate is 0.006, found by short runs on the textures."""
TEXTURES = ["--preset", "textures", "--views.jitter-strength", "1"]
PHOTOGRAPHS = ["--preset", "cifar10", "--views.jitter-strength", "0.5"]
"""Options for the built-in textures and for other images, with the jitter of the paper for CIFAR-10 (appendix B.9)."""
BASE = "base"
CHANGES = {
    BASE: [],
    "decoupled loss": ["--loss.decoupled"],
    "learned temperature": ["--loss.learn-temperature"],
    "queue of 1024": ["--loss.queue", "1024"],
    "queue of 4096": ["--loss.queue", "4096"],
    "gray 0.1": ["--views.gray-p", "0.1"],
    "crops from 0.2": ["--views.crop-area", "0.2", "1"],
}
"""Name of a change -> its options."""
SETTING = ("data", "images", "epochs", "encoder", "device", "recipe", "images_sha256")
"""Columns in which rows must agree to be compared."""
Rows = list[dict[str, str]]
console = Console()


class Run(NamedTuple):
    """One training of a setting."""

    seed: int
    batch: int
    change: str


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        data: --data of train.py; "" for the built-in textures.
        name: name of the images.
        images: number of training images.
        sha256: start of the checksum of the training images.
    """

    data: str
    name: str
    images: int
    sha256: str
    epochs: int

    @property
    def recipe(self) -> list[str]:
        """Options of train.py without those of a single run."""
        return [*(PHOTOGRAPHS if self.data else TEXTURES), *RECIPE]

    def arguments(self, run: Run) -> list[str]:
        """Command line of train.py for a run."""
        data = ["--data", self.data] if self.data else []
        numbers = {"--epochs": self.epochs, "--batch-size": run.batch, "--seed": run.seed}
        given = [word for option, number in numbers.items() for word in (option, str(number))]
        return [*self.recipe, *CHANGES[run.change], *data, *given]

    def config(self, run: Run) -> PretrainConfig:
        """Configuration of a run.

        Raises:
            UserError: a number is out of range, or the batch exceeds the images.
        """
        if run.batch > self.images:
            raise UserError(f"Batches of {run.batch} exceed the {self.images} images; use smaller --batches.")
        return parse(PRETRAIN, self.arguments(run), prog="train.py")

    def columns(self, run: Run) -> dict[str, Any]:
        """Columns that identify a run in the CSV."""
        encoder = self.config(run).encoder
        return {
            "data": self.name,
            "images": self.images,
            "epochs": self.epochs,
            "encoder": f"{encoder.name} x {encoder.width:g}, {encoder.stem} stem",
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "recipe": shlex.join(self.recipe),
            "images_sha256": self.sha256,
            **run._asdict(),
        }


def open_setting(data: str, epochs: int) -> Setting:
    """Open the images.

    Raises:
        UserError: they can't be read, or there are no labeled test images.
    """
    train, test = open_data(data, LoaderConfig())
    eval_splits(train, test, labeled=True)
    if data and Path(data).exists():  # runs start in the folder of this project
        data = str(Path(data).resolve())
    return Setting(data, train.manifest.get("name", train.root), len(train), train.checksum[:16], epochs)


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    """What two rows of the same run have in common."""
    return tuple(str(row[name]) for name in (*SETTING, *Run._fields))


def train_in_a_process(arguments: list[str]) -> dict[str, float]:
    """Scores of one run of train.py, see `bench.scored_run`."""
    with tempfile.TemporaryDirectory() as folder:
        return run_module("bench.scored_run", arguments, Path(folder, "run"))


def measure(
    setting: Setting,
    runs: Iterable[Run],
    processes: int,
    train: Callable[[list[str]], dict[str, float]] = train_in_a_process,
) -> list[Run]:
    """Train the runs that ablation.csv lacks, `processes` at a time, and add a row as each ends.

    Args:
        train: returns `knn_top1` and `linear_top1` for a command line of train.py.

    Returns:
        Runs that failed, such as those that diverged; the others are trained nevertheless.
    """
    known = {identity(row) for row in read_rows("ablation")}
    missing = {run: row for run in runs if identity(row := setting.columns(run)) not in known}
    device, failed = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    with ThreadPoolExecutor(processes) as pool:
        started = {pool.submit(train, setting.arguments(run)): run for run in missing}
        try:
            for number, ended in enumerate(as_completed(started), 1):
                run, result = started[ended], "failed"
                try:
                    found = {name: round(score, 4) for name, score in ended.result().items()}
                    row = environment(device) | {"threads": 1} | missing[run] | found
                    write_rows("ablation", [*read_rows("ablation"), row])
                    result = f"kNN {found['knn_top1']:.3f}, linear {found['linear_top1']:.3f}"
                except subprocess.CalledProcessError:  # its process has printed the reason
                    failed.append(run)
                console.print(f"{number}/{len(missing)} {run.change}, batch {run.batch}, seed {run.seed}: {result}")
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, no further run starts
    return failed


class Effect(NamedTuple):
    """Accuracy of a change at one batch size in percent, over the seeds that it shares with the base."""

    seeds: int
    mean: float
    difference: float
    """Mean difference to the base with the same seed, in points."""
    error: float
    """Standard error of the difference; nan for a single seed."""


def effects(rows: Rows, score: str) -> dict[tuple[str, int], Effect]:
    """Effect of each change at each batch size, by both.

    Args:
        rows: rows of one setting.
        score: `knn_top1` or `linear_top1`.
    """
    percent: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        percent[row["change"], int(row["batch"])][row["seed"]] = 100 * float(row[score])
    found = {}
    for (change, batch), own in percent.items():
        base = percent.get((BASE, batch), {})
        if seeds := own.keys() & base.keys():
            differences = [own[seed] - base[seed] for seed in seeds]
            error = statistics.stdev(differences) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
            mean = statistics.fmean(own[seed] for seed in seeds)
            found[change, batch] = Effect(len(seeds), mean, statistics.fmean(differences), error)
    return found


def by_setting(rows: Rows) -> dict[tuple[str, ...], Rows]:
    """Rows that may be compared, by their columns `SETTING`."""
    groups: dict[tuple[str, ...], Rows] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in SETTING)].append(row)
    return groups


def shown(effect: Effect) -> str:
    """The difference to the base and its standard error, such as "+1.3 ± 0.4"."""
    return f"{effect.difference:+.1f}" + ("" if math.isnan(effect.error) else f" ± {effect.error:.1f}")


def show(rows: Rows) -> None:
    """Print mean accuracy and difference to the base of every change; `rows` are those of one setting."""
    knn, linear = (effects(rows, score) for score in ("knn_top1", "linear_top1"))
    table = Table("change", "batch", "seeds", "kNN, %", "difference", "linear, %", "difference")
    for batch, change in product(sorted({batch for _, batch in knn}), CHANGES):
        if (change, batch) in knn:
            both = [found[change, batch] for found in (knn, linear)]
            cells = [cell for effect in both for cell in (f"{effect.mean:.1f}", shown(effect))]
            table.add_row(change, str(batch), str(both[0].seeds), *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="shards or images with labels and a test split (default: textures)")
    parser.add_argument("--epochs", type=int, default=50, help="epochs of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 512], help="default: 64 128 512")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        check_range("--processes", arguments.processes, 1, 1024)
        setting = open_setting(arguments.data, arguments.epochs)
        runs = [Run(*run) for run in product(arguments.seeds, arguments.batches, CHANGES)]  # a whole seed first
        failed = measure(setting, runs, arguments.processes)
    except UserError as error:
        sys.exit(str(error))
    columns = setting.columns(runs[0])
    show(by_setting(read_rows("ablation"))[tuple(str(columns[name]) for name in SETTING)])
    from bench.plot import fill_ablation_table  # not at the top: it imports this module, and matplotlib

    console.print(f"written: {RESULTS / 'ablation.csv'} and {fill_ablation_table()}")
    if failed:
        sys.exit(f"{len(failed)} runs failed; the same command tries them again.")


if __name__ == "__main__":
    main()
