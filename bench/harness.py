"""Helpers of all benchmarks: timing on a noisy machine, and rows of a committed CSV."""

import csv
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch

from common import available_cores, replacing
from engine.environment import device_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
TURN_S = 0.02
"""Seconds of a turn on a GPU: launches of a few microseconds are hidden behind the kernels of earlier calls."""


def environment(device: torch.device) -> dict[str, str | int]:
    """Columns that describe where a row was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": available_cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class SteadyState:
    """Function that consumes a stream of batches; only the time between two of its batches counts.

    When the clock starts, threads run, memory is allocated, and batches prepared ahead are used up. At both ends the
    next batches are in preparation, so the work in between is that of `count` batches.

    Args:
        start: starts the stream; closing the generator must end all that the stream has started.
        skipped: number of batches before the clock starts, more than the stream prepares ahead.
        count: number of batches to time.
        device: device of the batches.
    """

    def __init__(self, start: Callable[[], Generator], skipped: int, count: int, device: torch.device):
        self.start, self.skipped, self.count, self.device = start, skipped, count, device

    def __call__(self) -> None:
        self.seconds()

    def seconds(self) -> float:
        """Seconds for `count` batches; like a training step, the consumer holds each one until it has the next."""
        batches = self.start()
        try:
            for _ in islice(batches, self.skipped):
                pass
            self._synchronize()
            started = time.perf_counter()
            for _ in islice(batches, self.count):
                pass
            self._synchronize()
            return time.perf_counter() - started
        finally:
            batches.close()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interleave(
    functions: dict[str, Callable[[], object]], seconds: float, device: torch.device, shuffled: bool = False
) -> dict[str, list]:
    """Time functions in turns, so that a slow moment of the machine affects all of them.

    On a GPU a turn is as many calls as fill `TURN_S`, between two events: a single call that waits for the device would
    measure launches and the wait.

    Args:
        functions: name -> function to time; each is called before, as a warm-up. A `SteadyState` is timed by its own
            clock, one call per turn.
        seconds: approximate total time; every function is timed at least three times.
        device: device that the functions use.
        shuffled: whether every round has another order. In a fixed one, a function always runs on the caches that the
            same predecessor left, which doubles the time of a call of a millisecond or halves it.

    Returns:
        Name -> seconds per call of every turn.
    """
    for function in functions.values():
        function()
    calls = {name: calls_per_turn(function, device) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, random = list(functions), Random(0)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(next(iter(times.values()))) < 3:
        if shuffled:
            random.shuffle(order)
        for name in order:
            times[name].append(seconds_per_call(functions[name], calls[name], device))
    return times


def seconds_per_call(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean seconds of `calls` calls in a row; on a GPU by events on the current stream."""
    if isinstance(function, SteadyState):
        return function.seconds()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / calls


def replay_of(create: Callable[[], Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """Record the function that `create` returns as a CUDA graph, and return its replay, without the time of launches.

    Args:
        create: called on the stream of the recording, because a backward pass runs on the stream of its forward pass.
        device: where the function runs; on a CPU the function itself is returned.
    """
    if device.type != "cuda":
        return create()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function = create()
        for _ in range(3):  # compiles kernels, which a recording does not allow
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return lambda recorded=function: graph.replay()  # which reads what `function` holds


def calls_per_turn(function: Callable[[], object], device: torch.device) -> int:
    """Number of calls that fill `TURN_S` on a GPU, at most 1000; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    return min(1000, max(1, math.ceil(TURN_S / seconds_per_call(function, 1, device))))


def run_module(module: str, argument: Any, out: Path) -> dict[str, Any]:
    """Run `python -m module ARGUMENT OUT` in a new process, so that runs share neither threads, memory nor caches.

    Args:
        argument: a dataclass or a list, which the process receives as JSON.
        out: second argument, a path for what the process writes.

    Returns:
        The JSON object in the last line that the process prints.
    """
    command = [sys.executable, "-m", module, json.dumps(argument, default=asdict), str(out)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        "p20_ms": round(1000 * cuts[1], 4),
        "median_ms": round(1000 * statistics.median(seconds), 4),
        "p80_ms": round(1000 * cuts[7], 4),
        "runs": len(seconds),
    }


def show(rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print these columns of the rows as a table."""
    from rich.console import Console  # not at the top: a GPU machine may lack it
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console().print(table)


def csv_name(name: str, device: torch.device) -> str:
    """Name of a benchmark's CSV: GPUs have their own, so that their rows do not replace those that documents quote."""
    return name if device.type == "cpu" else f"{name}_{device.type}"


def launch(script: str, *arguments: str, folder: Path, out: str) -> tuple[float, list[dict[str, Any]]]:
    """Run `accelerate launch SCRIPT` in `folder`; returns its seconds and the rows of the metrics in OUT."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / script), *arguments, "--out", out]
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    wall_s = time.perf_counter() - started
    return wall_s, read_metrics(folder / out)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_rows(name: str, rows: list[dict], folder: Path | None = None) -> Path:
    """Write `rows` to NAME.csv in `folder`, bench/results by default; columns missing in a row are empty."""
    folder = folder or RESULTS
    path = folder / f"{name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with replacing(path) as part, part.open("w", newline="") as file:  # an interruption must not destroy earlier rows
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(name: str, folder: Path | None = None) -> list[dict[str, str]]:
    """Rows of NAME.csv in `folder`, bench/results by default; none if there is no such file."""
    path = (folder or RESULTS) / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
