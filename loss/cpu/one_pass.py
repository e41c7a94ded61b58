"""NT-Xent of a small batch on a single rank: loss and gradient in one pass over S, in the caller's thread.

The equations are those of `blockwise`, which computes every exponential twice, because it forgets them between the
forward and the backward pass. Here the upper triangle of exp(S) is kept until the sums of all rows are complete, and
the gradient follows at once: the loss is a scalar, so the backward pass only multiplies by its gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import OPERATOR_NAMESPACE
from . import blockwise
from .blockwise import compute_dtype, exp_fits, unit_rows

MAX_ROWS = 4096
"""Largest M of this form. The triangle takes 36 MB in float32."""
BAND_ROWS, BLOCK_COLUMNS = 256, 768
"""Block of S that is computed at a time: enough for the GEMM's full rate, small enough to stay in the cache. At a power
of two of columns, the transposed GEMM and the sums over columns would compete for few sets of the cache."""


def nt_xent_one_pass(z: Tensor, temperature: Tensor, decoupled: bool) -> Tensor:
    """`nt_xent` of projections z (M, D), in O(M D + M^2 / 2) memory. Arguments and result are those of `blockwise`."""
    return loss_and_gradient(z, temperature, decoupled, torch.is_grad_enabled())[0]


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::nt_xent_one_pass", mutates_args=())
def loss_and_gradient(
    z: Tensor, temperature: Tensor, decoupled: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), dL/dz (M, D) and dL/dtau () in float32 or wider; without gradient, the last two are empty."""
    tau, dtype = temperature.item(), compute_dtype(z)
    if not exp_fits(dtype, tau):  # a graph of torch.compile cannot know
        return blockwise.loss_and_gradient(z, temperature, decoupled, with_gradient)
    m, n = len(z), len(z) // 2
    u, norm = unit_rows(z)
    positives = torch.cat([(u[:n] * u[n:]).sum(1).div_(tau)] * 2)

    kept, total = [], u.new_zeros(m)
    scaled, u_t = u / tau, u.t()
    for top in range(0, m, BAND_ROWS):
        i = slice(top, min(top + BAND_ROWS, m))
        for left in range(top, m, BLOCK_COLUMNS):
            j, mirrored = slice(left, left + BLOCK_COLUMNS), slice(max(left, i.stop), left + BLOCK_COLUMNS)
            e = (scaled[i] @ u_t[:, j]).exp_()
            for shift in (0, n, -n):  # self-pairs, and positives to the right and left; a diagonal outside is empty
                e.diagonal(top + shift - left).zero_()
            total[i] += e.sum(1)
            total[mirrored] += e[:, mirrored.start - left :].sum(0)
            kept.append((i, j, mirrored, e))

    negatives = total.log_()
    excess = negatives - positives
    loss = excess.mean() if decoupled else -F.logsigmoid(-excess).mean()
    if not with_gradient:
        return loss, u.new_empty(0), u.new_empty(0)
    lse, q = (negatives, torch.ones_like(excess)) if decoupled else (negatives.logaddexp(positives), excess.sigmoid_())
    a = lse.neg_().exp_()
    du = (u.view(2, n, -1).flip(0) * (q[:n] + q[n:]).neg_()[:, None]).view(m, -1)
    buffer = torch.empty_like(kept[0][-1])
    for i, j, mirrored, e in kept:
        e.mul_(torch.add(a[i, None], a[j], out=buffer.view(-1)[: e.numel()].view_as(e)))
        du[i].addmm_(e, u[j])
        du[mirrored].addmm_(e[:, mirrored.start - j.start :].t(), u[i])
    du.div_(m * tau)
    along = (u * du).sum(1, keepdim=True)
    return loss, du.addcmul_(u, along, value=-1).div_(norm), along.sum().div_(-2 * tau)


@loss_and_gradient.register_fake
def _(z, temperature, decoupled, with_gradient):
    like = z.new_empty(z.shape if with_gradient else 0, dtype=compute_dtype(z))
    return like.new_empty(()), like, like.new_empty(() if with_gradient else 0)


def _save_gradient(ctx, inputs, output):
    z, temperature, _, _ = inputs
    _, *gradients = output
    ctx.dtype = z.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(temperature, *gradients)


def _backward(ctx, grad_loss, *_):
    blockwise.refuse_second_derivative()
    if grad_loss is None:
        return None, None, None, None
    temperature, dz, d_tau = ctx.saved_tensors
    return (grad_loss * dz).to(ctx.dtype), (grad_loss * d_tau).to(temperature), None, None


loss_and_gradient.register_autograd(_backward, setup_context=_save_gradient)
