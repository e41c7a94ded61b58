"""Learning rates as functions of the step."""

import math


def peak_learning_rate(base: float, batch_size: int, scaling: str) -> float:
    """The learning rate after warm-up for a global batch of `batch_size` (arXiv 2002.05709, appendix B.1).

    Args:
        base: 0.3 in the paper with "linear" scaling, 0.075 with "sqrt"; the rate itself with "none".
        scaling: "linear": base * B / 256. "sqrt": base * sqrt(B). "none": base.
    """
    if scaling == "linear":
        return base * batch_size / 256
    return base * math.sqrt(batch_size) if scaling == "sqrt" else base


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, peak: float) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine to 0 at `total_steps`, no restarts."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
