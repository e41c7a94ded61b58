"""What the loss needs of torch.distributed: who else takes part, and their rows."""

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("blockwise", "reference", "triton")
_checked_groups: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def participants(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to gather over: `group`, else the default group, else (or with only one rank) None."""
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None:
        return None
    world_size = dist.get_world_size(group)
    if world_size < 1:  # on a rank that is not a member new_group returns a stand-in, which counts -1 ranks
        raise ValueError("This process is not in the group: call nt_xent on the members of the group only.")
    return group if world_size > 1 else None


def check_equal_calls(z: Tensor, impl: str, temperature: float | None, group: dist.ProcessGroup) -> None:
    """Raise ValueError on every rank if the ranks' calls differ: a gather would hang, crash or mix two losses.

    Compares the shape (2n, D) and dtype of z, the resolved `impl` and a temperature that is a number; None for a
    tensor, which is learned or on the device. Five numbers per rank: on the CPU in every call; on an accelerator in the
    first call of each group only, because reading them there makes the host wait for the device.
    """
    if z.device.type != "cpu" and group in _checked_groups:
        return
    call = [*z.shape, DTYPES.index(z.dtype), IMPLS.index(impl), -1 if temperature is None else temperature]
    calls = gather_rows(torch.tensor([call], dtype=torch.float64, device=z.device), group)  # (W, 5)
    if (calls[:, :2] != calls[0, :2]).any():
        shapes = calls[:, :2].long().tolist()
        raise ValueError(f"z must have the same shape on every rank; this one and the others hold {shapes}")
    if (calls != calls[0]).any():
        described = [
            f"{DTYPES[int(dtype)]} by {IMPLS[int(impl)]} at temperature {'(a tensor)' if tau < 0 else tau}"
            for _, _, dtype, impl, tau in calls.tolist()
        ]
        raise ValueError(
            "nt_xent must be called with the same dtype, impl and temperature on every rank; this one and the others "
            f"compute {'; '.join(described)}"
        )
    _checked_groups.add(group)


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x (m, ...) of every rank -> (W m, ...): this rank's rows first, then those of the ranks after it, cyclically."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    gathered = x.new_empty(world_size * x.shape[0], *x.shape[1:])
    slots = gathered.chunk(world_size)
    dist.all_gather([slots[(r - rank) % world_size] for r in range(world_size)], x.contiguous(), group=group)
    return gathered


class GatherRowsWithGradient(torch.autograd.Function):
    """`gather_rows` for the reference, whose gradient needs a second collective: `SumOwnRows`."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx, grad_gathered):
        return SumOwnRows.apply(grad_gathered, ctx.group), None


class SumOwnRows(torch.autograd.Function):
    """The transpose of `gather_rows`: the sum over ranks of what each holds for this rank's rows.

    Its own gradient gathers again, so that the reference can be differentiated any number of times.
    """

    @staticmethod
    def forward(ctx, gathered, group):
        ctx.group = group
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        rows = gathered.shape[0] // world_size
        total = gathered.roll(rank * rows, dims=0)  # in the order of the ranks, the same on each
        dist.all_reduce(total, group=group)
        return total[rank * rows : (rank + 1) * rows].clone()

    @staticmethod
    def backward(ctx, grad_own):
        return GatherRowsWithGradient.apply(grad_own, ctx.group), None
