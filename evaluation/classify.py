"""Accuracy of a classifier on labeled images."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import nn

from .accuracy import classes_ahead, count_correct
from .features import embed


def labeled_test_samples(test: Any, classes: list[str]) -> np.ndarray:
    """Labeled samples of a test split, (n,) int64; empty if its classes differ from `classes`.

    Args:
        test: shard set with `classes` and `index`, or None.
        classes: names in the order of the classifier's logits.
    """
    if test is None or list(test.classes) != classes:
        return np.zeros(0, np.int64)
    return np.flatnonzero(test.index["label"] >= 0)


def evaluate_classifier(
    classifier: nn.Module, batches: Callable[..., Iterable], samples: np.ndarray, session: Any, max_bad: float
) -> dict[str, float]:
    """Accuracies `top1` and `top5` of a classifier; the ranks share the work and return the same values.

    Args:
        classifier: (B, C, S, S) -> logits (B, classes); in evaluation mode during the call.
        batches: called with samples=...; yields batches of their center crops.
        samples: (n,) int64, positions of labeled samples in the shard set; not empty.
        session, max_bad: see `evaluation.features.embed`.

    Raises:
        UserError: more than `max_bad` of the samples can't be read.
    """
    training = classifier.training
    classifier.eval()
    total = correct = 0
    with session.autocast():
        for logits, label, _ in embed(classifier, batches, samples, session, max_bad):
            total += len(label)
            correct = correct + count_correct(classes_ahead(logits, label), logits.shape[1])
    classifier.train(training)
    top1, top5 = correct.tolist()
    return {"top1": top1 / total, "top5": top5 / total}
