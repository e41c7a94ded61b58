"""Time and memory of a training step, part by part, compared with lightly and a plain PyTorch loop.

    python -m bench.train_step                    write bench/results/train_step.csv
    python -m bench.train_step stl10 memory       measure these settings only and replace their rows in the CSV
    python -m bench.train_step --quick            one round of few steps; no file is written
    make bench                                    installs lightly first

All trainers use the same encoder on the same images, and every run is a new process that has all cores. Ours runs its
preset unchanged (optimizer, probe, guard and metrics included), the peers run as in `bench/trainers.py`, with SGD.
Trainers take turns, and a ratio is the median over the rounds, so that a slow moment of the machine affects both sides.
The first round tries several numbers of DataLoader workers for the peers; later rounds keep the fastest. Measured steps
start and end while batches are being prepared: no batch was prepared in advance whose cost is not measured. "same
batch" is the step without data loading, on views in memory. `memory` is a batch of 4096 in slices: train.py
--micro-batch. `resident` is our trainer from its second epoch on, with images that are resident, with images that are
read and decoded in every epoch, and on the same batch.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.harness import csv_name, environment, read_rows, run_module, write_rows
from bench.pipeline import encode, photograph
from bench.trainers import PARTS, Turn
from common import available_cores
from engine.session import computes_in_bf16
from pipeline.convert import textures
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.images.files import decode

AHEAD = 5
"""Largest number of batches that a loader prepares in advance; as many must follow the measured ones."""
console = Console()


@dataclass(frozen=True)
class Setting:
    """Training options and images of a measurement."""

    arguments: list[str]
    """Arguments of train.py, except --data."""
    batch: int
    """Global batch size in images."""
    image: Callable[[int], bytes]
    """Number of an image -> its encoded file."""
    warm: int
    """Warm-up steps, which are not measured."""
    steps: int
    """Measured steps."""


def texture(number: int) -> bytes:
    """A texture of 40 x 40 pixels."""
    return textures.render(0, "train", number)


@cache
def tiles(number: int) -> list[bytes]:
    """20 tiles of a rendered photograph, 96 x 96 as the images of STL-10."""
    pixels = decode(photograph(number))[..., ::-1]
    height, width = pixels.shape[:2]
    corners = [(y, x) for y in range(0, height - 95, 96) for x in range(0, width - 95, 96)]
    return [encode(np.ascontiguousarray(pixels[y : y + 96, x : x + 96])) for y, x in corners]


def tile(number: int) -> bytes:
    return tiles(number // 20)[number % 20]


@cache
def one_of_many_photographs(number: int) -> bytes:
    return photograph(number % 100)


SETTINGS = {
    "textures": Setting(["--preset", "textures"], 128, texture, warm=10, steps=40),
    "cifar10": Setting(["--preset", "cifar10"], 64, texture, warm=2, steps=5),
    "stl10": Setting(["--preset", "stl10"], 64, tile, warm=3, steps=8),
    "imagenet": Setting(["--preset", "imagenet"], 16, one_of_many_photographs, warm=2, steps=4),
}
"""The presets, with batches that take a CPU a second or a few; they differ in the cost of data and of the step."""
GPU_BATCHES = {"textures": 128, "cifar10": 512, "stl10": 256, "imagenet": 256}
"""Batches that occupy one GPU."""
MEMORY = Setting(["--preset", "cifar10", "--loader.prefetch", "1"], 4096, texture, warm=1, steps=1)
SLICES = ((4096, 64), (128, 0))
"""(batch size, --micro-batch)."""
EPOCH = 120
"""Steps of an epoch of `RESIDENT`; the first one fills the memory, the third provides batches to prepare ahead."""
RESIDENT = Setting(["--preset", "textures", "--epochs", "3"], 128, texture, warm=EPOCH + 5, steps=EPOCH - 5)
SOURCES = {"images": "off", "resident": "on", "same batch": "off"}
"""Source of the views -> --loader.resident."""


def make_images(folder: Path, setting: Setting, count: int) -> None:
    """Write `count` images into class folders (folder/images) and as shards (folder/train)."""
    for number in range(count):
        place = folder / "images" / textures.CLASSES[number % 10]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").write_bytes(setting.image(number))
    write_split(folder_source(folder / "images"), folder, "train")


def precisions(device: torch.device) -> tuple[str, ...]:
    """bf16 only where the hardware multiplies in it: emulated, it is slower than fp32, and nobody would train so."""
    return ("bf16", "fp32") if computes_in_bf16(device) else ("fp32",)


def contestants(setting: Setting, folder: Path, device: torch.device) -> list[Turn]:
    """Turns of all trainers in every precision, with and without data loading; peers with every number of workers."""
    arguments = [*setting.arguments, "--data", str(folder), "--batch-size", str(setting.batch)]
    cores = available_cores()
    peers = ["plain", *(["lightly"] if find_spec("lightly") else [])]
    first = Turn("ours", "fp32", "images", arguments, str(folder / "images"), 0, setting.warm, setting.steps)
    turns = []
    for precision in precisions(device):
        for source in ("images", "same batch"):
            turns.append(replace(first, precision=precision, source=source))
            for peer in peers:
                counts = sorted({0, 1, max(1, cores // 2), cores}) if source == "images" else [1]
                turns += [replace(turns[-1], trainer=peer, workers=count) for count in counts]
    return turns


def in_a_process(turn: Turn, folder: Path) -> dict:
    """Run `bench.trainers.take_turn` in a new process."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        return run_module("bench.trainers", turn, Path(out, "run"))


def in_turns(turns: list[Turn], take: Callable[[Turn], dict], seconds: float) -> list[tuple[Turn, list[dict]]]:
    """Measure in rounds, as many as `seconds` allow and at least one; later rounds keep the peers' best workers."""
    started_all = time.perf_counter()
    fastest: dict[tuple[str, ...], tuple[Turn, list[dict]]] = {}
    for turn in turns:
        who, result = (turn.trainer, turn.precision, turn.source), take(turn)
        if who not in fastest or step_ms(result) < step_ms(fastest[who][1][0]):
            fastest[who] = (turn, [result])
    kept = list(fastest.values())
    last_s = 0.0
    while (started := time.perf_counter()) - started_all + last_s < seconds:
        for turn, results in kept:
            results.append(take(turn))
        last_s = time.perf_counter() - started
    return kept


def step_ms(result: dict) -> float:
    """Mean milliseconds of a step; not the median, because batches may arrive in bursts."""
    return statistics.mean(sum(step.values()) for step in result["steps_ms"])


def rows_of(name: str, setting: Setting, measured: list[tuple[Turn, list[dict]]], device: torch.device) -> list[dict]:
    """One row per turn: parts of its median round, which add up to the step, and ratios over all rounds."""
    times = {(t.trainer, t.precision, t.source): [step_ms(result) for result in results] for t, results in measured}
    rows = []
    for turn, results in measured:
        own = times[turn.trainer, turn.precision, turn.source]
        middle = results[own.index(statistics.median_low(own))]
        parts = {part: statistics.mean(step[part] for step in middle["steps_ms"]) for part in PARTS}
        row = environment(device) | {"threads": available_cores()}
        row |= {"setting": name, "batch": setting.batch, "source": turn.source, "trainer": turn.trainer}
        row |= {"precision": turn.precision, "workers": turn.workers, "micro_batch": micro_batch(turn)}
        row |= {"rounds": len(own), "steps": turn.steps}
        row |= {"images_per_s": round(1000 * setting.batch / step_ms(middle), 2), "step_ms": round(step_ms(middle), 3)}
        row |= {f"{part}_ms": round(ms, 3) for part, ms in parts.items()}
        row |= {"peak_mb": round(max(result["peak_mb"] for result in results))}
        for column, *other in (
            ("ratio_to_lightly_fp32", "lightly", "fp32", turn.source),
            ("ratio_to_lightly", "lightly", turn.precision, turn.source),
            ("ratio_to_plain", "plain", turn.precision, turn.source),
            ("ratio_to_loaded", turn.trainer, turn.precision, "images"),
            ("ratio_to_same_batch", turn.trainer, turn.precision, "same batch"),
        ):
            theirs = times.get(tuple(other))
            row[column] = theirs and round(statistics.median(t / o for t, o in zip(theirs, own, strict=True)), 3)
        rows.append(row)
    return rows


def micro_batch(turn: Turn) -> int:
    return int(dict(pairwise(turn.arguments)).get("--micro-batch", "0"))


def measure(name: str, setting: Setting, seconds: float, device: torch.device) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        ahead = max(AHEAD, 2 * available_cores())  # a DataLoader prepares two batches per worker
        make_images(Path(folder), setting, (setting.warm + setting.steps + ahead) * setting.batch)
        turns = contestants(setting, Path(folder), device)
        return rows_of(name, setting, in_turns(turns, lambda turn: in_a_process(turn, Path(folder)), seconds), device)


def measure_memory(device: torch.device) -> list[dict]:
    """Peak memory of our trainer only; an epoch is one step, so that it includes writing a checkpoint."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), MEMORY, MEMORY.batch)
        for batch, at_a_time in SLICES:
            setting = replace(MEMORY, batch=batch)
            arguments = [*setting.arguments, "--epochs", "2", "--micro-batch", str(at_a_time)]
            turns = contestants(replace(setting, arguments=arguments), Path(folder), device)
            turn = next(t for t in turns if (t.trainer, t.source) == ("ours", "images"))
            rows += rows_of("memory", setting, [(turn, [in_a_process(turn, Path(folder))])], device)
    return rows


def measure_resident(setting: Setting, epoch: int, seconds: float, device: torch.device) -> list[dict]:
    """Our trainer with resident images and without, in turns, on `epoch` batches of images.

    Raises:
        RuntimeError: their losses differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), setting, epoch * setting.batch)
        ours = [t for t in contestants(setting, Path(folder), device) if (t.trainer, t.source) == ("ours", "images")]
        turns = [
            replace(turn, source=source, arguments=[*turn.arguments, "--loader.resident", resident])
            for turn in ours
            for source, resident in SOURCES.items()
        ]
        measured = in_turns(turns, lambda turn: in_a_process(turn, Path(folder)), seconds)
    for precision in precisions(device):
        ours = [results for turn, results in measured if turn.precision == precision and turn.source != "same batch"]
        losses = {result["loss"] for results in ours for result in results}
        if len(losses) > 1:
            raise RuntimeError(f"resident images changed the loss in {precision}: {sorted(losses)}")
    return rows_of("resident", setting, measured, device)


def measure_setting(name: str, seconds: float, quick: bool, device: torch.device) -> list[dict]:
    """Rows of one of the settings, of "memory" or of "resident"."""
    if name == "memory":
        return measure_memory(device)
    if name == "resident":
        return measure_resident(RESIDENT, EPOCH, seconds, device)
    setting = SETTINGS[name]
    if device.type == "cuda":
        setting = replace(setting, batch=GPU_BATCHES[name], warm=10, steps=30)
    if quick:
        setting = replace(setting, warm=1, steps=2)
    return measure(name, setting, seconds, device)


def show(rows: list[dict]) -> None:
    """Print two tables: the speed of every trainer, and the parts of its step."""
    who = {"setting": "setting", "source": "source", "trainer": "trainer", "precision": ""}
    ratios = {f"ratio_to_{name}": f"of {name}" for name in ("lightly_fp32", "lightly", "plain", "loaded", "same_batch")}
    speed = who | {"micro_batch": "slices", "workers": "workers", "images_per_s": "images/s"} | ratios
    parts = who | {"step_ms": "step, ms"} | {f"{part}_ms": part for part in PARTS} | {"peak_mb": "MB"}
    for columns in (speed, parts):
        table = Table(*(name.replace("_", " ") for name in columns.values()))
        for row in rows:
            rounded = {c: round(v) if c.endswith("_ms") else v for c, v in row.items() if c in columns}
            table.add_row(*("" if rounded[c] is None else str(rounded[c]) for c in columns))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*SETTINGS, "memory", "resident"]
    parser.add_argument("settings", nargs="*", help=f"{', '.join(everything)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="one round of few steps; no file is written")
    parser.add_argument("--seconds", type=float, default=900, help="approximate time for each setting (default: 900)")
    arguments = parser.parse_args()
    chosen = arguments.settings or everything
    if unknown := set(chosen) - set(everything):
        sys.exit(f"There is no setting {min(unknown)!r}; use {', '.join(everything)}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds, rows, failed = 0 if arguments.quick else arguments.seconds, [], []
    for name in chosen:
        console.print(f"{name} ...")
        try:
            new = measure_setting(name, seconds, arguments.quick, device)
        except (subprocess.CalledProcessError, RuntimeError) as error:  # a process has printed its reason
            console.print(error)
            failed.append(name)
            continue
        rows += new
        if not arguments.quick:  # now, because the next one may fail
            table = csv_name("train_step", device)
            others = [row for row in read_rows(table) if row["setting"] != name]
            path = write_rows(table, sorted(others + new, key=lambda row: everything.index(row["setting"])))
    show(rows)
    if rows and not arguments.quick:
        console.print(f"written: {path}")
    if not find_spec("lightly"):
        console.print("lightly is not installed, so it was not measured; `make bench` installs it.")
    if failed:
        sys.exit(f"{' and '.join(failed)} failed; the reasons are above.")


if __name__ == "__main__":
    main()
