"""Weighted k-nearest-neighbour classification of frozen features."""

from torch import Tensor
from torch.nn.functional import normalize


def knn_top1(
    bank: Tensor, bank_label: Tensor, query: Tensor, query_label: Tensor, *, k: int = 20, temperature: float = 0.1
) -> float:
    """Share of queries whose class is right (Wu et al. 2018, arXiv 1805.01978, section 3.4).

    The k bank features of highest cosine vote for their class with weight exp(cosine / temperature).

    Args:
        bank: (N, D) float. bank_label: (N,) int64. query: (M, D). query_label: (M,).
        k: 200 is usual for ImageNet, 20 for small sets; at most N.
    """
    bank, query = normalize(bank.float(), dim=1), normalize(query.float(), dim=1)
    classes = int(bank_label.max()) + 1
    correct = 0
    for rows, truth in zip(query.split(1024), query_label.split(1024), strict=True):
        cosine, nearest = (rows @ bank.T).topk(min(k, len(bank)), dim=1)  # (m, k)
        votes = cosine.new_zeros(len(rows), classes)  # (m, C)
        votes.scatter_add_(1, bank_label[nearest], (cosine / temperature).exp())
        correct += int((votes.argmax(1) == truth).sum())
    return correct / len(query)
