"""Frozen features of a set of batches."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


@torch.no_grad()
def embed(function: Callable[[Tensor], Tensor], batches: Iterable) -> tuple[Tensor, Tensor]:
    """Features and labels of all batches.

    Args:
        function: (B, 3, S, S) -> (B, D); an encoder in evaluation mode, or `raw_pixels`.
        batches: objects with `views` (B, 3, S, S) and `label` (B,).

    Returns:
        features (N, D) float32 and labels (N,) int64, on the device of the batches.
    """
    features, labels = [], []
    for batch in batches:
        features.append(function(batch.views).float())
        labels.append(batch.label)
    return torch.cat(features), torch.cat(labels)


def raw_pixels(views: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 3 * 32 * 32): the baseline that has learnt nothing, on views averaged down to 32 px."""
    return adaptive_avg_pool2d(views, min(32, views.shape[-1])).flatten(1)
