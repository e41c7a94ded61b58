"""Gradient caching: contrastive batches larger than memory (Gao et al. 2021, arXiv 2101.06983).

Accumulating gradients of small batches would lose negatives, because each image would be contrasted with its own slice
only. The loss depends on the weights through z alone, so its gradient is the sum over slices of dz/dw^T dL/dz: z of all
slices is computed without a graph, the loss yields dL/dz, and every slice is encoded once more, now with a graph. Two
forward passes and one backward pass buy the memory of one slice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .common import UserError


def cached_backward(
    session: Any,
    model: nn.Module,
    views: Tensor,
    micro_batch: int,
    contrast: Callable[[Tensor, float | Tensor], Tensor],
    auxiliary: Callable[[Tensor | None, slice], tuple[Tensor, ...]],
    temperature: float | Tensor,
    *,
    mark: Callable[[str], None] = lambda part: None,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the contrastive loss and of an auxiliary loss to the parameters, slice by slice.

    Batch norm takes its statistics from each slice (over all ranks where it is synchronized), in both passes alike, so
    in training mode it makes the gradient differ from that of the whole batch; without it, the gradient is the same.
    Slices differ by at most one image, so that none has poorer statistics than the others. The running statistics see
    each slice once, and k slices move them as far as one batch does: each by 1 - (1 - momentum)^(1/k).

    Args:
        session: has autocast() and no_sync(model), as `engine.session.Session`.
        model: views (2b, 3, H, W) -> z (2b, D) and what `auxiliary` takes; may be wrapped in DDP.
        views: (2B, 3, H, W), views of image i at rows i and B + i.
        micro_batch: largest number of images in a slice.
        contrast: (z (2B, D), temperature) -> loss ().
        auxiliary: (second output of the model, the slice's images within the batch) -> (loss (), *metrics ()).
        temperature: of the contrastive loss: a number, or a tensor () computed from a parameter of the model.
        mark: called where a part of the step starts, see `engine.loop.Instruments.mark`.

    Returns:
        The contrastive loss, (), without a graph, and the metrics (m,), summed over the slices.
    """
    images = len(views) // 2
    network = model.module if isinstance(model, DistributedDataParallel) else model
    slices = equal_slices(images, micro_batch)
    # Both passes over a slice draw the same dropout; the seeds depend on the caller's generator alone.
    seeds = torch.randint(2**62, (len(slices),)).tolist()

    def encode(net: nn.Module, part: slice) -> tuple[Tensor, Tensor | None]:
        with session.autocast():
            return net(torch.cat([views[part], views[images + part.start : images + part.stop]]))  # (2b, D), ...

    firsts, seconds = [], []
    with torch.no_grad(), buffers_restored(network):
        for part, seed in zip(slices, seeds, strict=True):
            torch.manual_seed(seed)
            first, second = encode(network, part)[0].chunk(2)
            firsts.append(first)
            seconds.append(second)
    z = torch.cat(firsts + seconds).requires_grad_()  # (2B, D)
    learned = isinstance(temperature, Tensor)
    tau = temperature.detach().requires_grad_() if learned else temperature
    mark("loss")
    with torch.enable_grad():
        loss = contrast(z, tau)
    mark("backward")
    loss.backward()
    mark("other")

    metrics = []
    with _momentum_divided(network, len(slices)):
        for part, seed in zip(slices, seeds, strict=True):
            torch.manual_seed(seed)
            # gradients are averaged over ranks once, with the last slice
            with session.no_sync(model) if part.stop < images else nullcontext():
                part_z, output = encode(model, part)
                gradient = torch.cat([z.grad[part], z.grad[images + part.start : images + part.stop]])
                extra, *part_metrics = auxiliary(output, part)
                roots = [(part_z, gradient)] + ([(extra, None)] if extra.requires_grad else [])
                if learned and part.stop == images:
                    roots.append((temperature, tau.grad))
                mark("backward")
                torch.autograd.backward(*zip(*roots, strict=True))
                mark("other")
                metrics.append(torch.stack(part_metrics))
    return loss.detach(), sum(metrics)


def check_micro_batch(micro_batch: int, batch_size: int, world_size: int) -> None:
    """Refuse slices of one image: batch norm over its two views turns them into opposites, z1 = -z2.

    Args:
        micro_batch: --micro-batch, 0 for whole batches.
        batch_size: global batch size in images.
        world_size: number of ranks, which share the statistics of batch norm.

    Raises:
        UserError: a slice would hold one image.
    """
    images = batch_size // world_size  # of this process
    if not 0 < micro_batch < images:
        return
    if world_size * min(part.stop - part.start for part in equal_slices(images, micro_batch)) < 2:
        raise UserError(
            f"--micro-batch {micro_batch} encodes an image of the batch of {batch_size} alone, and batch norm needs "
            f"more than one; use --micro-batch {min(3, images)} or more."
        )


def equal_slices(images: int, micro_batch: int) -> list[slice]:
    """As few slices of at most `micro_batch` images as possible, whose sizes differ by at most one."""
    count = -(-images // micro_batch)
    ends = [images * number // count for number in range(count + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


@contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Restore every buffer at the end: not only batch norm has running statistics, EvoNorm has them too."""
    buffers = list(module.buffers())
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)


@contextmanager
def _momentum_divided(module: nn.Module, slices: int) -> Iterator[None]:
    norms = [norm for norm in module.modules() if getattr(norm, "running_var", None) is not None]
    momenta = {norm: norm.momentum for norm in norms if getattr(norm, "momentum", None)}
    for norm, momentum in momenta.items():
        norm.momentum = 1 - (1 - momentum) ** (1 / slices)
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
