"""Batch norm over the global batch: under several processes each rank must see the statistics of all of them.

Statistics of its own slice alone let a network find the positive by the leak of local statistics (arXiv 2002.05709,
section 2.2, "Global BN").
"""

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn

from errors import UserError


def synchronise_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch norm's statistics span all ranks: torch's SyncBatchNorm on a GPU, ours elsewhere."""
    if device.type == "cuda":
        return convert_sync_batchnorm(module)  # timm's: torch's would drop the activation inside timm's own norms
    return _convert(module)


def _convert(module: nn.Module) -> nn.Module:
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
        if module.momentum is None or not module.track_running_stats:
            raise UserError("Batch norm without exponential running statistics can't span ranks: use one process.")
        synchronised = HostSyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
        synchronised.to(module.running_mean.dtype).train(module.training)
        synchronised.load_state_dict(module.state_dict())
        for name, parameter in synchronised.named_parameters():
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
        return synchronised
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise UserError(f"{type(module).__name__} can't span ranks on the CPU: use one process or another encoder.")
    for name, child in module.named_children():
        setattr(module, name, _convert(child))
    return module


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


class HostSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`torch.nn.SyncBatchNorm` for ranks without a GPU, which torch's own refuses. Equal batches on every rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm expects (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) of this rank -> the same shape, normalised by mean and variance over all ranks."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        world_size = dist.get_world_size()
        # the mean first and the variance around it: two small messages, no cancellation as in E[x^2] - E[x]^2
        mean = _SumOverRanks.apply(x.mean(axes)) / world_size
        centred = x - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().mean(axes)) / world_size
        if self.track_running_stats:
            with torch.no_grad():
                count = world_size * x.numel() // x.shape[1]
                unbiased = variance * count / max(count - 1, 1)
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)
