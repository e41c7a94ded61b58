"""Runs that diverge or collapse: steps that can't be taken are skipped and counted, without asking the device."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .optim import laid_out_as

COUNTS = ("skipped_in_a_row", "longest_skipped", "skipped", "last_skipped")
"""Skipped steps: consecutive until now, the longest such run, the total, and the last one's number, from 1."""


class NonFiniteGuard:
    """Skips a step whose gradient is not finite: weights, optimizer states and running statistics stay as they were.

    The verdict is a scalar on the device, which torch's fused optimizers and `LARS` read there (`found_inf`, as under
    gradient scaling); the host sees it in `counts`. After DDP's averaging the gradients, and so the
    verdicts, are the same on all ranks.

    Args:
        module: what is trained.
        optimizers: that take the steps, together all of its parameters.
        device: where they are.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer], device: torch.device):
        self.optimizers = list(optimizers)
        self.parameters = [w for each in self.optimizers for group in each.param_groups for w in group["params"]]
        self.buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self.kept: list[Tensor] = []
        self.counts = torch.zeros(len(COUNTS), device=device)

    def before_forward(self) -> None:
        """Keep the running statistics: a forward pass that overflows would spoil them for good."""
        self.kept = [torch.cat([buffer.flatten() for buffer in self.buffers])] if self.buffers else []

    def after_backward(self, step: int) -> tuple[Tensor, Tensor]:
        """Judge the gradients and tell the optimizers.

        Args:
            step: that is about to be completed, counted from 1.

        Returns:
            whether the step is taken, () bool, and the norm of the first optimizer's gradients, (); both on the device.
            An online probe has an optimizer of its own, so the norm is that of the network alone.
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
            row, longest, count, last = self.counts.unbind()
            row = (row + 1) * skipped
            last = torch.where(taken, last, float(step))
            self.counts = torch.stack([row, torch.maximum(row, longest), count + skipped, last])
        return taken, norm

    def load(self, counts: Tensor) -> None:
        """Continue with the counts of a checkpoint; its longest run of skipped steps is no longer held against it."""
        row, _, count, last = counts.unbind()
        self.counts = torch.stack([row, row, count, last])

    def counts_by_name(self) -> dict[str, Tensor]:
        """The entries of `counts`, each () on the device."""
        return dict(zip(COUNTS, self.counts.unbind(), strict=True))

    def weights_are_finite(self) -> bool:
        """Whether all weights are finite; the host waits for the device."""
        return bool(torch.stack(torch._foreach_norm([w.detach() for w in self.parameters])).isfinite().all())


class CollapseWatch:
    """Notices a loss that stands at the value it has when the outputs for all images are alike.

    Args:
        chance: that value; ln(2B - 1) for NT-Xent, whose positive is then one of 2B - 1 equals.
        patience_steps: for how many steps the loss has to stand there.
    """

    def __init__(self, collapse_loss: float, patience_steps: int = 100):
        self.collapse_loss, self.patience_steps = collapse_loss, patience_steps
        self.since, self.reported = None, False

    def collapsed(self, step: int, loss: float) -> bool:
        """Whether this mean loss until `step` completes a collapse; True once only."""
        if not abs(loss - self.collapse_loss) <= 1e-3 * self.collapse_loss:  # nor is nan one
            self.since = None
            return False
        self.since = step if self.since is None else self.since
        now = not self.reported and step - self.since >= self.patience_steps
        self.reported |= now
        return now
