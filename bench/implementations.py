"""Implementations compared by bench/loss_kernel.py: this project's NT-Xent, the dense form, and installed libraries.

Each is a function of (z, temperature) with z (2N, D), the two views of sample i in rows i and N + i, that returns the
differentiable mean loss.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from loss import nt_xent

Implementation = Callable[[Tensor, float], Tensor]


def projections(m: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Projections (M, D) like those of a trained model: views of the same sample have a cosine of about 0.93."""
    random = torch.Generator().manual_seed(0)
    sample = torch.randn(m // 2, d, generator=random)
    views = [sample + 0.27 * torch.randn(m // 2, d, generator=random) for _ in range(2)]
    return torch.cat(views).to(device, dtype)


def dense(z: Tensor, temperature: float) -> Tensor:
    """Usual dense form: all similarities, self-pairs at -inf, cross-entropy with the column of the positive."""
    n = len(z) // 2
    u = normalize(z, dim=1)  # (2N, D)
    s = (u @ u.T / temperature).fill_diagonal_(-torch.inf)  # (2N, 2N)
    positive = torch.arange(2 * n, device=z.device).roll(n)
    return cross_entropy(s, positive)


@cache
def _library_loss(name: str, temperature: float) -> torch.nn.Module:
    if name == "lightly":
        from lightly.loss import NTXentLoss

        return NTXentLoss(temperature)
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature))


def library(name: str, z: Tensor, temperature: float) -> Tensor:
    return _library_loss(name, temperature)(*z.chunk(2))


def implementations(device: torch.device) -> dict[str, Implementation]:
    """Implementations by name that are installed and run on `device`."""
    found: dict[str, Implementation] = {"blockwise": partial(nt_xent, impl="blockwise")}
    if device.type == "cuda":
        found = {"triton": partial(nt_xent, impl="triton"), **found}
    found["dense"] = dense
    found["dense compiled"] = torch.compile(dense, dynamic=False)
    for name in ("lightly", "pytorch-metric-learning"):
        if find_spec(name.replace("-", "_")):
            found[name] = partial(library, name)
    return found
