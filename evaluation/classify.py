"""Accuracy of a classifier on labeled images."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import nn

from .accuracy import classes_ahead, top_n
from .features import embed


def labeled_test_samples(test: Any, classes: list[str]) -> np.ndarray:
    """(n,) int64: the labeled samples of a test split; none unless its classes are `classes`.

    Args:
        test: shard set with `classes` and `index`, or None.
        classes: names in the order of the classifier's logits.
    """
    if test is None or list(test.classes) != classes:
        return np.zeros(0, np.int64)
    return np.flatnonzero(test.index["label"] >= 0)


def evaluate_classifier(
    classifier: nn.Module, batches: Callable[..., Iterable], samples: np.ndarray, session: Any
) -> dict[str, float]:
    """`top1` and `top5` of a classifier on labeled samples; the ranks share the work and get the same figures.

    Args:
        classifier: (B, 3, S, S) -> logits (B, classes); put into evaluation mode meanwhile.
        batches: called with samples=...; yields batches of their center crops.
        samples: (n,) int64, places in the shard set.
        session: see `evaluation.features.embed`.
    """
    training = classifier.training
    classifier.eval()
    total = top1 = top5 = 0
    with session.autocast():
        for logits, label, _ in embed(classifier, batches, samples, session):
            ahead = classes_ahead(logits, label)
            total, top1 = total + len(label), top1 + (ahead < 1).sum()
            top5 = top5 + (ahead < top_n(logits.shape[1])).sum()
    classifier.train(training)
    return {"top1": int(top1) / total, "top5": int(top5) / total}
