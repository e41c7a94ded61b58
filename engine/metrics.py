"""Measuring a run without slowing it: sums stay on the device until a row is written."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch


class StepClock:
    """Where the time of a run goes: waiting for data, and everything else.

    It reads the host's clock only. A GPU works behind the host, which catches up whenever a row is logged: images per
    second and milliseconds per step are right for a window, while the wait is the host's and can hide behind the GPU.
    """

    def __init__(self) -> None:
        self.total_s = self.total_wait_s = 0.0
        self.total_steps = 0
        self._reset()

    def _reset(self) -> None:
        self.wait_s, self.steps, self.since = 0.0, 0, time.perf_counter()

    def watch(self, batches: Iterable) -> Iterator:
        """The same batches, with the time spent waiting for each added up."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self.wait_s += time.perf_counter() - asked
            self.steps += 1
            yield batch

    def pause(self) -> None:
        """Forget the time since the last window: it went into something that is not training."""
        self._reset()

    def window(self, batch_size: int) -> dict[str, float]:
        """Figures of the steps since the last call: images per second, wait and whole step in milliseconds."""
        elapsed = time.perf_counter() - self.since
        self.total_s += elapsed
        self.total_wait_s += self.wait_s
        self.total_steps += self.steps
        figures = {
            "images_per_s": self.steps * batch_size / elapsed,
            "data_wait_ms": 1000 * self.wait_s / self.steps,
            "step_ms": 1000 * elapsed / self.steps,
        }
        self._reset()
        return figures

    def summary(self, batch_size: int) -> tuple[float, float]:
        """Images per second and the share of time waiting for data, over all windows."""
        return self.total_steps * batch_size / self.total_s, self.total_wait_s / self.total_s


class RunningMeans:
    """Means of scalars that live on a device; nothing is brought to the host before `take`."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None
        self.count = 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What `take` has not taken yet."""
        return {} if self.sums is None else {"sums": self.sums, "count": torch.tensor(self.count)}

    def load_state_dict(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        if state:
            self.sums, self.count = state["sums"].to(device), int(state["count"])

    def add(self, *values: torch.Tensor) -> None:
        row = torch.stack([value.detach().float() for value in values])
        self.sums = row if self.sums is None else self.sums + row
        self.count += 1

    def take(self, *also: float) -> torch.Tensor:
        """The means since the last call, then `also` as they are, still on the device."""
        means, self.sums, self.count = self.sums / self.count, None, 0
        return torch.cat([means, means.new_tensor(also)])


class MetricsFile:
    """metrics.jsonl: one JSON object per row, written out at once.

    A run that goes on from `step` drops the rows that it wrote after it and will write again.
    """

    def __init__(self, path: Path, step: int = 0):
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if _is_of_run_until(line, step)]
            beside = path.with_name(f".{path.name}.partial")
            beside.write_text("".join(f"{row}\n" for row in rows))
            os.replace(beside, path)
        self.file = path.open("a", buffering=1)

    def write(self, **row: float) -> None:
        self.file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self.file.close()


def _is_of_run_until(line: str, step: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # cut short by a kill
        return False
    return row["step"] <= step and "features" not in row  # the table comes at the end of a run
