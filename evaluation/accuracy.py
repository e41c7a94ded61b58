"""Top-1 and top-5 accuracy of class scores, with confidence intervals over test images and over seeds."""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor


def classes_ahead(scores: Tensor, label: Tensor) -> Tensor:
    """Number of classes ranked ahead of the true class; among equal scores the lower class ranks first.

    A prediction is correct at top-n if this is below n. A true class whose score is NaN ranks behind all classes, so it
    is never correct: comparisons with NaN are false, and counting the higher scores would rank it first.

    Args:
        scores: (m, C) float.
        label: (m,) int64, the true classes.

    Returns:
        (m,) int64.
    """
    own = scores.gather(1, label[:, None])  # (m, 1)
    not_lower = torch.arange(scores.shape[1], device=scores.device) >= label[:, None]
    behind = (own > scores) | ((own == scores) & not_lower)  # includes the true class itself
    return scores.shape[1] - behind.sum(1)


def count_correct(ahead: Tensor, classes: int) -> Tensor:
    """Number of samples that are correct at top-1 and at top-5, (2,) int64.

    Args:
        ahead: (m,) int64, see `classes_ahead`.
        classes: number of classes; top-5 becomes top-C where there are fewer than five.
    """
    return torch.stack([(ahead < 1).sum(), (ahead < min(5, classes)).sum()])


def scores(correct: Sequence[int], total: int) -> dict[str, Any]:
    """Accuracies `top1` and `top5` and the interval `top1_wilson_95`.

    Args:
        correct: number of test images that are correct at top-1 and at top-5.
        total: number of test images.
    """
    return {"top1": correct[0] / total, "top5": correct[1] / total, "top1_wilson_95": wilson(correct[0], total)}


def over_seeds(results: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean of `top1` and `top5` over seeds, and half the width of its 95 % confidence interval."""
    summary = {name: mean_and_half_width([result[name] for result in results]) for name in ("top1", "top5")}
    return {name: {"mean": average, "half_width_95": half} for name, (average, half) in summary.items()}


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % Student-t confidence interval, t_{n - 1} s / sqrt(n); None for one value."""
    n = len(values)
    if n < 2:
        return values[0], None
    from scipy.stats import t  # takes a second to import

    return mean(values), float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of the share `correct / total` of independent samples (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
