"""Gradients of convolution weights as one matrix product, for CPUs with AMX.

oneDNN's kernels with AMX are slow for this gradient on maps of few positions, as in the last layers of a network;
bench/results/convolution.csv compares both.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, pad

PATCHES = 2**25
"""Elements of the patches that are in memory at a time."""


def multiply_small_maps(module: nn.Module) -> None:
    """Change the class of every `nn.Conv2d` that supports it to `SmallMapConv2d`; parameters and their names stay."""
    for conv in module.modules():
        if type(conv) is nn.Conv2d and conv.kernel_size != (1, 1) and is_plain(conv):
            conv.__class__ = SmallMapConv2d


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether the convolution has no bias, groups or dilation, and pads a number of zeros."""
    zeros = conv.padding_mode == "zeros" and isinstance(conv.padding, tuple)
    return zeros and conv.bias is None and conv.groups == 1 and conv.dilation == (1, 1)


def is_small(positions: int, channels: int) -> bool:
    """Whether the product is faster on a map of so many positions; patches of larger maps take too long to copy."""
    return 3 * positions <= min(channels, 256)


class SmallMapConv2d(nn.Conv2d):
    """Convolution without bias, whose weight gradient is a matrix product where the map is small, in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, P, Q)."""
        positions = x.shape[2] // self.stride[0] * (x.shape[3] // self.stride[1])
        small = is_small(positions, self.in_channels)
        if small and x.dtype is torch.bfloat16 and torch.is_grad_enabled():
            return MultipliedGradient.apply(x, self.weight, self.stride, self.padding)
        return super().forward(x)


class MultipliedGradient(torch.autograd.Function):
    """forward(x (N, C, H, W), weight (O, C, k, l), stride, padding) -> y (N, O, P, Q).

    With the patch of x under every output as a row of X (N P Q, k l C) and the gradient of y as dY (N P Q, O),

        dweight = dY^T X        (O, k l C)
    """

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return conv2d(x, weight, stride=stride, padding=padding)  # autocast casts the weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            geometry = ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1  # dilation, transposed, output padding, groups
            grad_x, *_ = torch.ops.aten.convolution_backward(
                grad, x, weight.to(grad.dtype), None, *geometry, (True, False, False)
            )
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(x, grad, weight.shape[2:], ctx.stride, ctx.padding).to(weight.dtype)
        return grad_x, grad_weight, None, None


def weight_gradient(
    x: Tensor, grad: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """x (N, C, H, W), dY (N, O, P, Q) -> dweight (O, C, k, l), summed over parts of the batch."""
    width = x.shape[1] * math.prod(kernel)
    views = max(1, PATCHES // (grad[0, 0].numel() * width))  # of a part
    products = []
    for inputs, grads in zip(x.split(views), grad.split(views), strict=True):
        inputs = pad(inputs.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
        patches = inputs.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # (n, P, Q, C, k, l)
        patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, width)  # (n P Q, k l C)
        products.append(grads.permute(0, 2, 3, 1).flatten(0, 2).T @ patches)
    total = torch.stack(products).sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    return total.view(-1, *kernel, x.shape[1]).permute(0, 3, 1, 2)
