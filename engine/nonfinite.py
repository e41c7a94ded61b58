"""Detection of divergence and collapse without waiting for the device."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .optim import laid_out_as

COUNTS = ("skipped_in_a_row", "longest_skipped", "skipped", "last_skipped")
"""Skipped steps: consecutive until now, the longest such run, the total, and the last one's number, from 1."""


class NonFiniteGuard:
    """Skips steps whose gradient is not finite: weights, optimizer states and running statistics do not change.

    The decision is a scalar on the device, read there by torch's fused optimizers, `LARS` and `Muon` (`found_inf`, as
    with gradient scaling); the host sees it in `counts`. DDP averages gradients first, so all ranks decide alike.

    Args:
        module: network that is trained.
        optimizers: optimizers that together own all of its parameters.
        device: device of the parameters.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer], device: torch.device):
        self.optimizers = list(optimizers)
        self.parameters = [w for each in self.optimizers for group in each.param_groups for w in group["params"]]
        self.buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self.kept: list[Tensor] = []
        self.counts = torch.zeros(len(COUNTS), device=device)

    def before_forward(self) -> None:
        """Save the running statistics, which a forward pass that overflows would destroy."""
        self.kept = [torch.cat([buffer.flatten() for buffer in self.buffers])] if self.buffers else []

    def after_backward(self, step: int) -> tuple[Tensor, Tensor]:
        """Check the gradients and tell the optimizers whether to step.

        Args:
            step: number of the step in progress, from 1.

        Returns:
            Whether the step is taken, () bool, and the gradient norm of the first optimizer's parameters, (), on the
            device. An online probe has its own optimizer, so the norm is that of the network.
        """
        with torch.no_grad():
            gradients = []
            for w in self.parameters:
                if w.grad is not None:
                    w.grad = laid_out_as(w, w.grad)
                    gradients.append(w.grad)
            norms = torch.stack(torch._foreach_norm(gradients))
            network = sum(w.grad is not None for group in self.optimizers[0].param_groups for w in group["params"])
            norm = torch.linalg.vector_norm(norms[:network])
            taken = torch.linalg.vector_norm(norms).isfinite()
            skipped = 1 - taken.float()
            for optimizer in self.optimizers:
                optimizer.found_inf = skipped
            for kept in self.kept:
                now = torch.cat([buffer.flatten() for buffer in self.buffers])
                parts = torch.where(taken, now, kept).split([buffer.numel() for buffer in self.buffers])
                shaped = [part.view_as(buffer) for part, buffer in zip(parts, self.buffers, strict=True)]
                torch._foreach_copy_(self.buffers, shaped)
            before = self.counts_by_name()
            in_a_row = (before["skipped_in_a_row"] + 1) * skipped
            longest = torch.maximum(in_a_row, before["longest_skipped"])
            last = torch.where(taken, before["last_skipped"], float(step))
            self.counts = torch.stack([in_a_row, longest, before["skipped"] + skipped, last])
        return taken, norm

    def load(self, counts: Tensor) -> None:
        """Continue with the counts of a checkpoint; its longest run of skipped steps is no longer held against it."""
        self.counts = counts.clone()
        self.counts[COUNTS.index("longest_skipped")] = counts[COUNTS.index("skipped_in_a_row")]

    def counts_by_name(self) -> dict[str, Tensor]:
        """The entries of `counts`, each () on the device."""
        return dict(zip(COUNTS, self.counts.unbind(), strict=True))

    def weights_are_finite(self) -> bool:
        """Whether all weights are finite; the host waits for the device."""
        return bool(torch.stack(torch._foreach_norm([w.detach() for w in self.parameters])).isfinite().all())


class CollapseWatch:
    """Detects a loss that stays at its value for identical outputs.

    Args:
        collapse_loss: that value; ln(2B - 1) for NT-Xent, where the positive is one of 2B - 1 equal candidates.
        patience_steps: number of steps for which the loss must stay there.
    """

    def __init__(self, collapse_loss: float, patience_steps: int = 100):
        self.collapse_loss, self.patience_steps = collapse_loss, patience_steps
        self.since, self.reported = None, False

    def collapsed(self, step: int, loss: float) -> bool:
        """Whether the mean loss until `step` completes a collapse; True only once."""
        if not abs(loss - self.collapse_loss) <= 1e-3 * self.collapse_loss:  # nan is no collapse
            self.since = None
            return False
        self.since = step if self.since is None else self.since
        now = not self.reported and step - self.since >= self.patience_steps
        self.reported |= now
        return now
