"""Batch norm over the global batch: with several processes, every rank uses the statistics of all ranks.

With statistics per rank, a network can recognize the positive by the local statistics that it shares with the anchor,
without learning useful features (arXiv 2002.05709, section 2.2, "Global BN").

`torch.nn.SyncBatchNorm` is not used: it refuses CPU tensors, and on a GPU the host waits for the device in every
forward pass, because a boolean mask filters out ranks with empty batches.
"""

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from .common import UserError

FROZEN = (FrozenBatchNormAct2d, FrozenBatchNorm2d)
all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
"""The same collective by the name that the installed torch does not warn about."""


def synchronize_batchnorm(module: nn.Module) -> nn.Module:
    """Convert every batch norm to a `SyncBatchNorm`, whose statistics span all ranks.

    Activation and dropout inside timm's fused norm layers are kept, and frozen batch norm is left alone. With one
    process the module is returned unchanged.

    Args:
        module: changed in place, except if it is a batch norm itself.

    Raises:
        UserError: a layer has statistics of the batch that cannot span ranks.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return module
    module = _convert(module, {})
    for layer in module.modules():
        # every rank would normalize by statistics of its own, and only those of rank 0 would be saved
        local = isinstance(layer, _BatchNorm) or getattr(layer, "running_var", None) is not None
        if local and not isinstance(layer, (SyncBatchNorm, *FROZEN)):
            raise UserError(
                f"{type(layer).__name__} can't synchronize its statistics over several processes; use one process or "
                "another encoder."
            )
    return module


def _convert(module: nn.Module, converted: dict[nn.Module, nn.Module]) -> nn.Module:
    """Recursive conversion to `SyncBatchNorm`; `converted` maps visited modules to their replacements."""
    if module in converted:  # a layer used in several places remains one layer
        return converted[module]
    result = module
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d):
        if module.momentum is None or not module.track_running_stats:
            raise UserError(
                "Batch norm without an exponential moving average of its statistics can't span ranks; use one process."
            )
        like = {"device": module.running_mean.device, "dtype": module.running_mean.dtype}
        result = SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine, **like)
        if isinstance(module, BatchNormAct2d):
            result.drop, result.act = module.drop, module.act
        result.train(module.training)
        result.load_state_dict(module.state_dict())
        for name, parameter in result.named_parameters():
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
    converted[module] = result
    for name, child in list(module._modules.items()):  # named_children() omits repeated children
        if child is not None:
            setattr(result, name, _convert(child, converted))
    return result


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose statistics span all ranks, without a host wait: one message in each direction.

    Eager CUDA tensors are normalized by torch's fused kernels, all others by tensor operations, which torch.compile
    fuses with their neighbors. Statistics are float32 where the input is bfloat16 or float16. Ranks may have batches
    of different sizes, but not empty ones. Parameters and buffers are those of `torch.nn.BatchNorm2d`.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or not input.numel():
            raise ValueError(f"batch norm over several processes expects (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) of this rank -> the same shape, normalized by the mean and variance of all ranks' batches."""
        if not self.training:
            return self._activate(super().forward(input))
        self._check_input_dim(input)
        self.num_batches_tracked += 1
        fused = input.is_cuda and not torch.compiler.is_compiling()
        normalize = FusedNormalize.apply if fused else normalize_in_tensor_operations
        statistics = self.running_mean, self.running_var
        return self._activate(normalize(input, self.weight, self.bias, *statistics, self.momentum, self.eps))

    def _activate(self, x: Tensor) -> Tensor:
        """Apply dropout and activation of the timm layer that this one replaces, if it had them."""
        return self.act(self.drop(x)) if hasattr(self, "act") else x


class FusedNormalize(torch.autograd.Function):
    """Normalization in the CUDA kernels behind `torch.nn.SyncBatchNorm`.

    forward(x (N, C, ...), weight (C,), bias (C,), running_mean (C,), running_var (C,), momentum, eps) -> (N, C, ...);
    updates the running statistics. The kernels compute

        y     = (x - mean) invstd weight + bias
        dx    = (dy - sum(dy) / n - (x - mean) invstd^2 sum(dy (x - mean)) / n) invstd weight

    where the sums run over the n values per channel of all ranks.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        x = _packed(x)
        channels = x.shape[1]
        mean, invstd = torch.batch_norm_stats(x, eps)  # (C,) each, of this rank
        count = mean.new_full((1,), x.numel() // channels)
        ranks = gather(torch.cat([mean, invstd, count]))  # (W, 2C + 1)
        means, invstds, counts = ranks.split([channels, channels, 1], dim=1)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, momentum, eps, counts.flatten()
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad, grad_x = _packed(grad), None
        wanted = ctx.needs_input_grad[:3]
        *sums, grad_weight, grad_bias = torch.batch_norm_backward_reduce(grad, x, mean, invstd, weight, *wanted)
        if wanted[0]:
            sums = torch.cat(sums)  # (2C,)
            dist.all_reduce(sums)
            grad_x = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, *sums.chunk(2), counts)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _packed(x: Tensor) -> Tensor:
    """The tensor in one of the two layouts that the fused kernels read without strides."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def normalize_in_tensor_operations(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """What `FusedNormalize` computes, for tensors on any device."""
    channels, axes = input.shape[1], [axis for axis in range(input.dim()) if axis != 1]
    shape = [1, channels] + [1] * (input.dim() - 2)
    x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    mean = x.mean(axes)
    variance = (x - mean.view(shape)).square().mean(axes)
    count = mean.new_full((1,), x.numel() // channels)
    ranks = Gather.apply(torch.cat([mean, variance, count]))  # (W, 2C + 1)
    means, variances, counts = ranks.split([channels, channels, 1], dim=1)
    n = counts.sum()
    mean = (counts / n * means).sum(0)
    # not E[x^2] - E[x]^2, which would cancel
    variance = (counts / n * (variances + (means - mean).square())).sum(0)
    with torch.no_grad():
        unbiased = variance * n / (n - 1).clamp(min=1)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    normalized = (x - mean.view(shape)) * torch.rsqrt(variance + eps).view(shape)
    if weight is not None:
        normalized = normalized * weight.view(shape) + bias.view(shape)
    return normalized.to(input.dtype)


def gather(x: Tensor) -> Tensor:
    """(k,) of this rank -> (world_size, k), the same on every rank."""
    ranks = x.new_empty(dist.get_world_size() * len(x))  # gloo takes flat tensors only
    all_gather(ranks, x)
    return ranks.view(-1, len(x))


class Gather(torch.autograd.Function):
    """Differentiable `gather`. Every rank's loss depends on this rank's row, so the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx, x):
        return gather(x)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]
