"""NT-Xent in blocks of the similarity matrix: O(M D + block) memory, on every device that torch supports.

With u_i = z_i / |z_i|, s_ij = u_i . u_j / tau and p(i) the other view of i:

    l_i   = softplus(L_i - s_ip(i)),            L_i = log of the sum over j not in {i, p(i)} of exp(s_ij)
    lse_i = logaddexp(L_i, s_ip(i)),            q_i = sigmoid(L_i - s_ip(i))
    dL/du_i = [ sum_j (P_ij + P_ji) u_j - (q_i + q_p(i)) u_p(i) ] / (M tau),     P_ij = exp(s_ij - lse_i)
    dL/dtau = -1/(2 tau) sum_i u_i . dL/du_i    (s = u.u / tau; every pair contributes from both ends)

This is equation 1 of SimCLR (arXiv 2002.05709) with the positive separated; the decoupled loss (arXiv 2110.06848) has
l_i = L_i - s_ip(i), lse_i = L_i and q_i = 1. S is symmetric, so pairs among a rank's own rows are visited once, in the
upper triangle, and every block contributes to its rows and to its columns: P_ij + P_ji = exp(s_ij) (exp(-lse_i) +
exp(-lse_j)) needs one exponential. Positives are excluded from the blocks' sums: subtracting them afterwards would
cancel all other terms once the model is trained.

`one_pass` is the same for batches of a single rank that are small enough to keep all exponentials.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import OPERATOR_NAMESPACE
from .workers import Workers, workers

# Largest block: large enough that the GEMM runs at its full rate and call overhead is negligible, small enough that the
# exponential and the sums find the block in the cache.
BAND_ROWS, BLOCK_COLUMNS = 384, 768


def nt_xent_blockwise(
    z: Tensor,
    temperature: Tensor,
    gather: Callable[[Tensor], Tensor],
    decoupled: bool,
    past: Tensor | None = None,
) -> Tensor:
    """`nt_xent` of this rank's projections, computed in blocks.

    Args:
        z: (2n, D) of any floating dtype; 16-bit values are computed in float32.
        temperature: () on any device; read by the host.
        gather: concatenates a tensor's rows over all ranks, this rank's first. Both gathers take place in the forward
            pass, after which every rank has all it needs for the complete gradient of its own rows.
        decoupled: whether to omit the positive from the denominator.
        past: (2n,) log-sums over negatives outside the batch, differentiable; None for no others.

    Returns:
        () float32 (float64 for a float64 z), differentiable once in z, in temperature and in past.
    """
    rows = z.shape[0]
    with torch.no_grad():
        z_all = gather(z)  # (M, D)
        negatives = negatives_logsumexp(z_all, temperature, rows)
        if past is not None:
            negatives = negatives.logaddexp(past)
        negatives_all = gather(negatives)  # (M,)
    loss = loss_from_negatives(z, temperature, z_all, negatives_all, decoupled)
    if past is None:
        return loss
    with torch.no_grad():
        lse = negatives if decoupled else negatives.logaddexp(positives_of(unit_rows(z)[0], rows, temperature))
    return with_gradient_in(past, loss, lse)


def with_gradient_in(past: Tensor, loss: Tensor, lse: Tensor) -> Tensor:
    """`loss` (), the mean of row losses l_i, with its gradient in `past` (2n,): dl_i/dpast_i = exp(past_i - lse_i).

    Args:
        past: (2n,) log-sums of a part of every row's denominator.
        loss: () without that gradient.
        lse: (2n,) lse_i, of the whole denominator; a constant.
    """
    share = (past.detach() - lse).exp()
    return loss + (share * (past - past.detach())).mean()  # adds zero


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::negatives_logsumexp", mutates_args=())
def negatives_logsumexp(z_all: Tensor, temperature: Tensor, rows: int) -> Tensor:
    """L_i (rows,) of the first `rows` rows of z_all (M, D), which are this rank's, against all M rows."""
    return workers(z_all.device).run(_negatives_logsumexp, z_all, temperature, rows)


def _negatives_logsumexp(workers: Workers, z_all: Tensor, temperature: Tensor, rows: int) -> Tensor:
    u, _ = unit_rows(z_all)
    tau = temperature.item()
    fits = exp_fits(u.dtype, tau)

    def over_bands(bands: Iterable[slice]) -> Tensor:
        total = u.new_full((rows,), 0.0 if fits else -math.inf)
        for block in _blocks(u, rows, tau, bands):
            i, mirrored, s = block.rows, block.mirrored, block.s
            if fits:
                s.exp_()
                total[i] += s.sum(1)
                total[mirrored] += block.s_mirrored.sum(0)
            else:
                total[i] = total[i].logaddexp(s.logsumexp(1))
                total[mirrored] = total[mirrored].logaddexp(block.s_mirrored.logsumexp(0))
        return total

    partial_sums = workers.map_bands(over_bands, rows, BAND_ROWS)
    return sum(partial_sums).log_() if fits else reduce(torch.logaddexp, partial_sums)


@negatives_logsumexp.register_fake
def _(z_all, temperature, rows):
    return z_all.new_empty(rows, dtype=compute_dtype(z_all))


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::nt_xent_loss", mutates_args=())
def loss_from_negatives(
    z: Tensor, temperature: Tensor, z_all: Tensor, negatives_all: Tensor, decoupled: bool
) -> Tensor:
    """Mean loss () of this rank's rows z (2n, D), differentiable once in z and in temperature.

    z_all (M, D), whose first 2n rows are z, and L (M,) of its rows are intermediate results, not inputs: gradients
    through them are part of the gradient of z.
    """
    return workers(z.device).run(_loss_from_negatives, z, temperature, negatives_all, decoupled)


def _loss_from_negatives(_: Workers, z: Tensor, temperature: Tensor, negatives_all: Tensor, decoupled: bool) -> Tensor:
    rows = z.shape[0]
    u, _ = unit_rows(z)
    excess = negatives_all[:rows] - positives_of(u, rows, temperature.item())
    return excess.mean() if decoupled else -F.logsigmoid(-excess).mean()


@loss_from_negatives.register_fake
def _(z, temperature, z_all, negatives_all, decoupled):
    return z.new_empty((), dtype=compute_dtype(z))


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::nt_xent_gradient", mutates_args=())
def loss_gradient(
    grad_loss: Tensor, temperature: Tensor, z_all: Tensor, negatives_all: Tensor, rows: int, decoupled: bool
) -> tuple[Tensor, Tensor]:
    """dL/dz (rows, D) and dL/dtau () of W times the global loss: the mean over W ranks is the global gradient."""
    return workers(z_all.device).run(_loss_gradient, grad_loss, temperature, z_all, negatives_all, rows, decoupled)


def _loss_gradient(
    workers: Workers,
    grad_loss: Tensor,
    temperature: Tensor,
    z_all: Tensor,
    negatives_all: Tensor,
    rows: int,
    decoupled: bool,
) -> tuple[Tensor, Tensor]:
    u, norm = unit_rows(z_all)
    tau = temperature.item()
    positives = positives_of(u, rows, tau)  # (M,)
    if decoupled:
        lse, q = negatives_all, u.new_ones(2, rows // 2, 1)
    else:
        lse = negatives_all.logaddexp(positives)
        q = torch.sigmoid(negatives_all[:rows] - positives[:rows]).view(2, -1, 1)
    fits = exp_fits(u.dtype, tau)
    shrink = torch.exp(-lse)

    def over_bands(bands: Iterable[slice]) -> Tensor:
        du = u.new_zeros(rows, u.shape[1])
        weights = u.new_empty(_block_size(u, rows))
        for block in _blocks(u, rows, tau, bands):
            i, j, s = block.rows, block.columns, block.s
            w = weights[: s.numel()].view_as(s)
            if fits:
                torch.add(shrink[i, None], shrink[j], out=w)
                s.exp_().mul_(w)
            else:
                torch.sub(s, lse[j], out=w).exp_()
                s.sub_(lse[i, None]).exp_().add_(w)
            du[i].addmm_(s, u[j])
            if block.mirrored.start < block.mirrored.stop:
                du[block.mirrored].addmm_(block.s_mirrored.t(), u[i])
        return du

    du, *others = workers.map_bands(over_bands, rows, BAND_ROWS)
    for other in others:
        du += other
    du.view(2, rows // 2, -1).addcmul_(u[:rows].view(2, rows // 2, -1).flip(0), q[0] + q[1], value=-1)

    u, norm = u[:rows], norm[:rows]
    du *= grad_loss / (rows * tau)  # rows = M / W
    along = (u * du).sum(1, keepdim=True)
    d_tau = along.sum() / (-2 * tau)
    du.addcmul_(u, along, value=-1).div_(norm)  # the component along u does not change z's direction
    return du.to(z_all.dtype), d_tau.to(temperature)


@loss_gradient.register_fake
def _(grad_loss, temperature, z_all, negatives_all, rows, decoupled):
    return z_all.new_empty(rows, z_all.shape[1]), torch.empty_like(temperature)


def _save_for_gradient(ctx, inputs, output):
    z, temperature, z_all, negatives_all, ctx.decoupled = inputs
    ctx.rows = z.shape[0]
    ctx.save_for_backward(temperature, z_all, negatives_all)


def _backward(ctx, grad_loss):
    refuse_second_derivative()
    dz, d_tau = loss_gradient(grad_loss, *ctx.saved_tensors, ctx.rows, ctx.decoupled)
    return dz, d_tau, None, None, None


def refuse_second_derivative() -> None:
    """Raise in a backward pass that is recorded."""
    if torch.is_grad_enabled():  # the gradient would be a constant, and a penalty on it would have no effect
        raise RuntimeError("nt_xent cannot be differentiated twice (create_graph=True); use impl='reference'.")


loss_from_negatives.register_autograd(_backward, setup_context=_save_for_gradient)


def loss_and_gradient(
    z: Tensor, temperature: Tensor, decoupled: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `one_pass.loss_and_gradient` returns, at any temperature."""
    z, one = z.to(compute_dtype(z)), torch.ones((), device=z.device)
    here = workers(z.device)
    negatives = here.run(_negatives_logsumexp, z, temperature, len(z))
    loss = here.run(_loss_from_negatives, z, temperature, negatives, decoupled)
    if not with_gradient:
        return loss, z.new_empty(0), z.new_empty(0)
    dz, d_tau = here.run(_loss_gradient, one, temperature, z, negatives, len(z), decoupled)
    return loss, dz, d_tau.to(z)


class Block(NamedTuple):
    """Block of S: `rows` x `columns`, of which the columns `mirrored` are below the diagonal of S for these rows."""

    rows: slice
    columns: slice
    mirrored: slice
    s: Tensor  # (rows, columns), self-pairs and positives at -inf; a view of a buffer that the next block overwrites

    @property
    def s_mirrored(self) -> Tensor:
        """(rows, mirrored); its transpose is another block of S."""
        return self.s[:, self.mirrored.start - self.columns.start : self.mirrored.stop - self.columns.start]


def _blocks(u: Tensor, rows: int, tau: float, bands: Iterable[slice]) -> Iterator[Block]:
    """Blocks of S for the `bands` of u's first `rows` rows, from the diagonal to the last column."""
    n = rows // 2
    buffer = u.new_empty(_block_size(u, rows))
    for i in bands:
        u_i = u[i] / tau
        for left in range(i.start, u.shape[0], BLOCK_COLUMNS):
            j = slice(left, min(left + BLOCK_COLUMNS, u.shape[0]))
            s = buffer[: u_i.shape[0] * (j.stop - left)].view(u_i.shape[0], j.stop - left)
            torch.mm(u_i, u[j].t(), out=s)
            # self-pairs, and positives: n columns to the right of a first view, n to the left of a second view
            for shift, stop in ((0, i.stop), (n, min(i.stop, n)), (-n, i.stop)):
                if i.start < stop and i.start + shift < j.stop and left < stop + shift:
                    s[: stop - i.start].diagonal(i.start + shift - left).fill_(-math.inf)
            yield Block(i, j, slice(max(left, i.stop), max(left, i.stop, min(j.stop, rows))), s)


def _block_size(u: Tensor, rows: int) -> int:
    return min(BAND_ROWS, rows) * min(BLOCK_COLUMNS, u.shape[0])


def exp_fits(dtype: torch.dtype, tau: float) -> bool:
    # |s| <= 1 / tau, so from this temperature on (0.0134 in float32) no maximum has to be subtracted: neither exp(s),
    # nor the sum of a million of them (hence 14) leaves the normal numbers, and neither does the inverse of a sum of
    # 300,000. Below it, L is a running log-sum-exp, and P_ij + P_ji takes two exponentials, both of numbers that are
    # not positive.
    return 1 / tau <= math.log(torch.finfo(dtype).max) - 14


def unit_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows u (M, D) and norms |z| (M, 1) in float32 or wider; u = 0 where |z| = inf."""
    norm = row_norms(z)
    return z / norm, norm


def row_norms(z: Tensor) -> Tensor:
    """Norms |z| (M, 1) in float32 or wider; those of rows that have no direction are inf.

    A zero row has no direction: u = 0, and |z| = inf stops its gradient. The same applies to a row whose square is near
    the smallest normal number, where rounding would give u a norm other than 1.
    """
    dtype = compute_dtype(z)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=dtype)
    # A finite row whose square overflows would become a zero row: NaN stops a run that has diverged this far.
    norm.nan_to_num_(math.nan, posinf=math.nan)
    return torch.threshold(norm, 100 * math.sqrt(torch.finfo(dtype).tiny), math.inf)


def positives_of(u: Tensor, rows: int, tau: float | Tensor) -> Tensor:
    """s_ip(i) (M,) of u (M, D): `rows` rows of every rank in turn, first views before second views."""
    views = u.view(-1, 2, rows // 2, u.shape[1])  # (W, 2, n, D)
    positives = (views[:, 0] * views[:, 1]).sum(-1) / tau  # (W, n)
    return positives[:, None].expand(-1, 2, -1).reshape(-1)


def compute_dtype(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)
