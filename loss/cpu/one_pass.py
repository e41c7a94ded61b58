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
    differentiable = torch.is_grad_enabled()
    # Graphs and vmap need the operator. Its wrappers in Python slow down a small batch, and its first call imports
    # torch._dynamo.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return loss_and_gradient(z, temperature, decoupled, differentiable)[0]
    if differentiable and (z.requires_grad or temperature.requires_grad):
        return OnePass.apply(z, temperature, decoupled)
    return _loss_and_gradient(z, temperature, decoupled, False)[0]


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::nt_xent_one_pass", mutates_args=())
def loss_and_gradient(
    z: Tensor, temperature: Tensor, decoupled: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), dL/dz (M, D) and dL/dtau () in float32 or wider; without gradient, the last two are empty."""
    return _loss_and_gradient(z, temperature, decoupled, with_gradient)


def _loss_and_gradient(
    z: Tensor, temperature: Tensor, decoupled: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tau, dtype = temperature.item(), compute_dtype(z)
    if not exp_fits(dtype, tau):  # a graph of torch.compile cannot know
        return blockwise.loss_and_gradient(z, temperature, decoupled, with_gradient)
    (m, d), n = z.shape, len(z) // 2
    u, norm = unit_rows(z)
    views = u.view(2, n, d)
    positives = (views[0] * views[1]).sum(1).div_(tau)  # (n,)

    kept, total = [], u.new_zeros(m)
    scaled, u_t = u / tau, u.t()
    for top in range(0, m, BAND_ROWS):
        i = slice(top, min(top + BAND_ROWS, m))
        for left in range(top, m, BLOCK_COLUMNS):
            j, mirrored = slice(left, min(left + BLOCK_COLUMNS, m)), slice(max(left, i.stop), left + BLOCK_COLUMNS)
            e = (scaled[i] @ u_t[:, j]).exp_()
            for shift in (0, n, -n):  # self-pairs, and positives to the right and left; a diagonal outside is empty
                e.diagonal(top + shift - left).zero_()
            total[i].add_(e.sum(1))
            if mirrored.start < m:
                total[mirrored].add_(e[:, mirrored.start - left :].sum(0))
            kept.append((i, j, mirrored, e))

    total = total.view(2, n)
    margin = positives - total.log()  # (2, n)
    loss = -(margin if decoupled else F.logsigmoid(margin)).mean()
    if not with_gradient:
        return loss, u.new_empty(0), u.new_empty(0)
    # exp(-lse) and q, from sums that are in range: logarithms and their exponentials would only add rounding
    a = (total if decoupled else total + positives.exp()).reciprocal()  # (2, n)
    pull = (total * a).sum(0).neg_()[:, None]  # (n, 1): -(q_i + q_p(i)), which is -2 for the decoupled loss
    du = views.flip(0).mul_(pull).view(m, d)
    a = a.view(m)
    buffer = torch.empty_like(kept[0][-1])
    for i, j, mirrored, e in kept:
        e.mul_(torch.add(a[i, None], a[j], out=buffer.view(-1)[: e.numel()].view_as(e)))
        du[i].addmm_(e, u[j])
        if mirrored.start < m:
            du[mirrored].addmm_(e[:, mirrored.start - j.start :].t(), u[i])
    along = torch.mul(u, du, out=scaled).sum(1, keepdim=True)
    d_tau = along.sum().div_(-2 * m * tau * tau)
    return loss, du.addcmul_(u, along, value=-1).div_(norm.mul_(m * tau)), d_tau


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
    needs_dz, needs_d_tau = ctx.needs_input_grad[:2]
    grad_z = (grad_loss * dz).to(ctx.dtype) if needs_dz else None
    return grad_z, (grad_loss * d_tau).to(temperature) if needs_d_tau else None, None, None


loss_and_gradient.register_autograd(_backward, setup_context=_save_gradient)


class OnePass(torch.autograd.Function):
    """The operator's gradient without the operator, for eager mode."""

    @staticmethod
    def forward(ctx, z, temperature, decoupled):
        loss, dz, d_tau = _loss_and_gradient(z, temperature, decoupled, True)
        ctx.dtype = z.dtype
        ctx.save_for_backward(temperature, dz, d_tau)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return _backward(ctx, grad_loss)[:3]
