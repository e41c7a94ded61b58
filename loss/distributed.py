"""Collectives of the loss: the participating ranks, their rows, and a check that their calls agree."""

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("blockwise", "reference", "triton")
_checked_groups: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def participants(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Process group to gather over: `group`, else the default group; None for a single rank.

    Raises:
        ValueError: this process is not a member of `group`.
    """
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None:
        return None
    world_size = dist.get_world_size(group)
    if world_size < 1:  # new_group returns a placeholder with -1 ranks to processes that are not members
        raise ValueError("This process is not in the group; nt_xent must be called by members of the group only.")
    return group if world_size > 1 else None


def check_equal_calls(
    z: Tensor, impl: str, temperature: float | None, decoupled: bool, group: dist.ProcessGroup, queue: int = 0
) -> None:
    """Raise on every rank if the ranks' calls differ: otherwise a gather would hang, crash or mix two losses.

    Compares seven numbers per rank: on the CPU in every call; on an accelerator only in the first call of each group,
    because reading them synchronizes the host with the device.

    Args:
        z: (2n, D) projections, of which shape and dtype are compared.
        impl: resolved implementation, not "auto".
        temperature: None for a tensor, whose value is not compared.
        decoupled: whether the loss is the decoupled one.
        group: ranks to compare.
        queue: length of the queue, 0 for none.

    Raises:
        ValueError: names the differing arguments of every rank.
    """
    if z.device.type != "cpu" and group in _checked_groups:
        return
    call = [*z.shape, DTYPES.index(z.dtype), IMPLS.index(impl), -1 if temperature is None else temperature]
    call += [decoupled, queue]
    calls = gather_rows(torch.tensor([call], dtype=torch.float64, device=z.device), group)  # (W, 7)
    if (calls[:, :2] != calls[0, :2]).any():
        shapes = calls[:, :2].long().tolist()
        raise ValueError(f"z must have the same shape on every rank; this one and the others have {shapes}.")
    if (calls != calls[0]).any():
        described = [
            f"{'decoupled ' if decoupled else ''}{DTYPES[int(dtype)]} by {IMPLS[int(impl)]} at temperature "
            f"{'(a tensor)' if tau < 0 else tau} with a queue of {int(queue)}"
            for _, _, dtype, impl, tau, decoupled, queue in calls.tolist()
        ]
        raise ValueError(
            "nt_xent must be called with the same dtype, impl, temperature, decoupled and queue on every rank; this "
            f"one and the others compute {'; '.join(described)}."
        )
    _checked_groups.add(group)


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate x (m, ...) of all W ranks: (W m, ...), this rank's rows first, then those of the following ranks."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    gathered = x.new_empty(world_size * x.shape[0], *x.shape[1:])
    slots = gathered.chunk(world_size)
    dist.all_gather([slots[(r - rank) % world_size] for r in range(world_size)], x.contiguous(), group=group)
    return gathered


def gather_by_rank(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack x (m, ...) of all W ranks in their order: (W, m, ...), the same on every rank."""
    return gather_rows(x, group).view(-1, *x.shape).roll(dist.get_rank(group), dims=0)


class GatherRowsWithGradient(torch.autograd.Function):
    """Differentiable `gather_rows` for the reference; its gradient is a second collective, `SumOwnRows`."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx, grad_gathered):
        return SumOwnRows.apply(grad_gathered, ctx.group), None


class SumOwnRows(torch.autograd.Function):
    """Transpose of `gather_rows`: the sum over ranks of the entries for this rank's rows.

    Its gradient is again a gather, so that the reference can be differentiated any number of times.
    """

    @staticmethod
    def forward(ctx, gathered, group):
        ctx.group = group
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        rows = gathered.shape[0] // world_size
        total = gathered.roll(rank * rows, dims=0)  # ordered by rank, the same on every rank
        dist.all_reduce(total, group=group)
        return total[rank * rows : (rank + 1) * rows].clone()

    @staticmethod
    def backward(ctx, grad_own):
        return GatherRowsWithGradient.apply(grad_own, ctx.group), None
