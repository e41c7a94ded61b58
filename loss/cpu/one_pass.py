"""NT-Xent of a small batch on a single rank: loss and gradient in one pass over S, in the caller's thread.

The equations are those of `blockwise`, which computes every exponential twice, because it forgets them between the
forward and the backward pass. Here the upper triangle of exp(S) is kept until the sums of all rows are complete, and
the gradient follows at once: the loss is a scalar, so the backward pass only multiplies by its gradient.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import OPERATOR_NAMESPACE
from . import blockwise
from .blockwise import compute_dtype, exp_fits, row_norms

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
    m, n = len(z), len(z) // 2
    norm = row_norms(z).mul_(math.sqrt(tau))
    v = z / norm  # (M, D): u / sqrt(tau), so that S = V V^T
    partner = v.roll(n, 0)  # v_p(i)
    positives = (v * partner).sum(1)  # (M,)

    kept, total = [], v.new_zeros(m)
    for top in range(0, m, BAND_ROWS):
        i = slice(top, min(top + BAND_ROWS, m))
        for left in range(top, m, BLOCK_COLUMNS):
            j, mirrored = slice(left, min(left + BLOCK_COLUMNS, m)), slice(max(left, i.stop), left + BLOCK_COLUMNS)
            e = (_rows(v, i) @ _rows(v, j).t()).exp_()
            for shift in (0, n, -n):  # self-pairs, and positives to the right and left; a diagonal outside is empty
                e.diagonal(top + shift - left).zero_()
            _rows(total, i).add_(e.sum(1))
            if mirrored.start < m:
                total[mirrored].add_(e[:, mirrored.start - left :].sum(0))
            kept.append((i, j, mirrored, e))

    excess = total.log().sub_(positives)  # (M,)
    loss = (excess if decoupled else F.softplus(excess, threshold=50)).mean()
    if not with_gradient:
        return loss, v.new_empty(0), v.new_empty(0)
    # exp(-lse) and q, from sums that are in range: logarithms and their exponentials would only add rounding
    shrink = (total if decoupled else positives.exp_().add_(total)).reciprocal()  # (M,)
    q = total.mul_(shrink)
    dv = partner.mul_(q.roll(n).add_(q).neg_().unsqueeze(1))
    for i, j, mirrored, e in kept:
        e.mul_(_rows(shrink, i).unsqueeze(1) + _rows(shrink, j))
        _rows(dv, i).addmm_(e, _rows(v, j))
        if mirrored.start < m:
            dv[mirrored].addmm_(e[:, mirrored.start - j.start :].t(), v[i])
    along = (v * dv).sum(1, keepdim=True)
    d_tau = along.sum().div_(-2 * m * tau)
    return loss, dv.addcmul_(v, along, value=-tau).div_(norm.mul_(m)), d_tau


def _rows(x: Tensor, rows: slice) -> Tensor:
    """x[rows]. A small batch is a single block, and torch takes microseconds for a view even of everything."""
    return x if rows.stop - rows.start == x.shape[0] else x[rows]


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
