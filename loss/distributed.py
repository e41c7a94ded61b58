"""What the loss needs of torch.distributed: who else takes part, and their rows."""

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

_checked_groups: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def participants(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to gather over: `group`, else the default group, else (or with only one rank) None."""
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None


def check_equal_shapes(z: Tensor, group: dist.ProcessGroup) -> None:
    """ValueError on every rank if z's shape (2n, D) differs between ranks, before a gather could hang on it.

    Two integers per rank: on the CPU in every call; on an accelerator in the first call of each group only, because
    reading them there makes the host wait for the device.
    """
    if z.device.type != "cpu" and group in _checked_groups:
        return
    shape = torch.tensor([z.shape], device=z.device)  # (1, 2)
    shapes = gather_rows(shape, group)
    if (shapes != shape).any():
        raise ValueError(f"z must have the same shape on every rank; this one and the others hold {shapes.tolist()}")
    _checked_groups.add(group)


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x (m, ...) of every rank -> (W m, ...): this rank's rows first, then those of the ranks after it, cyclically."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    gathered = x.new_empty(world_size * x.shape[0], *x.shape[1:])
    slots = gathered.chunk(world_size)
    dist.all_gather([slots[(r - rank) % world_size] for r in range(world_size)], x.contiguous(), group=group)
    return gathered


class GatherRowsWithGradient(torch.autograd.Function):
    """`gather_rows` for the reference, whose gradient needs a second collective: the sum over ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx, grad_gathered):
        rank, world_size = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        rows = grad_gathered.shape[0] // world_size
        grad = grad_gathered.roll(rank * rows, dims=0)  # in the order of the ranks, the same on each
        dist.all_reduce(grad, group=ctx.group)
        return grad[rank * rows : (rank + 1) * rows], None
