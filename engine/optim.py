"""Optimizers: LARS as used by SimCLR, Muon, and torch's SGD and AdamW."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from .common import UserError, check_range
from .muon import Muon

ROW = 1024
"""Elements of a row of LARS's scratch memory."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate of the network; the online probe has its own."""

    name: Literal["lars", "sgd", "nesterov", "adamw", "muon"] = "lars"
    """Optimizer. lars: layer-wise adaptive rate scaling, for large batches. muon: orthogonalized momentum, for short
    runs; use --optim.scaling none, an --optim.lr near 0.05 and --optim.momentum 0.95."""
    lr: float = 0.3
    """Base learning rate, scaled by batch/256 (linear), sqrt(batch) (sqrt) or unscaled (none)."""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the learning rate grows with the batch size."""
    momentum: float = 0.9
    """Momentum of LARS, SGD and Muon; first beta of AdamW."""
    weight_decay: float = 1e-6
    """Weight decay, except of biases and normalization parameters."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up, at most a tenth of the run; a cosine decay to 0 follows."""

    def __post_init__(self) -> None:
        check_range("--optim.lr", self.lr, 0, 1e30)
        check_range("--optim.momentum", self.momentum, 0, 0.9999)
        check_range("--optim.weight-decay", self.weight_decay, 0, 1000)
        check_range("--optim.warmup-epochs", self.warmup_epochs, 0, 10**9)
        if self.name == "nesterov" and not self.momentum:
            raise UserError("--optim.momentum is 0.0; it must be above 0 for nesterov.")


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888) as in SimCLR's official code.

    For a weight w with gradient g:

        g  <- g + weight_decay * w
        r  =  trust_coefficient * |w| / |g|        (1 where a norm is 0, and for groups that do not adapt)
        m  <- momentum * m + lr * r * g            the learning rate is inside the momentum buffer
        w  <- w - m

    A change of the learning rate therefore does not rescale past gradients, and the trust ratio is computed from the
    gradient *after* decay, also if the decay is 0.

    Args:
        params: parameters or groups; the option `adapt` of a group (default True) enables the trust ratio.
        lr: global learning rate.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ):
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0):  # also refuses nan
            raise ValueError(f"lr {lr}, momentum {momentum} or weight_decay {weight_decay} is out of range")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)
        self.scratch: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]] = {}

    def __getstate__(self) -> dict:
        """State of a copy or a pickle, of which `Optimizer` would leave out the scratch memory."""
        return super().__getstate__() | {"scratch": {}}

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters without waiting for the device."""
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            buffers = []  # as the kernel requires if momentum is 0
            if group["momentum"]:
                _init_momentum(self, weights)
                buffers = [self.state[w]["momentum_buffer"] for w in weights]
            # multi-tensor kernels process all layers in a handful of launches instead of hundreds
            rows, owner, gradients = self._scratch(weights)
            torch._foreach_copy_(gradients, [w.grad for w in weights])
            torch._foreach_add_(gradients, weights, alpha=group["weight_decay"])
            ratios = rows.new_ones(len(weights))
            if group["adapt"]:
                ratios = self._trust_ratios(weights, gradients, group["trust_coefficient"])
            rows.mul_((group["lr"] * ratios)[owner, None])
            # with lr = 1 this kernel computes the last two lines of the formula, and nothing if `found_inf` is 1
            torch._fused_sgd_(
                weights,
                gradients,
                buffers,
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=1.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                grad_scale=None,
                found_inf=getattr(self, "found_inf", None),
            )

    def _scratch(self, weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Memory for the gradients of all layers, in which one kernel scales each layer by a number on the device.

        No multi-tensor kernel does so. A layer owns whole rows, which also keeps its start aligned for wide loads.

        Returns:
            The rows (r, ROW), the number of the layer that owns each row (r,), and the gradients as views of the rows.
        """
        key = tuple(map(id, weights))
        if key not in self.scratch:
            counts = [-(-w.numel() // ROW) for w in weights]
            rows = weights[0].new_zeros(sum(counts), ROW)
            # filled on the device, because the host would wait for a copy
            owner = torch.cat([rows.new_full((n,), layer, dtype=torch.int64) for layer, n in enumerate(counts)])
            parts = zip(weights, rows.split(counts), strict=True)
            gradients = [part.as_strided(w.shape, w.stride(), part.storage_offset()) for w, part in parts]
            self.scratch[key] = rows, owner, gradients
        return self.scratch[key]

    @staticmethod
    def _trust_ratios(weights: list[torch.Tensor], gradients: list[torch.Tensor], coefficient: float) -> torch.Tensor:
        weight_norms = torch.stack(torch._foreach_norm(weights))
        gradient_norms = torch.stack(torch._foreach_norm(gradients))
        ratios = coefficient * weight_norms / gradient_norms
        return torch.where((weight_norms > 0) & (gradient_norms > 0), ratios, torch.ones_like(ratios))  # (layers,)


def laid_out_as(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient with the weight's strides; torch's fused CPU kernels pair elements by their position in memory."""
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def _init_momentum(optimizer: Optimizer, weights: Iterable[torch.Tensor]) -> None:
    """Create missing momentum buffers as zeros; a first step that is skipped would leave them uninitialized."""
    for w in weights:
        if "momentum_buffer" not in optimizer.state[w]:
            optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)


def parameter_groups(
    modules: Iterable[nn.Module], weight_decay: float, new_layer: nn.Linear | None = None
) -> list[dict]:
    """Parameter groups: weights decay and adapt, biases and normalization parameters do neither.

    The latter are the parameters with at most one dimension, as in nearly every timm encoder.

    Args:
        modules: networks to optimize.
        weight_decay: of the weights.
        new_layer: linear layer that is trained from scratch on a pretrained network; decays but does not adapt.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    if new_layer is not None:  # as in the official code
        groups.append({"params": [new_layer.weight], "weight_decay": weight_decay, "adapt": False})
        groups.append({"params": [new_layer.bias], "weight_decay": 0.0, "adapt": False})
    return groups


def create_optimizer(
    config: OptimConfig, groups: list[dict], lr: float, dtype: torch.dtype = torch.float32
) -> Optimizer:
    """Create the configured optimizer; AdamW has betas (momentum, 0.95), usual for large-batch self-supervision.

    All of them skip a step if their attribute `found_inf` is 1, see `engine.nonfinite`.

    Args:
        config: optimizer options.
        groups: see `parameter_groups`.
        lr: learning rate of the first step.
        dtype: in which Muon multiplies matrices.
    """
    momentum = config.momentum
    if config.name == "muon":
        return Muon(groups, lr, momentum, dtype=dtype)
    if config.name == "lars":
        return LARS(groups, lr, momentum)
    groups = [{key: value for key, value in group.items() if key != "adapt"} for group in groups]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(momentum, 0.95), fused=True)
    optimizer = torch.optim.SGD(groups, lr, momentum, nesterov=config.name == "nesterov", fused=True)
    if momentum:
        _init_momentum(optimizer, [w for group in optimizer.param_groups for w in group["params"]])
    return optimizer
