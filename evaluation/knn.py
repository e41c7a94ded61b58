"""Weighted k-nearest-neighbor classification of frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .accuracy import classes_ahead, count_correct

QUERY_ROWS, BANK_ROWS = 512, 65_536
"""Shape of the tiles in which similarities are computed: 134 MB."""


def knn_correct(
    bank: Tensor,
    bank_label: Tensor,
    query: Tensor,
    query_label: Tensor,
    *,
    k: Sequence[int],
    temperature: Sequence[float],
    classes: int,
    device: torch.device,
) -> dict[tuple[int, float], tuple[int, int]]:
    """Number of queries classified correctly at top-1 and top-5, for every (k, temperature).

    The k bank features of highest cosine vote for their class with weight exp(cosine / temperature). A class without
    votes is never correct.

    Args:
        bank: (N, D) float, on any device or mapped into memory.
        bank_label: (N,) int64 below `classes`.
        query: (M, D) float.
        query_label: (M,) int64.
        k: numbers of neighbors, the whole bank where it is smaller; 200 is usual for ImageNet, 20 for small data sets.
        temperature: temperatures of the votes.
        classes: number of classes.
        device: device of the computation, whose memory use does not grow with N.
    """
    correct = {(neighbors, t): torch.zeros(2, dtype=torch.int64, device=device) for neighbors in k for t in temperature}
    bank_label = bank_label.to(device)
    for rows, (cosine, place) in nearest(bank, query, max(k), device):
        label, truth = bank_label[place], query_label[rows].to(device)
        for neighbors, t in correct:
            votes = class_votes(cosine[:, :neighbors], label[:, :neighbors], classes, t)
            without_vote = votes.gather(1, truth[:, None])[:, 0] == 0
            ahead = classes_ahead(votes, truth).masked_fill(without_vote, classes)
            correct[neighbors, t] += count_correct(ahead, classes)
    return {setting: tuple(counts.tolist()) for setting, counts in correct.items()}


def knn_top1(
    bank: Tensor, bank_label: Tensor, query: Tensor, query_label: Tensor, *, k: int = 20, temperature: float = 0.1
) -> float:
    """Top-1 accuracy of the queries with at most k neighbors: all of them if the bank is smaller."""
    classes = int(torch.maximum(bank_label.max(), query_label.max())) + 1
    options = {"k": [k], "temperature": [temperature], "classes": classes, "device": bank.device}
    return knn_correct(bank, bank_label, query, query_label, **options)[k, temperature][0] / len(query)


def nearest(bank: Tensor, query: Tensor, k: int, device: torch.device) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Find the k bank features of highest cosine, in descending order; among equal cosines, the first in the bank.

    A feature of zeros has cosine 0 with every other feature. Copies of a bank feature in different tiles may differ in
    the last bit of their cosine, which then decides, because the order of summation depends on the shape of the tile.
    Only one tile of similarities exists at a time, next to the best neighbors of each query so far.

    Args:
        bank: (N, D) float, on any device or mapped into memory.
        query: (M, D) float.
        k: number of neighbors, N where it is larger.
        device: device of the computation.

    Yields:
        (rows of `query`, (cosine (m, k) float32, place in the bank (m, k) int64)), on `device`.
    """
    query_blocks = [slice(first, first + QUERY_ROWS) for first in range(0, len(query), QUERY_ROWS)]
    best: list[Any] = [None] * len(query_blocks)
    for first in range(0, len(bank), BANK_ROWS):  # outer loop: the bank is large and may be on disk
        block = _unit(bank[first : first + BANK_ROWS].to(device).float())
        for number, rows in enumerate(query_blocks):
            cosine, place = _largest(_unit(query[rows].to(device).float()) @ block.T, k)
            if first:  # equal ones of earlier tiles are further left
                cosine, column = _largest(torch.cat([best[number][0], cosine], 1), k)
                place = torch.cat([best[number][1], first + place], 1).gather(1, column)
            best[number] = cosine, place
    yield from zip(query_blocks, best, strict=True)


def _unit(features: Tensor) -> Tensor:
    """Normalize rows (n, D) to unit length; rows of zeros stay zero."""
    # Scaling by a power of two is exact; squares of very large or very small features would leave the range of float32.
    exponent = features.abs().amax(1, keepdim=True).frexp().exponent
    return normalize(features.ldexp(-exponent), dim=1)


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row (all if there are fewer) and their columns, sorted; the first of equal ones."""
    k = min(k, x.shape[1])
    value, column = x.topk(k, dim=1)
    tied = (x >= value[:, -1:]).sum(1) > k  # topk may have chosen any of the values that equal the last
    rows, last = x[tied], value[tied, -1:]
    place = torch.where(rows == last, torch.arange(x.shape[1], device=x.device), x.shape[1])
    column[tied] = place.masked_fill(rows > last, -1).topk(k, dim=1, largest=False).indices
    column = column.sort(dim=1).values
    value, order = x.gather(1, column).sort(dim=1, descending=True, stable=True)
    return value, column.gather(1, order)


def class_votes(cosine: Tensor, label: Tensor, classes: int, temperature: float) -> Tensor:
    """Sum of the votes exp(cosine / temperature) for each class, relative to the vote of the nearest neighbor.

    Args:
        cosine: (m, k) float32, descending.
        label: (m, k) int64, classes of the neighbors.

    Returns:
        (m, classes) float32.
    """
    weight = ((cosine - cosine[:, :1]) / temperature).exp()  # relative, because small temperatures would overflow
    votes = cosine.new_zeros(len(cosine), classes)
    rows = torch.arange(len(cosine), device=cosine.device)
    for neighbor in range(cosine.shape[1]):  # in turn, because the order of a scattered sum varies on a GPU
        votes[rows, label[:, neighbor]] += weight[:, neighbor]
    return votes
