"""Batch norm over the global batch: under several processes each rank must see the statistics of all of them.

Statistics of its own slice alone let a network find the positive by the leak of local statistics (arXiv 2002.05709,
section 2.2, "Global BN").
"""

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from .common import UserError


def synchronize_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch norm's statistics span all ranks: torch's SyncBatchNorm on a GPU, ours elsewhere.

    Activation and dropout inside timm's fused norm layers are kept; frozen batch norm has nothing to synchronize. With
    one process the module is returned unchanged.

    Raises:
        UserError: a layer has running statistics that can't span ranks.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return module
    # timm's conversion, since torch's would drop the activation inside timm's own norms
    module = convert_sync_batchnorm(module) if device.type == "cuda" else _convert(module, {})
    for layer in module.modules():
        # each rank would normalize by its own statistics, and only those of rank 0 would be saved
        local = isinstance(layer, _BatchNorm) or getattr(layer, "running_var", None) is not None
        if local and not isinstance(layer, SYNCHRONIZED + FROZEN):
            raise UserError(
                f"{type(layer).__name__} can't take its statistics over several processes: use one process or another "
                "encoder."
            )
    return module


def _convert(module: nn.Module, converted: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in converted:  # a layer used in several places remains one layer
        return converted[module]
    result = module
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d):
        if module.momentum is None or not module.track_running_stats:
            raise UserError("Batch norm without exponential running statistics can't span ranks: use one process.")
        result = CpuSyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
        if isinstance(module, BatchNormAct2d):
            result.drop, result.act = module.drop, module.act
        result.to(module.running_mean.dtype).train(module.training)
        result.load_state_dict(module.state_dict())
        for name, parameter in result.named_parameters():
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
    converted[module] = result
    for name, child in list(module._modules.items()):  # named_children() leaves out the second place of a child
        if child is not None:
            setattr(result, name, _convert(child, converted))
    return result


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward: every rank's statistics reach the loss of every rank."""

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
    """`torch.nn.SyncBatchNorm` for ranks without a GPU, which torch's own refuses. Equal batches on every rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm expects (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) of this rank -> the same shape, normalized by mean and variance over all ranks."""
        self._check_input_dim(input)
        if not self.training:
            return self._activate(super().forward(input))
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        world_size = dist.get_world_size()
        # the mean first and the variance around it: two small messages, no cancellation as in E[x^2] - E[x]^2
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
        """Dropout and activation of the fused layer in whose place this one stands, if it was one."""
        return self.act(self.drop(x)) if hasattr(self, "act") else x


SYNCHRONIZED = (nn.SyncBatchNorm, CpuSyncBatchNorm)
FROZEN = (FrozenBatchNormAct2d, FrozenBatchNorm2d)
