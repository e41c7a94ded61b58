"""NT-Xent as the paper writes it: dense, slow and obvious. The oracle of tests and benches."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent_reference(z: Tensor, temperature: Tensor, z_all: Tensor) -> Tensor:
    """The loss of `nt_xent` for z (2n, D) of this rank, the first 2n rows of z_all (2N, D); autograd does the gradient.

    SimCLR (arXiv 2002.05709), Algorithm 1 and equation 1, for the anchor i and its other view j:
        s_ik = z_i . z_k / (|z_i| |z_k|)
        l(i, j) = -log( exp(s_ij / tau) / sum over k != i of exp(s_ik / tau) )
        L = mean of l(i, j) over all anchors
    The fraction is written as sigmoid(s_ij / tau - log of the sum over k not in {i, j}): once the positive outweighs
    the negatives by 1e16, as after training at a low temperature, a softmax is 1 even in float64, its gradient 0.
    """
    anchors = _normalize(z)  # (2n, D)
    similarity = anchors @ _normalize(z_all).T / temperature  # (2n, 2N)
    i = torch.arange(z.shape[0], device=z.device)
    j = i.roll(z.shape[0] // 2)
    not_negative = torch.zeros_like(similarity, dtype=torch.bool)
    not_negative[i, i] = True
    not_negative[i, j] = True
    negatives = similarity.masked_fill(not_negative, -math.inf).logsumexp(dim=1)
    return -F.logsigmoid(similarity[i, j] - negatives).mean()


def _normalize(z: Tensor) -> Tensor:
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    norm = norm.masked_fill(norm == math.inf, math.nan)  # too long to be squared
    too_short = norm < 100 * math.sqrt(torch.finfo(z.dtype).tiny)
    return z / norm.masked_fill(too_short, math.inf)  # a zero row stays zero and gets no gradient
