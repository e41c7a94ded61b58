"""Batch normalization with the ReLU and the addition of a residual block, for training on CPUs.

torch normalizes, adds and clips in separate passes over the activations, forward and backward. Here each direction is
two passes, one for sums over the batch and one for the result: arXiv 1502.03167, algorithm 1, with

    y = max(a x + b + shortcut, 0)        a = weight / std, b = bias - a mean      (C,)

bench/results/batch_norm.csv compares both.
"""

from collections.abc import Callable

import numpy as np
import torch
from llvmlite import ir
from numba import config, prange, set_num_threads, types
from numba.extending import intrinsic
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .common import compiled

LANES = 128
"""Elements of a row of the table that the kernels go through: several pixels if there are fewer channels."""
PART = 2**16
"""Elements of the parts that are summed by themselves, so that sums do not depend on the number of threads."""
ZERO, INFINITY = np.float32(0), np.float32(np.inf)


def fuse_batch_norm(module: nn.Module) -> None:
    """Change the classes of batch norms and of timm's residual blocks to those below; parameters and names stay."""
    for part in module.modules():
        if type(part) in FUSED_BLOCKS and _is_plain(part):
            norms = [part.bn1, part.bn2] + ([part.bn3] if isinstance(part, Bottleneck) else [])
            part.__class__ = FUSED_BLOCKS[type(part)]
        elif type(part) is ResNet and type(part.act1) is nn.ReLU and type(part.bn1) is nn.BatchNorm2d:
            norms, part.act1 = [part.bn1], nn.Identity()
        else:
            continue
        for norm in norms:
            norm.__class__ = BatchNormReLU2d
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:  # of a shortcut, for example
            part.__class__ = BatchNorm2d


def _is_plain(block: nn.Module) -> bool:
    """Whether a block consists of convolutions, batch norms and ReLUs, and a shortcut."""
    names = ("1", "2", "3") if isinstance(block, Bottleneck) else ("1", "2")
    norms = all(type(getattr(block, f"bn{n}")) is nn.BatchNorm2d for n in names)
    relus = all(type(getattr(block, f"act{n}")) is nn.ReLU for n in names)
    between = type(block.drop_block) is nn.Identity and type(block.aa) is nn.Identity
    return norms and relus and between and block.se is None and block.drop_path is None


class BatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm; in training on a CPU, in bfloat16 or float32, by the kernels of this module."""

    relu = False

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """x, shortcut (N, C, H, W) -> (N, C, H, W), batch norm of x plus the shortcut where there is one."""
        learns = self.training and self.affine and self.track_running_stats and self.momentum is not None
        dtypes = {x.dtype} if shortcut is None else {x.dtype, shortcut.dtype}
        known = x.device.type == "cpu" and dtypes in ({torch.bfloat16}, {torch.float32})
        if not (learns and known and x.numel() > x.shape[1]):  # torch refuses a single pixel
            y = super().forward(x)
            y = y if shortcut is None else y + shortcut
            return y.relu() if self.relu else y
        self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, self.momentum, self.eps
        return Normalize.apply(x, shortcut, self.weight, self.bias, self.relu, *statistics)


class BatchNormReLU2d(BatchNorm2d):
    """The same, followed by ReLU."""

    relu = True


class FusedBasicBlock(BasicBlock):
    """timm's block of ResNet-10 to 34, with the ReLU in the batch norms."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(x), shortcut)


class FusedBottleneck(Bottleneck):
    """timm's block of deeper ResNets, with the ReLU in the batch norms."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        return self.bn3(self.conv3(x), shortcut)


FUSED_BLOCKS = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}


class Normalize(torch.autograd.Function):
    """forward(x (N, C, H, W), shortcut or None, weight (C,), bias (C,), relu, running mean (C,), running variance (C,),
    momentum, epsilon) -> y (N, C, H, W) in the dtype of x; updates the running statistics.

    With g = dy where y > 0, and x^ = (x - mean) / std,

        dshortcut = g    dbias = sum g    dweight = sum g x^    dx = a (g - (dbias + x^ dweight) / count)
    """

    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, relu, running_mean, running_var, momentum, eps):
        set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
        count = x.numel() // x.shape[1]  # pixels
        rows = Rows(x)
        table = rows(x)
        shift = x[0, :, 0, 0].double().numpy()  # small differences from a value of the channel keep float32's precision
        mean, square = rows.sum(moments, table, rows.repeat(shift)) / count
        variance = np.maximum(square - mean**2, 0)
        mean += shift
        std = np.sqrt(variance + eps)
        a = weight.detach().double().numpy() / std
        constants = rows.repeat(a), rows.repeat(bias.detach().double().numpy() - a * mean)
        floor = ZERO if relu else -INFINITY

        y = torch.empty_like(x, memory_format=torch.channels_last)
        if shortcut is None:
            normalize(table, *constants, floor, rows(y))
        else:
            normalize_and_add(table, rows(shortcut), *constants, floor, rows(y))

        running_mean.lerp_(torch.from_numpy(mean).to(running_mean), momentum)
        unbiased = torch.from_numpy(variance * count / (count - 1))
        running_var.lerp_(unbiased.to(running_var), momentum)
        ctx.save_for_backward(x, None if shortcut is None else y)
        ctx.constants = a, mean, std, *constants, floor
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        a, mean, std, *constants, floor = ctx.constants
        count = x.numel() // x.shape[1]
        rows = Rows(x)
        table = rows(x)
        grad_shortcut = None
        if y is None:
            g = rows(grad)
            sums = rows.sum(gradient_sums, table, g, *constants, floor, rows.repeat(mean))
        else:
            grad_shortcut = torch.empty_like(x, memory_format=torch.channels_last)
            g = rows(grad_shortcut)
            sums = rows.sum(clipped_gradient_sums, table, rows(grad), rows(y), floor, rows.repeat(mean), g)
            floor = -INFINITY  # g is clipped
        grad_bias, grad_weight = sums[0], sums[1] / std
        slope = -a / std * grad_weight / count
        offset = -a * grad_bias / count - slope * mean
        grad_x = torch.empty_like(x, memory_format=torch.channels_last)
        input_gradient(table, g, *constants, floor, rows.repeat(slope), rows.repeat(offset), rows(grad_x))
        grads = (torch.from_numpy(total.astype(np.float32)) for total in (grad_weight, grad_bias))
        return grad_x, grad_shortcut, *grads, *(None,) * 5


class Rows:
    """Activations (N, C, H, W) as a table (R, L) of numbers, channels last, and constants of channels as rows of it.

    Args:
        x: activations whose size and number of channels all others have.
    """

    def __init__(self, x: Tensor):
        self.channels, pixels = x.shape[1], x.numel() // x.shape[1]
        self.pixels = max(1, LANES // self.channels)  # of a row
        while pixels % self.pixels:
            self.pixels -= 1
        self.width = self.pixels * self.channels

    def __call__(self, x: Tensor) -> np.ndarray:
        """(N, C, H, W) -> (R, L) float32, or uint16 with the bits of bfloat16; the same memory if channels are last."""
        table = x.detach().permute(0, 2, 3, 1).reshape(-1, self.width)
        return (table.view(torch.uint16) if table.dtype is torch.bfloat16 else table).numpy()

    def repeat(self, constants: np.ndarray) -> np.ndarray:
        """(C,) -> (L,) float32."""
        return np.tile(constants.astype(np.float32), self.pixels)

    def sum(self, kernel: Callable, table: np.ndarray, *arguments) -> np.ndarray:
        """Two sums for every channel, which `kernel` computes for parts of the table: (2, C) float64."""
        part = max(1, PART // self.width)  # rows
        sums = np.empty((-(-len(table) // part), 2, self.width), np.float32)
        kernel(table, *arguments, part, sums)
        return sums.sum(0, np.float64).reshape(2, self.pixels, self.channels).sum(1)


@intrinsic
def wide(context, x):
    """float32 of a float32, or of a uint16 with the bits of a bfloat16."""

    def generate(context, builder, signature, arguments):
        if x == types.float32:
            return arguments[0]
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())

    return types.float32(x), generate


@intrinsic
def narrow(context, value, like):
    """The inverse of `wide`, for a result of the type of `like`; rounds to the nearest bfloat16, ties to even."""

    def generate(context, builder, signature, arguments):
        if like == types.float32:
            return arguments[0]
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        sixteen, half = ir.Constant(bits.type, 16), ir.Constant(bits.type, 0x7FFF)
        odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(bits.type, 1))
        return builder.trunc(builder.lshr(builder.add(bits, builder.add(odd, half)), sixteen), ir.IntType(16))

    return like(value, like), generate


@compiled(parallel=True, fastmath={"contract"})
def moments(x, shift, part, sums):
    """Sums of d and d^2, d = x - shift, over parts of the rows: sums (parts, 2, L)."""
    for p in prange(sums.shape[0]):
        first, second = np.zeros_like(shift), np.zeros_like(shift)
        for r in range(p * part, min((p + 1) * part, x.shape[0])):
            for c in range(x.shape[1]):
                d = wide(x[r, c]) - shift[c]
                first[c] += d
                second[c] += d * d
        sums[p, 0], sums[p, 1] = first, second


@compiled(parallel=True, fastmath={"contract"})
def normalize(x, a, b, floor, y):
    """y = max(a x + b, floor)."""
    for r in prange(x.shape[0]):
        for c in range(x.shape[1]):
            value = a[c] * wide(x[r, c]) + b[c]
            y[r, c] = narrow(floor if value <= floor else value, y[r, c])


@compiled(parallel=True, fastmath={"contract"})
def normalize_and_add(x, shortcut, a, b, floor, y):
    """y = max(a x + b + shortcut, floor)."""
    for r in prange(x.shape[0]):
        for c in range(x.shape[1]):
            value = a[c] * wide(x[r, c]) + b[c] + wide(shortcut[r, c])
            y[r, c] = narrow(floor if value <= floor else value, y[r, c])


@compiled(parallel=True, fastmath={"contract"})
def gradient_sums(x, dy, a, b, floor, mean, part, sums):
    """Sums of g and g (x - mean) over parts of the rows, g = dy where a x + b > floor: sums (parts, 2, L)."""
    for p in prange(sums.shape[0]):
        first, second = np.zeros_like(mean), np.zeros_like(mean)
        for r in range(p * part, min((p + 1) * part, x.shape[0])):
            for c in range(x.shape[1]):
                value = wide(x[r, c])
                g = ZERO if a[c] * value + b[c] <= floor else wide(dy[r, c])
                first[c] += g
                second[c] += g * (value - mean[c])
        sums[p, 0], sums[p, 1] = first, second


@compiled(parallel=True, fastmath={"contract"})
def clipped_gradient_sums(x, dy, y, floor, mean, g, part, sums):
    """The sums of `gradient_sums` where y > floor, and g itself."""
    for p in prange(sums.shape[0]):
        first, second = np.zeros_like(mean), np.zeros_like(mean)
        for r in range(p * part, min((p + 1) * part, x.shape[0])):
            for c in range(x.shape[1]):
                clipped = ZERO if wide(y[r, c]) <= floor else wide(dy[r, c])
                g[r, c] = narrow(clipped, g[r, c])
                first[c] += clipped
                second[c] += clipped * (wide(x[r, c]) - mean[c])
        sums[p, 0], sums[p, 1] = first, second


@compiled(parallel=True, fastmath={"contract"})
def input_gradient(x, dy, a, b, floor, slope, offset, dx):
    """dx = a g + slope x + offset, g = dy where a x + b > floor."""
    for r in prange(x.shape[0]):
        for c in range(x.shape[1]):
            value = wide(x[r, c])
            g = ZERO if a[c] * value + b[c] <= floor else wide(dy[r, c])
            dx[r, c] = narrow(a[c] * g + slope[c] * value + offset[c], dx[r, c])
