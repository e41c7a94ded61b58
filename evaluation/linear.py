"""Multinomial logistic regression on stored features, solved to convergence (the fast linear protocol).

Features are standardized per dimension by the mean and standard deviation of the training set: one penalty then means
the same for every dimension and every encoder, whatever the scale of its features, and L-BFGS needs fewer steps. The
penalty is chosen on a part of the training set that is kept apart for it; the test set has no say.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .accuracy import classes_ahead, top_n
from .common import UserError

L2_PATH = tuple(10.0 ** (-half / 2) for half in range(-4, 13))
"""From 100 to 1e-6 in half decades: strong penalties are solved quickly and each solution begins the next."""
BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class Split:
    """Some rows of stored features, seen standardized and in blocks, so that they need not fit on the device."""

    features: Tensor
    """(N, D) float, on any device or mapped into memory."""
    label: Tensor
    """(N,) int64."""
    mean: Tensor
    """(D,) float64, subtracted."""
    scale: Tensor
    """(D,) float64, multiplied by."""
    device: torch.device
    rows: Tensor | None = None
    """(n,) int64 ascending, on the device of the features: those in use. None for all."""

    def __len__(self) -> int:
        return len(self.features if self.rows is None else self.rows)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, D) float64 features and (n,) labels."""
        for first in range(0, len(self), BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS) if self.rows is None else self.rows[first : first + BLOCK_ROWS]
            x = (self.features[rows].to(self.device).double() - self.mean) * self.scale
            yield x, self.label[rows].to(self.device)


@dataclass(frozen=True)
class Fit:
    """A linear classifier and how well it was solved for."""

    theta: Tensor
    """(C, D + 1) float64: weights, and the bias in the last column."""
    l2: float
    gradient: float
    """The largest component of the objective's gradient, in size."""
    iterations: int
    converged: bool
    """Whether `gradient` is within the tolerance."""


def standardization(features: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean (D,) and inverse standard deviation (D,), float64; 0 where a dimension never varies."""

    def mean_of(of) -> Tensor:
        sums = sum(of(block.to(device).double()).sum(0) for block in features.split(BLOCK_ROWS))
        return sums / len(features)

    mean = mean_of(lambda block: block)
    variance = mean_of(lambda block: (block - mean).square())  # around the mean: E[x^2] - E[x]^2 would cancel
    constant = variance <= (torch.finfo(features.dtype).eps * mean).square()  # but for rounding
    scale = torch.where(constant, 0.0, variance.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())
    return mean, scale


def logistic_regression(
    train: Split,
    classes: int,
    l2: float,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> Fit:
    """Minimise mean cross-entropy + l2 / 2 * |weights|^2 by full-batch L-BFGS; the bias is not penalised.

    This is scikit-learn's LogisticRegression with C = 1 / (l2 n) for n samples. All is computed in float64: the line
    search compares objectives, and near the solution those of single precision can no longer be told apart.

    Args:
        start: (C, D + 1) from which to begin; None for zeros.
        tolerance: of the largest component of the gradient.
        max_iterations: after which the fit is given back unconverged.
    """
    width = train.features.shape[1]
    theta = (
        torch.zeros(classes, width + 1, dtype=torch.float64, device=train.device) if start is None else start.clone()
    )

    def objective() -> Tensor:
        loss, theta.grad = _loss_and_gradient(train, theta, l2)
        return loss

    solver = torch.optim.LBFGS(
        [theta],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0,  # only the gradient says that it is solved
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    solver.step(objective)
    gradient = _loss_and_gradient(train, theta, l2)[1].abs().max().item()
    return Fit(theta, l2, gradient, solver.state[theta]["n_iter"], gradient <= tolerance)


@torch.no_grad()
def _loss_and_gradient(train: Split, theta: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """The objective () and its gradient (C, D + 1)."""
    weight = theta[:, :-1]
    loss, gradient = 0.5 * l2 * weight.square().sum(), torch.zeros_like(theta)
    for x, label in train.blocks():
        logits = _logits(theta, x)  # (n, C)
        loss += cross_entropy(logits, label, reduction="sum") / len(train)
        residual = logits.softmax(1)
        residual[torch.arange(len(label), device=label.device), label] -= 1  # d cross-entropy / d logits
        gradient[:, :-1] += residual.T @ x / len(train)
        gradient[:, -1] += residual.sum(0) / len(train)
    gradient[:, :-1] += l2 * weight
    return loss, gradient


def _logits(theta: Tensor, x: Tensor) -> Tensor:
    """(C, D + 1) and (n, D) -> (n, C)."""
    return torch.addmm(theta[:, -1], x, theta[:, :-1].T)


@torch.no_grad()
def correct(fit: Fit, split: Split) -> tuple[int, int]:
    """How many samples are classified rightly at top-1 and top-5."""
    top1, top5 = 0, 0
    for x, label in split.blocks():
        ahead = classes_ahead(_logits(fit.theta, x), label)
        top1, top5 = top1 + int((ahead < 1).sum()), top5 + int((ahead < top_n(len(fit.theta))).sum())
    return top1, top5


def l2_path(
    train: Split, held_out: Split, classes: int, path: Sequence[float] = L2_PATH, max_iterations: int = 1000
) -> Iterator[tuple[Fit, float]]:
    """A fit for every l2 and its top-1 on the part that was kept apart, each fit begun where the one before ended.

    Solved less tightly than the final fit, for only their order matters.
    """
    fit = None
    for l2 in path:
        start = None if fit is None else fit.theta
        fit = logistic_regression(train, classes, l2, start, tolerance=1e-4, max_iterations=max_iterations)
        yield fit, correct(fit, held_out)[0] / len(held_out)


def stratified_split(label: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to learn from and rows kept apart, ascending (int64): `share` of every class, drawn by seed.

    Of a class with two samples or more at least one is kept apart and at least one is not.
    """
    random, label = np.random.default_rng(seed), label.cpu().numpy()
    apart = np.zeros(len(label), bool)
    for each in np.unique(label):
        rows = np.flatnonzero(label == each)
        apart[random.permutation(rows)[: min(max(round(share * len(rows)), 1), len(rows) - 1)]] = True
    return torch.from_numpy(np.flatnonzero(~apart)), torch.from_numpy(np.flatnonzero(apart))


def near(features: Tensor, label: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """On the GPU if that leaves half of its memory free, for every step of the solver reads all of them."""
    fits = device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return (features.to(device), label.to(device)) if fits else (features, label)


def fast_protocol(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    seeds: int,
    held_out: float,
    max_iterations: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda fits: None,
) -> list[dict[str, Any]]:
    """One outcome for each seed, with `correct` on the test set, which is looked at when every choice has been made.

    A seed decides which part of the training set is kept apart, so which penalty is chosen; the classifier then learns
    from all of the training set. Seeds that choose the same penalty share it.

    Args:
        train, test: features (N, D) and labels (N,).
        held_out: share of every class that is kept apart.
        advance: told of every fit, of which a seed takes len(L2_PATH) + 1.

    Raises:
        UserError: no class has two samples.
    """
    if device.type == "mps":  # which has no float64
        device = torch.device("cpu")
    train, test = near(*train, device), near(*test, device)
    mean, scale = standardization(train[0], device)
    whole, tested = Split(*train, mean, scale, device), Split(*test, mean, scale, device)
    outcomes: list[dict[str, Any]] = []
    fits: dict[float, Fit] = {}
    for seed in range(seeds):
        learned, apart = (
            replace(whole, rows=rows.to(train[0].device)) for rows in stratified_split(train[1], held_out, seed)
        )
        if not len(apart):
            raise UserError("No class has two training images, one of which could be kept apart: use more images.")
        path, best = [], -1.0
        for fit, top1 in l2_path(learned, apart, classes, max_iterations=max_iterations):
            path.append({"l2": fit.l2, "top1": top1, "converged": fit.converged, "iterations": fit.iterations})
            if top1 > best:  # of equal ones the strongest penalty
                chosen, best = fit, top1
            advance(1)
        if chosen.l2 not in fits:
            fits[chosen.l2] = logistic_regression(
                whole, classes, chosen.l2, chosen.theta, max_iterations=max_iterations
            )
        advance(1)
        fit = fits[chosen.l2]
        solved = {"converged": fit.converged, "gradient": fit.gradient, "iterations": fit.iterations}
        outcomes.append({"seed": seed, "l2": fit.l2, **solved, "held_out_images": len(apart), "l2_path": path})
    right = {l2: correct(fit, tested) for l2, fit in fits.items()}
    return [outcome | {"hits": right[outcome["l2"]]} for outcome in outcomes]
