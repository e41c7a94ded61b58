"""Muon: momentum whose matrices are orthogonalized, for few epochs on one machine."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of x <- a x + b x^3 + c x^5, which raises small singular values fastest (Jordan et al. 2024)."""
ITERATIONS = 5
VECTOR_LR = 0.1
"""Learning rate of AdamW for biases and normalization parameters, as a fraction of that of the matrices."""


class Muon(Optimizer):
    """Momentum orthogonalized by Newton-Schulz iterations (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    For a weight w, as a matrix of its first dimension by all others, with gradient g:

        m <- momentum * m + (1 - momentum) * g
        u  = momentum * m + (1 - momentum) * g                                    as with Nesterov's momentum
        o  = U V^T of u = U S V^T, with singular values of about 0.7 to 1.2 instead of 1
        w <- (1 - lr * weight_decay) * w - lr * sqrt(max(1, rows / columns)) * o

    Groups that do not adapt (biases, normalization parameters, new classifiers) are updated by AdamW with betas
    (0.9, 0.95) and a tenth of the learning rate. `torch.optim.Muon` takes matrices alone and cannot skip a step
    without waiting for the device.

    Args:
        params: parameters or groups; the option `adapt` of a group (default True) enables orthogonalization.
        lr: learning rate of the matrices, whose updates have singular values of about this size.
        momentum: of the matrices.
        weight_decay: decoupled, as with AdamW.
        dtype: in which matrices are multiplied.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0):  # also refuses nan
            raise ValueError(f"lr {lr}, momentum {momentum} or weight_decay {weight_decay} is out of range")
        # "fused": `load_state_dict` moves "step" to the device of the weights only in groups with this option
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype}
        super().__init__(params, defaults | {"adapt": True, "fused": True})

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters, with a state of zeros: a first step that is skipped would leave none."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for w in group["params"]:
            names = ["momentum_buffer"] if group["adapt"] else ["exp_avg", "exp_avg_sq"]
            self.state[w] = {name: torch.zeros_like(w) for name in names}
            if not group["adapt"]:
                self.state[w]["step"] = torch.zeros((), device=w.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters without waiting for the device; none if `found_inf` is 1."""
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if weights:
                (self._step_matrices if group["adapt"] else self._step_vectors)(weights, group)

    def _step_matrices(self, weights: list[Tensor], group: dict) -> None:
        buffers = [self.state[w]["momentum_buffer"] for w in weights]
        gradients = [w.grad for w in weights]
        skipped, rest = getattr(self, "found_inf", None), 1 - group["momentum"]
        if skipped is not None:  # keep the buffers, whatever the gradients are
            gradients = [torch.where(skipped > 0, m, g) for m, g in zip(buffers, gradients, strict=True)]
        torch._foreach_lerp_(buffers, gradients, rest)
        updates = torch._foreach_lerp(buffers, gradients, rest)
        lr = group["lr"] if skipped is None else group["lr"] * (1 - skipped)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        for places in _same_shape(updates):  # one multiplication for all layers of a shape
            stacked = orthogonalize(torch.stack([updates[place].flatten(1) for place in places]), group["dtype"])
            stacked *= lr * max(1, stacked.shape[1] / stacked.shape[2]) ** 0.5
            for place, update in zip(places, stacked, strict=True):
                weights[place].sub_(update.view(weights[place].shape))

    def _step_vectors(self, weights: list[Tensor], group: dict) -> None:
        states = [self.state[w] for w in weights]
        steps, skipped = [state["step"] for state in states], getattr(self, "found_inf", None)
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            weights,
            [w.grad for w in weights],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=VECTOR_LR * group["lr"],
            beta1=0.9,
            beta2=0.95,
            weight_decay=group["weight_decay"],
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=skipped,
        )
        if skipped is not None:
            torch._foreach_sub_(steps, [skipped] * len(steps))


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Replace the singular values of each matrix by values near 1.

    Args:
        matrices: (n, rows, columns) float.
        dtype: in which they are multiplied.

    Returns:
        (n, rows, columns), of the dtype of `matrices`. Singular values of at least 1 % of a matrix's norm become 0.67
        to 1.21; a matrix of zeros stays one.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _same_shape(tensors: list[Tensor]) -> list[list[int]]:
    """Places of the tensors of each shape."""
    places: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.shape, []).append(place)
    return list(places.values())
