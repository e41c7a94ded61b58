"""Weighted k-nearest-neighbor classification of frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .accuracy import classes_ahead, top_n
from .common import UserError

QUERY_ROWS, BANK_ROWS = 512, 65_536
"""Similarities are computed in tiles of this shape: 134 MB."""
LOW = 2**32 - 1


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
    """How many queries are classified rightly, for every (k, temperature), at top-1 and top-5.

    The k bank features of highest cosine vote for their class with weight exp(cosine / temperature). A class without
    any vote is never right.

    Args:
        bank: (N, D) float, on any device or mapped into memory. bank_label: (N,) int64 below `classes`.
        query: (M, D). query_label: (M,).
        k: 200 is usual for ImageNet, 20 for small sets.
        device: where it is computed, in memory that does not grow with N.

    Raises:
        UserError: there are fewer than k bank features.
    """
    check_k(k, len(bank))
    correct = dict.fromkeys([(each, t) for each in k for t in temperature], (0, 0))
    bank_label = bank_label.to(device)
    for rows, (cosine, place) in nearest(bank, query, max(k), device):
        label, truth = bank_label[place], query_label[rows].to(device)
        for each, t in correct:
            votes = class_votes(cosine[:, :each], label[:, :each], classes, t)
            ahead = classes_ahead(votes, truth).masked_fill(votes.gather(1, truth[:, None])[:, 0] == 0, classes)
            top1, top5 = correct[each, t]
            correct[each, t] = top1 + int((ahead < 1).sum()), top5 + int((ahead < top_n(classes)).sum())
    return correct


def check_k(k: Sequence[int], bank: int) -> None:
    """Refuse more neighbors than there are bank features.

    Raises:
        UserError: there are fewer than k.
    """
    if max(k) > bank:
        raise UserError(f"{max(k)} neighbors can't vote among {bank} training images: use a smaller --k.")


def knn_top1(
    bank: Tensor, bank_label: Tensor, query: Tensor, query_label: Tensor, *, k: int = 20, temperature: float = 0.1
) -> float:
    """Share of queries whose class is right by at most k neighbors: as many as there are in a smaller bank."""
    classes = int(torch.maximum(bank_label.max(), query_label.max())) + 1
    k = min(k, len(bank))
    correct = knn_correct(
        bank, bank_label, query, query_label, k=[k], temperature=[temperature], classes=classes, device=bank.device
    )
    return correct[k, temperature][0] / len(query)


def nearest(bank: Tensor, query: Tensor, k: int, device: torch.device) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """The k bank features of highest cosine, in descending order; of equal cosines, the first in the bank.

    A feature of zeros has cosine 0 with every other. Copies of one bank feature in different tiles may differ in the
    last bit of their cosine, since the order of summation depends on the shape of the tile; that bit then decides.
    Only one tile of similarities exists at a time, and each query's best so far.

    Yields:
        (rows of `query`, (cosine (m, k) float32, place in the bank (m, k) int64)), on `device`.
    """
    query_blocks = [slice(first, first + QUERY_ROWS) for first in range(0, len(query), QUERY_ROWS)]
    best: list[Tensor | None] = [None] * len(query_blocks)
    for first in range(0, len(bank), BANK_ROWS):  # outermost, since the bank is what is large and may lie on the disk
        block = _unit(bank[first : first + BANK_ROWS].to(device).float())
        place = torch.arange(first, first + len(block), device=device)
        for number, rows in enumerate(query_blocks):
            cosine = _unit(query[rows].to(device).float()) @ block.T  # (m, n)
            keys = _best_keys(cosine, place, min(k, len(block)))
            if best[number] is not None:
                keys = torch.cat([best[number], keys], 1)
            best[number] = keys.topk(min(k, keys.shape[1]), dim=1).values
    for rows, keys in zip(query_blocks, best, strict=True):
        yield rows, _cosine_and_place(keys)


def _unit(features: Tensor) -> Tensor:
    """(n, D) rows of length 1; rows of zeros stay zero.

    Each row is scaled by a power of two first, which is exact: the squares of very large or very small features would
    leave the range of float32.
    """
    exponent = features.abs().amax(1, keepdim=True).frexp().exponent
    return normalize(features.ldexp(-exponent), dim=1)


def _best_keys(cosine: Tensor, place: Tensor, k: int) -> Tensor:
    """(m, n) float32 and (n,) -> (m, k): the largest keys of each row, in no particular order."""
    best, column = cosine.topk(k, dim=1)
    # topk is free to choose among equal ones; where the last of the k has no equal outside, there was no choice
    if ((cosine >= best[:, -1:]).sum(1) == k).all():
        return _keys(best, place[column])
    return _keys(cosine, place).topk(k, dim=1).values


def _keys(cosine: Tensor, place: Tensor) -> Tensor:
    """(m, n) float32 and their places -> (m, n) int64, all different in a row: by cosine, then the earliest place.

    The bits of a float are in the order of its values, with those of negative ones reversed; adding 0 makes -0 and 0
    the same.
    """
    bits = (cosine + 0.0).view(torch.int32).long()
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | (LOW - place)


def _cosine_and_place(keys: Tensor) -> tuple[Tensor, Tensor]:
    high = keys >> 32
    cosine = torch.where(high < 0, high ^ 0x7FFFFFFF, high).int().view(torch.float32)
    return cosine, LOW - (keys & LOW)


def class_votes(cosine: Tensor, label: Tensor, classes: int, temperature: float) -> Tensor:
    """(m, k) neighbors in descending order and their classes -> (m, classes) votes, the nearest one's being 1."""
    weight = ((cosine - cosine[:, :1]) / temperature).exp()  # the largest taken out: small temperatures overflow
    votes = cosine.new_zeros(len(cosine), classes)
    rows = torch.arange(len(cosine), device=cosine.device)
    for neighbor in range(cosine.shape[1]):  # one after the other: the order of a scattered sum varies on a GPU
        votes[rows, label[:, neighbor]] += weight[:, neighbor]
    return votes
