"""Optimizers: LARS in the form SimCLR was trained with, beside torch's SGD and AdamW."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from .common import UserError, check_range


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate of the network; the online probe has its own."""

    name: Literal["lars", "sgd", "nesterov", "adamw"] = "lars"
    """Optimizer. lars: layer-wise adaptive rate scaling, for large batches."""
    lr: float = 0.3
    """Base learning rate, scaled by batch/256 (linear), sqrt(batch) (sqrt) or unscaled (none)."""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the learning rate grows with the batch size."""
    momentum: float = 0.9
    """Momentum of LARS and SGD; first beta of AdamW."""
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
        r  =  trust_coefficient * |w| / |g|        (1 where a norm is 0, or for parameters that don't adapt)
        m  <- momentum * m + lr * r * g            the learning rate lies inside the momentum buffer
        w  <- w - m

    A change of learning rate therefore reaches past gradients only as they were scaled then; and the trust ratio comes
    from the gradient *after* decay, also where the decay is 0.

    Args:
        params: parameters or groups; a group's `adapt` (default True) says whether r is used.
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
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0):  # nan is refused as well
            raise ValueError(f"lr {lr}, momentum {momentum} or weight_decay {weight_decay} is out of range")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; no value is brought to the host."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            buffers = []  # the kernel refuses any where there is no momentum
            if group["momentum"]:
                _begin_at_rest(self, weights)
                buffers = [self.state[w]["momentum_buffer"] for w in weights]
            # the multi-tensor kernels take all layers at once: hundreds of launches become a handful
            gradients = [laid_out_as(w, w.grad) for w in weights]
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            if group["adapt"]:
                ratios = self._trust_ratios(weights, gradients, group["trust_coefficient"])
                torch._foreach_mul_(gradients, list((group["lr"] * ratios).unbind()))
            else:
                torch._foreach_mul_(gradients, group["lr"])
            # SGD's kernel with lr = 1 does the formula's last two lines at once, and nothing where `found_inf` is 1
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
        return loss

    @staticmethod
    def _trust_ratios(weights: list[torch.Tensor], gradients: list[torch.Tensor], coefficient: float) -> torch.Tensor:
        weight_norms = torch.stack(torch._foreach_norm(weights))
        gradient_norms = torch.stack(torch._foreach_norm(gradients))
        ratios = coefficient * weight_norms / gradient_norms
        return torch.where((weight_norms > 0) & (gradient_norms > 0), ratios, torch.ones_like(ratios))  # (layers,)


def laid_out_as(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient with the weight's strides: torch's fused kernels on a CPU would pair the wrong elements."""
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def _begin_at_rest(optimizer: Optimizer, weights: Iterable[torch.Tensor]) -> None:
    """Momentum 0 where there is none yet: made by the first step, it would be left unwritten if that is skipped."""
    for w in weights:
        if "momentum_buffer" not in optimizer.state[w]:
            optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)


def parameter_groups(
    modules: Iterable[nn.Module], weight_decay: float, new_layer: nn.Linear | None = None
) -> list[dict]:
    """Weights that decay and adapt, apart from biases and normalization parameters, which do neither.

    The second kind are recognized by having at most one dimension, as they do in every timm encoder.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    if new_layer is not None:  # decays but does not adapt, as in the official code
        groups.append({"params": [new_layer.weight], "weight_decay": weight_decay, "adapt": False})
        groups.append({"params": [new_layer.bias], "weight_decay": 0.0, "adapt": False})
    return groups


def create_optimizer(config: OptimConfig, groups: list[dict], lr: float) -> Optimizer:
    """`lars`, `sgd`, `nesterov` or `adamw` (betas 0.9, 0.95 as usual for large-batch self-supervision).

    All of them skip a step where their attribute `found_inf` is 1 (see `engine.nonfinite`).
    """
    momentum = config.momentum
    if config.name == "lars":
        return LARS(groups, lr, momentum)
    groups = [{key: value for key, value in group.items() if key != "adapt"} for group in groups]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(momentum, 0.95), fused=True)
    optimizer = torch.optim.SGD(groups, lr, momentum, nesterov=config.name == "nesterov", fused=True)
    if momentum:
        _begin_at_rest(optimizer, [w for group in optimizer.param_groups for w in group["params"]])
    return optimizer
