"""Helpers of all benchmarks: timing on a noisy machine, and rows of a committed CSV."""

import csv
import datetime
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import available_cores
from engine.environment import device_name

RESULTS = Path(__file__).parent / "results"


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


def interleave(functions: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, list]:
    """Time functions in turns, so that a slow moment of the machine affects all of them.

    Args:
        functions: name -> function to time; each is called once before, as a warm-up.
        seconds: approximate total time; every function is timed at least three times.
        device: device that the functions use.

    Returns:
        Name -> seconds of every call.
    """

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for function in functions.values():
        function()
    finish()
    times: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(next(iter(times.values()))) < 3:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            finish()
            times[name].append(time.perf_counter() - start)
    return times


def peak_resident_mb() -> float:
    """Peak resident memory of this process in MB.

    getrusage's ru_maxrss is only a fallback: on Linux it starts at the peak of the parent process.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        "p20_ms": round(1000 * cuts[1], 4),
        "median_ms": round(1000 * statistics.median(seconds), 4),
        "p80_ms": round(1000 * cuts[7], 4),
        "runs": len(seconds),
    }


def write_rows(name: str, rows: list[dict]) -> Path:
    """Write `rows` to bench/results/NAME.csv; columns missing in a row are empty."""
    path = RESULTS / f"{name}.csv"
    RESULTS.mkdir(exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(name: str) -> list[dict[str, str]]:
    """Rows of bench/results/NAME.csv."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))
