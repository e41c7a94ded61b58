"""Temperature of NT-Xent: a number, or a parameter of the model."""

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .ntxent import LEARNED_RANGE, LossConfig


class Temperature(nn.Module):
    """Temperature of a run, which may be learned as in CLIP (arXiv 2103.00020, section 2.3).

    The parameter is log(1 / tau), so that a step changes tau by a factor. As a part of the model, its gradient is
    averaged over ranks, and checkpoints hold it.

    Args:
        config: initial value, and whether it is learned.
    """

    def __init__(self, config: LossConfig):
        super().__init__()
        self.initial = config.temperature
        self.log_scale = nn.Parameter(torch.tensor(-math.log(self.initial))) if config.learn_temperature else None

    def forward(self) -> float | Tensor:
        """tau: a number or, if it is learned, a () float32 on the device of the model."""
        return self.initial if self.log_scale is None else torch.exp(-self.log_scale)

    def optimizer(self) -> Optimizer:
        """Adam, whose steps do not grow with the gradient: one changes tau by about 0.1 %; after each, tau is clamped.

        The network's optimizer would not do. The learning rates of LARS, near 1 and above, are for layers whose steps
        are divided by the norm of their gradient, and weight decay would pull tau towards 1.
        """
        optimizer = AdamW([self.log_scale], lr=1e-3, weight_decay=0.0, fused=True)
        optimizer.register_step_post_hook(lambda *_: self._clamp())
        return optimizer

    @torch.no_grad()
    def _clamp(self) -> None:
        smallest, largest = LEARNED_RANGE
        self.log_scale.clamp_(-math.log(largest), -math.log(smallest))
