"""Learning rate schedules."""

import math
from collections.abc import Callable
from functools import partial

from .optim import OptimConfig


def peak_learning_rate(base: float, batch_size: int, scaling: str) -> float:
    """Learning rate after warm-up for a global batch of `batch_size` images (arXiv 2002.05709, appendix B.1).

    Args:
        base: 0.3 in the paper with "linear" scaling, 0.075 with "sqrt"; the learning rate itself with "none".
        scaling: "linear": base * B / 256. "sqrt": base * sqrt(B). "none": base.
    """
    if scaling == "linear":
        return base * batch_size / 256
    return base * math.sqrt(batch_size) if scaling == "sqrt" else base


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, peak: float) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine to 0 at `total_steps`, without restarts."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def create_schedule(config: OptimConfig, batch_size: int, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning rate as a function of the step; the only place where epochs become steps.

    Warm-up takes at most a tenth of the run.
    """
    return partial(
        warmup_cosine,
        warmup_steps=round(min(config.warmup_epochs, epochs / 10) * steps_per_epoch),
        total_steps=epochs * steps_per_epoch,
        peak=peak_learning_rate(config.lr, batch_size, config.scaling),
    )
