"""How often a classifier is right."""

from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from .accuracy import classes_ahead, top_n
from .features import embed


def classification(
    classifier: Callable[[Tensor], Tensor],
    center_crop_batches: Callable[[np.ndarray], Iterable],
    samples: np.ndarray,
    gather: Callable[[Tensor], Tensor] = lambda part: part,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """`top1` and `top5` of logits (B, classes) on labeled samples; see `evaluation.features.embed`."""
    total, top1, top5 = 0, 0, 0
    for logits, label, _ in embed(classifier, center_crop_batches, samples, gather, rank, world_size):
        ahead = classes_ahead(logits, label)
        total, top1 = total + len(label), top1 + (ahead < 1).sum()
        top5 = top5 + (ahead < top_n(logits.shape[1])).sum()
    return {"top1": int(top1) / total, "top5": int(top5) / total}
