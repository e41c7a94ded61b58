"""Batch norm over the global batch: with several processes, every rank uses the statistics of all ranks.

With statistics per rank, a network can recognize the positive by the local statistics that it shares with the anchor,
without learning useful features (arXiv 2002.05709, section 2.2, "Global BN").
"""

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from .common import UserError


def synchronize_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Convert every batch norm to one whose statistics span all ranks.

    The replacement is `torch.nn.SyncBatchNorm` on a GPU and `CpuSyncBatchNorm` elsewhere. Activation and dropout inside
    timm's fused norm layers are kept, and frozen batch norm is left alone. With one process the module is returned
    unchanged.

    Args:
        module: changed in place, except if it is a batch norm itself.
        device: device that the module will be moved to.

    Raises:
        UserError: a layer has statistics of the batch that cannot span ranks.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return module
    # timm's conversion, because torch's would drop the activation inside timm's fused norm layers
    module = convert_sync_batchnorm(module) if device.type == "cuda" else _convert(module, {})
    for layer in module.modules():
        # every rank would normalize by statistics of its own, and only those of rank 0 would be saved
        local = isinstance(layer, _BatchNorm) or getattr(layer, "running_var", None) is not None
        if local and not isinstance(layer, SYNCHRONIZED + FROZEN):
            raise UserError(
                f"{type(layer).__name__} can't synchronize its statistics over several processes; use one process or "
                "another encoder."
            )
    return module


def _convert(module: nn.Module, converted: dict[nn.Module, nn.Module]) -> nn.Module:
    """Recursive conversion to `CpuSyncBatchNorm`; `converted` maps visited modules to their replacements."""
    if module in converted:  # a layer used in several places remains one layer
        return converted[module]
    result = module
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d):
        if module.momentum is None or not module.track_running_stats:
            raise UserError(
                "Batch norm without an exponential moving average of its statistics can't span ranks; use one process."
            )
        result = CpuSyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
        if isinstance(module, BatchNormAct2d):
            result.drop, result.act = module.drop, module.act
        result.to(module.running_mean.dtype).train(module.training)
        result.load_state_dict(module.state_dict())
        for name, parameter in result.named_parameters():
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
    converted[module] = result
    for name, child in list(module._modules.items()):  # named_children() omits repeated children
        if child is not None:
            setattr(result, name, _convert(child, converted))
    return result


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks whose gradient is summed too, because the statistics enter the loss of every rank."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class CpuSyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm` for CPU tensors, which torch's own refuses.

    All ranks must have batches of the same size. Parameters and buffers are those of `torch.nn.BatchNorm2d`.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm expects (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) of this rank -> the same shape, normalized by the mean and variance of all ranks' batches."""
        self._check_input_dim(input)
        if not self.training:
            return self._activate(super().forward(input))
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        world_size = dist.get_world_size()
        # two messages of C values instead of one with E[x] and E[x^2], whose difference would cancel
        mean = _SumOverRanks.apply(x.mean(axes)) / world_size
        centered = x - mean.view(shape)
        variance = _SumOverRanks.apply(centered.square().mean(axes)) / world_size
        if self.track_running_stats:
            with torch.no_grad():
                count = world_size * x.numel() // x.shape[1]
                unbiased = variance * count / max(count - 1, 1)
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        normalized = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return self._activate(normalized.to(input.dtype))

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply dropout and activation of the timm layer that this one replaces, if it had them."""
        return self.act(self.drop(x)) if hasattr(self, "act") else x


SYNCHRONIZED = (nn.SyncBatchNorm, CpuSyncBatchNorm)
FROZEN = (FrozenBatchNormAct2d, FrozenBatchNorm2d)
