"""What a run would cost, measured on its first steps."""

import time

import torch
from rich.table import Table
from torch import nn

from .environment import peak_resident_mb

STEPS = 6
"""Steps of a dry run. The first one fills buffers, and compiles, so it is not timed."""


class DryRun:
    """Timing of a run's first steps, on real batches, without anything that is kept.

    Args:
        module: network whose children are counted.
        device: device of the network.
        steps_per_epoch, epochs: size of the whole run.
    """

    def __init__(self, module: nn.Module, device: torch.device, steps_per_epoch: int, epochs: int):
        self.module, self.device, self.steps_per_epoch, self.epochs = module, device, steps_per_epoch, epochs
        self.times_s: list[float] = []

    def step(self) -> bool:
        """Note the end of a step; True after the last one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times_s.append(time.perf_counter())
        return len(self.times_s) == min(STEPS, self.steps_per_epoch * self.epochs)

    def table(self, batch_size: int) -> Table:
        """Parameters, memory and time, to be printed."""
        table = Table("dry run", "", show_header=False)
        for name, child in self.module.named_children():
            if count := sum(parameter.numel() for parameter in child.parameters()):
                table.add_row(f"parameters of {name}", f"{count:,}")
        memory = "GPU" if self.device.type == "cuda" else "process"
        table.add_row(f"peak memory of the {memory}", f"{self.peak_mb():,.0f} MB")
        table.add_row("steps per epoch", f"{self.steps_per_epoch:,}")
        if len(self.times_s) > 1:
            step_s = (self.times_s[-1] - self.times_s[0]) / (len(self.times_s) - 1)
            table.add_row("time per step", f"{1000 * step_s:,.0f} ms ({batch_size / step_s:,.0f} images/s)")
            table.add_row("time per epoch", duration(step_s * self.steps_per_epoch))
            table.add_row(f"time of {self.epochs} epochs", duration(step_s * self.steps_per_epoch * self.epochs))
        return table

    def peak_mb(self) -> float:
        """Largest memory so far: allocated on the GPU, or resident on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return peak_resident_mb()


def duration(seconds: float) -> str:
    """Seconds as "8.2 s", "4 min 10 s", "3 h 05 min" or "12 d 02 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, min = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02d} h"
    return f"{hours} h {min:02d} min" if hours else f"{minutes} min {s:02d} s"
