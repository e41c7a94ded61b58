"""Contrastive batches larger than memory: encode in slices, contrast all of them, backpropagate slice by slice.

Accumulating gradients of small batches would lose negatives: each image would be contrasted with its own slice alone.
The loss depends on the weights only through z, so its gradient is the sum over slices of dz/dw^T dL/dz (Gao et al.
2021, arXiv 2101.06983): z of all slices is computed without a graph, the loss gives dL/dz, and every slice is encoded
once more, now with a graph. Two forward passes and one backward pass for the memory of one slice.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn


def cached_backward(
    encode: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    module: nn.Module,
    views: Tensor,
    micro_batch: int,
    contrast: Callable[[Tensor], Tensor],
    beside: Callable[[Tensor | None, slice], Tensor],
    *,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor:
    """Add the gradient of `contrast(z) + the sum of beside` to the parameters, `micro_batch` images at a time.

    Batch norm takes its statistics from each slice (over all ranks, where it is synchronized), in both passes alike. So
    with batch norm the result is not that of the whole batch at once: without it, or in evaluation mode, it is. Slices
    are of equal size, give or take one image, so that none has poorer statistics than the others. The running
    statistics see each slice once, and k slices move them as far as one batch does: each by
    1 - (1 - momentum)^(1/k).

    Args:
        encode: views (2b, 3, H, W) -> z (2b, D) and what `beside` wants of them; may synchronize gradients over ranks.
        module: the network itself, whose buffers and batch norms these are.
        views: (2B, 3, H, W), views of image i at rows i and B + i.
        micro_batch: largest number of images in a slice.
        contrast: z (2B, D) -> loss ().
        beside: (second result of `encode`, the slice's images within the batch) -> loss () to be added.
        no_sync: opened for all slices but the last, since gradients need to be synchronized but once.

    Returns:
        contrast(z), without a graph.
    """
    images = len(views) // 2
    # both passes over a slice draw the same dropout: its seed comes from the generator as the caller left it
    slices = equal_slices(images, micro_batch)
    seeds = torch.randint(2**62, (len(slices),)).tolist()

    def views_of(part: slice) -> Tensor:
        return torch.cat([views[part], views[images + part.start : images + part.stop]])

    firsts, seconds = [], []
    with torch.no_grad(), _statistics_stand_still(module):
        for part, seed in zip(slices, seeds, strict=True):
            torch.manual_seed(seed)
            first, second = encode(views_of(part))[0].chunk(2)
            firsts.append(first)
            seconds.append(second)
    z = torch.cat(firsts + seconds).requires_grad_()  # (2B, D)
    with torch.enable_grad():
        loss = contrast(z)
    loss.backward()
    with _statistics_move_as_once(module, len(slices)):
        for part, seed in zip(slices, seeds, strict=True):
            torch.manual_seed(seed)
            with no_sync() if part.stop < images else nullcontext():
                part_z, scores = encode(views_of(part))
                gradient = torch.cat([z.grad[part], z.grad[images + part.start : images + part.stop]])
                extra = beside(scores, part)
                roots = [(part_z, gradient)] + ([(extra, None)] if extra.requires_grad else [])
                torch.autograd.backward(*zip(*roots, strict=True))
    return loss.detach()


def equal_slices(images: int, micro_batch: int) -> list[slice]:
    """As few slices of at most `micro_batch` images as possible, whose sizes differ by at most one."""
    count = -(-images // micro_batch)
    ends = [images * number // count for number in range(count + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


@contextmanager
def _statistics_stand_still(module: nn.Module) -> Iterator[None]:
    """Restore every buffer at the end: not only batch norm has running statistics, EvoNorm has them too."""
    buffers = list(module.buffers())
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)


@contextmanager
def _statistics_move_as_once(module: nn.Module, slices: int) -> Iterator[None]:
    norms = [norm for norm in module.modules() if getattr(norm, "running_var", None) is not None]
    momenta = {norm: norm.momentum for norm in norms if getattr(norm, "momentum", None)}
    for norm, momentum in momenta.items():
        norm.momentum = 1 - (1 - momentum) ** (1 / slices)
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
