"""Measurements that do not slow down a run: sums stay on the device until a row is written."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .common import replacing


class StepTimer:
    """Time of a run, divided into waiting for data and everything else.

    Only the host's clock is read. A GPU runs behind the host, which waits for it whenever a row is logged: images per
    second and milliseconds per step are right over a window, while the wait is the host's and may be hidden by the GPU.
    """

    def __init__(self) -> None:
        self.total_s = self.total_wait_s = 0.0
        self.total_steps = 0
        self.pause()

    def watch(self, batches: Iterable) -> Iterator:
        """Yield the same batches, adding up the time spent waiting for each."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self.wait_s += time.perf_counter() - started
            self.steps += 1
            yield batch

    def pause(self) -> None:
        """Discard the time since the last window, which was not spent training."""
        self.wait_s, self.steps, self.since = 0.0, 0, time.perf_counter()

    def window(self, batch_size: int) -> dict[str, float]:
        """Rates over the steps since the last call: images per second; data wait and step time in milliseconds."""
        elapsed = time.perf_counter() - self.since
        self.total_s += elapsed
        self.total_wait_s += self.wait_s
        self.total_steps += self.steps
        rates = {
            "images_per_s": self.steps * batch_size / elapsed,
            "data_wait_ms": 1000 * self.wait_s / self.steps,
            "step_ms": 1000 * elapsed / self.steps,
        }
        self.pause()
        return rates

    def summary(self, batch_size: int) -> tuple[float, float]:
        """Images per second and the share of time spent waiting for data, over all windows."""
        return self.total_steps * batch_size / self.total_s, self.total_wait_s / self.total_s


def communication_s(model: nn.Module) -> float:
    """Seconds per step of gradient averaging that the backward pass did not hide, as sampled by DDP.

    Communication of synchronized batch norm and of the loss is not included.
    """
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    sampled = model._get_ddp_logging_data()  # nanoseconds; absent before the first sample
    exposed = sampled.get("avg_backward_comm_time", 0) - sampled.get("avg_backward_compute_comm_overlap_time", 0)
    return max(exposed, 0) / 1e9


def verdict(waiting: float, communicating: float, faster_step: str) -> str:
    """One sentence on what limited the speed of a run.

    Args:
        waiting: share of the time spent waiting for data, 0 to 1.
        communicating: share of the time spent averaging gradients with nothing else in progress.
        faster_step: what would speed up the step itself.
    """
    if waiting >= 0.05 and waiting >= communicating:
        return (
            f"Data-bound: {waiting:.1%} of the time was spent waiting for data; more --loader.workers, --views.jitter "
            "affine or shards converted with --short-side would help."
        )
    if communicating >= 0.1:
        return (
            f"Communication-bound: {communicating:.1%} of the time was spent averaging gradients with nothing else "
            "in progress; a larger --batch-size or a faster network would help."
        )
    step = 1 - waiting - communicating
    return f"Compute-bound: {step:.1%} of the time was spent in the step itself; {faster_step} would help."


class RunningMeans:
    """Means of named scalars on a device, without waiting for it.

    A metric is a scalar (), or a pair of scalars whose sums are divided: (correct, labeled) gives the accuracy over
    all labeled images of a row, however they are spread over steps and ranks.

    Attributes:
        names: names of the scalars, those of the first `add`; the second of a pair is called <name>/weight.
        sums: (len(names) + 1,) sums of the scalars, then their count; None before the first `add`.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None

    def load(self, names: list[str], sums: torch.Tensor) -> None:
        """Continue with the sums of a checkpoint."""
        self.names, self.sums = list(names), sums

    def add(self, taken: torch.Tensor, **values: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add one value of each metric; nothing if `taken`, () bool, says that the step was skipped."""
        scalars = {}
        for name, value in values.items():
            scalars |= {name: value[0], f"{name}/weight": value[1]} if isinstance(value, tuple) else {name: value}
        row = [value.detach().float() for value in scalars.values()]
        row = torch.stack([*row, torch.ones_like(row[0])])
        if self.sums is None:
            self.names, self.sums = list(scalars), torch.zeros_like(row)
        self.sums = self.sums + torch.where(taken, row, 0)  # nan times 0 would be nan

    def compute_and_reset(self) -> dict[str, torch.Tensor]:
        """Means since the last call, each () on the device; nan if every step was skipped."""
        means = self.sums[:-1] / self.sums[-1]
        self.sums = torch.zeros_like(self.sums)
        return dict(zip(self.names, means.unbind(), strict=True))


def divide_pairs(means: dict[str, float]) -> dict[str, float]:
    """Means on the host with every <name>/weight divided into <name>; nan where the weight is 0."""
    weights = {name: weight for name in means if (weight := means.get(f"{name}/weight")) is not None}
    return {
        name: value if name not in weights else value / weights[name] if weights[name] else math.nan
        for name, value in means.items()
        if not name.endswith("/weight")
    }


class MetricsFile:
    """metrics.jsonl: one JSON object per row, written immediately.

    A run that continues from `step` drops the rows that it wrote after that step and will write again.
    """

    def __init__(self, path: Path, step: int = 0):
        self.damaged = 0
        """Rows of an earlier part that could not be read and were dropped; the last one may be cut short by a kill."""
        self.dropped: list[dict[str, float]] = []
        """Rows of an earlier part that the run will write again."""
        if path.exists():
            *lines, last = path.read_bytes().split(b"\n")
            rows = [(line, _step_of(line)) for line in lines if line]
            self.damaged = sum(at is None for _, at in rows)
            rows = [(line, at) for line, at in [*rows, (last, _step_of(last))] if at is not None]
            kept = [line for line, at in rows if at <= step]
            self.dropped = [json.loads(line) for line, at in rows if at > step]
            with replacing(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        self.file = path.open("a", buffering=1)

    def write(self, **row: float) -> None:
        def known(value: float) -> float | None:
            return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no nan or inf

        self.file.write(json.dumps({name: known(value) for name, value in row.items()}) + "\n")

    def close(self) -> None:
        self.file.close()


def _step_of(line: bytes) -> float | None:
    """Step of a row; infinite for the table at the end of a run, None for a damaged row."""
    try:
        row = json.loads(line)
        return math.inf if "features" in row else float(row["step"])
    except (ValueError, KeyError, TypeError):
        return None
