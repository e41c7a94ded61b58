"""kNN and linear evaluation of frozen features, and accuracy of classifiers."""

from .classify import evaluate_classifier, labeled_test_samples
from .evaluator import EvalConfig, Evaluator
from .features import embed, raw_pixels
from .knn import knn_top1
from .sgd_probe import linear_top1

__all__ = [
    "EvalConfig",
    "Evaluator",
    "embed",
    "evaluate_classifier",
    "knn_top1",
    "labeled_test_samples",
    "linear_top1",
    "raw_pixels",
]
