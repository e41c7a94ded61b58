"""Queue of past projections as further negatives of NT-Xent.

As in MoCo (arXiv 1911.05722, section 3.1), the projections of earlier steps are negatives of the current ones. Here
they come from the encoder itself, as it was up to N / 2B steps ago; there is no momentum encoder. With
u_i = z_i / |z_i| and the entries k_q of the queue, which are unit rows and constants,

    s_iq = u_i . k_q / tau,         Q_i = log of the sum of exp(s_iq) over q with sample(q) != sample(i)
    dQ_i/du_i = m_i / tau,          m_i = sum_q exp(s_iq - Q_i) k_q,              dQ_i/dtau = -u_i . m_i / tau^2

m_i is the output of an attention with the queue as keys and values. As in FlashAttention (arXiv 2205.14135, section
3.1), one pass over blocks of the queue yields Q_i and m_i, so that the backward pass computes no exponential again.

Q_i adds to the log-sum L_i of the batch's negatives: logaddexp(L_i, Q_i) takes the place of L_i in the equations of
`cpu.blockwise` and `triton`, which then yield the loss and its gradient through the pairs of the batch.
`cpu.blockwise.with_gradient_in` adds the gradient through Q_i, twice (`ntxent.twice`). In a batch, a pair of negatives
occurs in two rows: z_i is pushed away from z_j by its own row and by that of z_j. The rows of past projections are not
computed, so their half of the push would be missing, while the two views of an image still attract each other twice;
training then ends in a partial collapse. Their half is estimated by the other one, P_qi = P_iq, as if both rows had the
same denominator. dL/dtau is a mean over the rows of the batch and counts once.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import distributed
from .common import OPERATOR_NAMESPACE
from .cpu.blockwise import compute_dtype, refuse_second_derivative, unit_rows
from .cpu.workers import Workers, workers

EMPTY = -1
"""Sample index of an entry that has not been filled yet."""
CPU_BLOCK, DEVICE_BLOCK = (384, 2048), (8192, 2048)
"""Largest block of similarities, rows x entries: 3 MB per thread on a CPU, 67 MB on an accelerator."""


class NegativeQueue(nn.Module):
    """The last `length` projections of a run and the images that they belong to, for `nt_xent(..., queue=...)`.

    All of it is in buffers, so that `state_dict` holds the whole state. The host never waits for the device.

    Args:
        length: N, number of projections that are kept.
        width: D of the projections.
        first_batch: number of the first batch that is kept, counted from 0.

    Attributes:
        z: (N, D) float32, unit rows; the oldest ones are replaced first.
        sample: (N,) int64, index of each entry's image; -1 for entries that have not been filled yet.
        count: () int64, number of entries ever written, those before `first_batch` included, those of batches that are
            not finite excluded; its remainder by N is the next slot.
    """

    def __init__(self, length: int, width: int, first_batch: int = 0):
        super().__init__()
        if length < 1 or width < 1:
            raise ValueError(
                f"length and width must be at least 1, not {length} and {width}; use queue=None for no queue."
            )
        self.first_batch = first_batch
        self.register_buffer("z", torch.zeros(length, width))
        self.register_buffer("sample", torch.full((length,), EMPTY))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def append(self, z: Tensor, sample: Tensor, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Add the projections of a global batch in the order of one process, the same on every rank.

        A batch with projections that are not finite is left out. If only its gradient is not finite, the non-finite
        guard skips the step, but the projections are kept.

        Args:
            z: (2n, D) projections of this rank, not normalized; rows i and n + i are the two views of sample i.
            sample: (n,) int64 on the device of z, not negative: index of each image.
            group: ranks that share the global batch, as for `nt_xent`.
        """
        views = unit_rows(z)[0].unflatten(0, (2, -1))  # (2, n, D)
        if (group := distributed.participants(group)) is not None:
            views = distributed.gather_by_rank(views, group).transpose(0, 1).flatten(1, 2)  # (2, W n, D)
            sample = distributed.gather_by_rank(sample, group).flatten()
        length = len(self.z)
        rows, samples = views.flatten(0, 1)[-length:].to(self.z), sample.repeat(2)[-length:]
        slots = (self.count + torch.arange(len(rows), device=rows.device)) % length
        taken = rows.isfinite().all()
        samples = samples.where(self.count >= self.first_batch * len(rows), EMPTY)
        self.z.index_copy_(0, slots, rows.where(taken, self.z[slots]))
        self.sample.index_copy_(0, slots, samples.where(taken, self.sample[slots]))
        self.count += taken * len(rows)


def create_queue(length: int, width: int, steps: int, device: torch.device) -> NegativeQueue | None:
    """The queue of a run of `steps` steps, None for a length of 0.

    It fills from the second quarter of the run on: before, the encoder changes so fast that entries no longer resemble
    what it would compute now.
    """
    return NegativeQueue(length, width, first_batch=steps // 4).to(device) if length else None


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::queue_log_sums", mutates_args=())
def log_sums(
    z: Tensor, temperature: Tensor, sample: Tensor, past: Tensor, past_sample: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Q_i (2n,), dQ_i/dz_i (2n, D) and dQ_i/dtau (2n,) in float32 or wider; without gradient, the last two are empty.

    past (N, D) and past_sample (N,) are the queue. A row without negatives in it gets the logarithm of the smallest
    normal number, relative to a similarity of -1: a sum that changes no other sum.
    """
    return workers(z.device).run(_log_sums, z, temperature, sample, past, past_sample, with_gradient)


def _log_sums(
    workers: Workers, z: Tensor, temperature: Tensor, sample: Tensor, past: Tensor, past_sample: Tensor, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    u, norm = unit_rows(z)
    rows, width = u.shape
    sample = sample.repeat(2)[:, None]  # (2n, 1)
    never = u.new_zeros(len(past)).masked_fill(past_sample < 0, -torch.inf)
    band_rows, columns = CPU_BLOCK if z.device.type == "cpu" else DEVICE_BLOCK

    def over_bands(bands: Iterable[slice]) -> Tensor:
        """(2n, 1 + D): Q_i and m_i of these bands, 0 elsewhere."""
        result = u.new_zeros(rows, 1 + width * slopes)
        for i in bands:
            query = u[i] / temperature
            highest = torch.zeros_like(query[:, :1]) - 1 / temperature  # the smallest similarity: finite
            total, mean = torch.zeros_like(highest), result[i, 1:]
            for left in range(0, len(past), columns):
                j = slice(left, left + columns)
                key = past[j].to(u.dtype)
                s = torch.addmm(never[j], query, key.t()).masked_fill_(sample[i] == past_sample[j], -torch.inf)
                higher = torch.maximum(highest, s.amax(1, keepdim=True))
                e, shrink = s.sub_(higher).exp_(), highest.sub_(higher).exp_()
                total.mul_(shrink).add_(e.sum(1, keepdim=True))
                if slopes:
                    mean.mul_(shrink).addmm_(e, key)
                highest = higher
            total.clamp_(min=torch.finfo(u.dtype).tiny)
            mean.div_(total)
            result[i, :1] = highest + total.log_()
        return result

    packed = sum(workers.map_bands(over_bands, rows, band_rows))
    q, m = packed[:, 0].contiguous(), packed[:, 1:]
    if not slopes:
        return q, u.new_empty(0), u.new_empty(0)
    along = (u * m).sum(1, keepdim=True)
    return q, (m - along * u) / (norm * temperature), along.flatten() / -(temperature**2)


@log_sums.register_fake
def _(z, temperature, sample, past, past_sample, with_gradient):
    like = z.new_empty(z.shape if with_gradient else 0, dtype=compute_dtype(z))
    return like.new_empty(z.shape[0]), like, like.new_empty(z.shape[0] if with_gradient else 0)


def _save_gradient(ctx, inputs, output):
    z, temperature, *_ = inputs
    _, *slopes = output
    ctx.dtype = z.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*slopes)
    ctx.save_for_backward(temperature, *slopes)


def _backward(ctx, grad, *_):
    refuse_second_derivative()
    if grad is None:
        return (None,) * 6
    temperature, dz, d_tau = ctx.saved_tensors
    d_tau = (grad * d_tau).sum().to(temperature) if ctx.needs_input_grad[1] else None  # only then: it may synchronize
    return (grad[:, None] * dz).to(ctx.dtype), d_tau, None, None, None, None


log_sums.register_autograd(_backward, setup_context=_save_gradient)
