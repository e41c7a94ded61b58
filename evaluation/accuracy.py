"""Top-1 and top-5 of class scores."""

import torch
from torch import Tensor


def classes_ahead(scores: Tensor, truth: Tensor) -> Tensor:
    """(m,) int64: how many classes are put before the right one; of equal scores the lower class is.

    A prediction is right at top-n if fewer than n are.

    Args:
        scores: (m, C) float. truth: (m,) int64.
    """
    own = scores.gather(1, truth[:, None])  # (m, 1)
    lower = torch.arange(scores.shape[1], device=scores.device) < truth[:, None]
    return ((scores > own) | ((scores == own) & lower)).sum(1)


def top_n(classes: int) -> int:
    """The n of "top-5": fewer where there are not so many classes."""
    return min(5, classes)
