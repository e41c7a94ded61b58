"""Dense NT-Xent as written in the paper: the oracle of tests and benchmarks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent_reference(
    z: Tensor, temperature: Tensor, z_all: Tensor, decoupled: bool, past: Tensor | None = None
) -> Tensor:
    """`nt_xent` in O(2n M) memory, differentiated by autograd any number of times.

    SimCLR (arXiv 2002.05709), Algorithm 1 and equation 1, for row i and the other view j of its sample:
        s_ik = z_i . z_k / (|z_i| |z_k|)
        l(i, j) = -log( exp(s_ij / tau) / sum over k != i of exp(s_ik / tau) )
        L = mean of l(i, j) over all rows
    The decoupled loss (arXiv 2110.06848) leaves k = j out of the sum as well. A queue of past projections adds its
    entries of other samples to the sum.

    The fraction is computed as sigmoid(s_ij / tau - log of the sum over k not in {i, j}): once the positive outweighs
    the negatives by 1e16, as after training at a low temperature, a softmax rounds to 1 and its gradient to 0 even in
    float64.

    Args:
        z: (2n, D) projections of this rank.
        temperature: () tau.
        z_all: (M, D) projections of all ranks, those of this rank first.
        decoupled: whether the positive is left out of the denominator.
        past: (2n, N) from `past_similarities`; None without a queue.

    Returns:
        () mean over the rows of z, float32 (float64 for a float64 z).
    """
    anchors = _normalize(z)  # (2n, D)
    similarity = anchors @ _normalize(z_all).T / temperature  # (2n, M)
    i = torch.arange(z.shape[0], device=z.device)
    j = i.roll(z.shape[0] // 2)
    not_negative = torch.zeros_like(similarity, dtype=torch.bool)
    not_negative[i, i] = True
    not_negative[i, j] = True
    candidates = similarity.masked_fill(not_negative, -math.inf)
    if past is not None:
        candidates = torch.cat([candidates, past], dim=1)
    negatives = candidates.logsumexp(dim=1)
    if decoupled:
        return (negatives - similarity[i, j]).mean()
    return -F.logsigmoid(similarity[i, j] - negatives).mean()


def past_similarities(z: Tensor, temperature: Tensor, sample: Tensor, past: Tensor, past_sample: Tensor) -> Tensor:
    """s_iq (2n, N) of the rows of z (2n, D) and the entries of a queue, -inf where q is no negative of i.

    Args:
        z: (2n, D) projections.
        temperature: () tau.
        sample: (n,) int64 of the rows: entries of the same sample are not negatives.
        past, past_sample: (N, D) unit rows and their samples (N,) int64, -1 for entries that are not filled.
    """
    anchors = _normalize(z)
    past = past.to(anchors.dtype, copy=True)  # the queue may change before the backward pass
    similarity = anchors @ past.T / temperature
    not_negative = (sample.repeat(2)[:, None] == past_sample) | (past_sample < 0)
    return similarity.masked_fill(not_negative, -math.inf)


def _normalize(z: Tensor) -> Tensor:
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    norm = norm.masked_fill(norm == math.inf, math.nan)  # too long to be squared
    too_short = norm < 100 * math.sqrt(torch.finfo(z.dtype).tiny)
    return z / norm.masked_fill(too_short, math.inf)  # a zero row stays zero and gets no gradient
