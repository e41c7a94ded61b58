"""Top-1 and top-5 of class scores."""

import torch
from torch import Tensor


def classes_ahead(scores: Tensor, truth: Tensor) -> Tensor:
    """(m,) int64: number of classes ranked before the right one; of equal scores the lower class ranks first.

    A prediction is right at top-n if this is below n. A right class whose score is NaN ranks last, after all classes,
    so it is never right: comparisons with NaN are false, and counting the higher scores would rank it first.

    Args:
        scores: (m, C) float. truth: (m,) int64.
    """
    own = scores.gather(1, truth[:, None])  # (m, 1)
    not_lower = torch.arange(scores.shape[1], device=scores.device) >= truth[:, None]
    behind = (own > scores) | ((own == scores) & not_lower)  # the right class itself included
    return scores.shape[1] - behind.sum(1)


def top_n(classes: int) -> int:
    """The n of "top-5": fewer where there are not so many classes."""
    return min(5, classes)
