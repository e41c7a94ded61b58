"""Inputs, gradients and error bounds shared by the tests of all NT-Xent implementations."""

from functools import partial

import torch
import torch.nn.functional as F

from loss import nt_xent


def trained_like(n, d, dtype=torch.float64, seed=0):
    """(2n, d) like a trained model's output: mean positive cosine above 0.9 (unless d is small), unequal row norms."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n, d, generator=generator, dtype=torch.float64)
    views = torch.cat([first, first + 0.25 * torch.randn(n, d, generator=generator, dtype=torch.float64)])
    z = (views * torch.empty(2 * n, 1, dtype=torch.float64).uniform_(0.3, 30, generator=generator)).to(dtype)
    assert d < 24 or F.cosine_similarity(*z.double().chunk(2)).mean() > 0.9
    return z


def dense(z, temperature, decoupled=False):
    """Usual dense form in plain torch: the accuracy to match."""
    z = F.normalize(z, dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    positive = torch.arange(len(z)).roll(len(z) // 2)
    if decoupled:
        positives = similarity.gather(1, positive[:, None])
        return (similarity.scatter(1, positive[:, None], -torch.inf).logsumexp(1, keepdim=True) - positives).mean()
    return F.cross_entropy(similarity, positive)


def loss_and_gradients(z, tau, impl, compute=None, decoupled=False):
    """Loss, dL/dz and dL/dtau of nt_xent with `impl`, or of `compute(z, temperature, decoupled=decoupled)`."""
    z = z.detach().clone().requires_grad_()
    temperature = torch.tensor(tau, dtype=torch.promote_types(z.dtype, torch.float32), requires_grad=True)
    loss = (compute or partial(nt_xent, impl=impl))(z, temperature, decoupled=decoupled)
    (loss * 1024).backward()  # loss scaling, without which float16 gradients vanish
    return loss.detach(), z.grad / 1024, temperature.grad / 1024


def errors(z, tau, impl, compute=None, decoupled=False):
    """Norm and error of loss, dL/dz and dL/dtau against the reference in float64."""
    tau = torch.tensor(tau).item()  # rounded first, so that its rounding is not part of the error
    truth = loss_and_gradients(z.double(), tau, "reference", decoupled=decoupled)
    actual = loss_and_gradients(z, tau, impl, compute, decoupled)
    return {
        name: (true.norm().item(), (ours.double() - true).norm().item())
        for name, true, ours in zip(("loss", "dL/dz", "dL/dtau"), truth, actual, strict=True)
    }


def check_accuracy(z, tau, impl, decoupled=False):
    """Errors are at most twice those of the dense form in the same dtype."""
    ours, naive = (errors(z, tau, impl, compute, decoupled) for compute in (None, dense))
    # The error of a scalar can be zero by chance, hence slack in ulps of s = 1 / tau. In a 16-bit dtype, the gradient
    # is at best the float64 one, rounded.
    ulp = torch.finfo(torch.float32).eps
    rounding = torch.finfo(z.dtype).eps / 2 * ours["dL/dz"][0] if z.dtype.itemsize == 2 else 0
    slack = {"loss": ulp / tau, "dL/dz": rounding + 8 * torch.finfo(torch.float32).tiny, "dL/dtau": ulp / tau**2}
    for name, (_, error) in ours.items():
        assert error <= 2 * naive[name][1] + 2 * slack[name], f"{name}: {error:.2e}, dense {naive[name][1]:.2e}"
