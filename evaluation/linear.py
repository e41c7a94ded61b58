"""Multinomial logistic regression on stored features, solved to convergence (the fast linear protocol).

Features are standardized with mean and standard deviation of the training set, so that a penalty means the same for
every dimension and every encoder, and L-BFGS needs fewer steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .accuracy import classes_ahead, count_correct, scores
from .common import UserError, progress_bar

L2_PATH = tuple(10.0 ** (-half / 2) for half in range(-4, 13))
"""From 100 to 1e-6 in half decades: strong penalties are solved quickly, and each solution initializes the next fit."""
BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class Split:
    """Rows of stored features, standardized block by block so that they need not fit on the device."""

    features: Tensor  # (N, D) float, on any device or mapped into memory
    label: Tensor  # (N,) int64
    mean: Tensor  # (D,) float64, subtracted from the features
    scale: Tensor  # (D,) float64, multiplies the centered features
    device: torch.device  # device of the computation
    rows: Tensor | None = None  # (n,) int64, ascending, on the device of the features; None for all

    def __len__(self) -> int:
        return len(self.features if self.rows is None else self.rows)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield standardized features (n, D) float64 and labels (n,), on `device`."""
        for first in range(0, len(self), BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS) if self.rows is None else self.rows[first : first + BLOCK_ROWS]
            x = (self.features[rows].to(self.device).double() - self.mean) * self.scale
            yield x, self.label[rows].to(self.device)


@dataclass(frozen=True)
class Fit:
    """A linear classifier and how accurately it was solved."""

    theta: Tensor  # (C, D + 1) float64: weights, and the bias in the last column
    gradient: float  # largest absolute component of the objective's gradient
    iterations: int  # of L-BFGS
    converged: bool  # whether `gradient` is within the tolerance


def standardization(features: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean (D,) and inverse standard deviation (D,) of features (N, D), float64; 0 where a dimension is constant."""
    blocks = features.split(BLOCK_ROWS)
    mean = sum(block.to(device).double().sum(0) for block in blocks) / len(features)
    # two passes: E[x^2] - E[x]^2 would cancel
    variance = sum((block.to(device).double() - mean).square().sum(0) for block in blocks) / len(features)
    constant = variance <= (torch.finfo(features.dtype).eps * mean).square()  # up to rounding
    return mean, torch.where(constant, 0.0, variance.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())


def logistic_regression(
    train: Split,
    classes: int,
    l2: float,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> Fit:
    """Minimize mean cross-entropy + l2 / 2 * |weights|^2 by full-batch L-BFGS; the bias is not penalized.

    Equivalent to scikit-learn's LogisticRegression with C = 1 / (l2 n) for n samples. The computation is in float64,
    because the line search compares objectives, which near the solution are equal in single precision.

    Args:
        start: (C, D + 1) float64, initial parameters for C classes; None for zeros.
        tolerance: largest component of the gradient at which the fit has converged.
        max_iterations: number of iterations after which the fit is returned unconverged.
    """
    theta = train.mean.new_zeros(classes, len(train.mean) + 1) if start is None else start.clone()

    def objective() -> Tensor:
        loss, theta.grad = _loss_and_gradient(train, theta, l2)
        return loss

    solver = torch.optim.LBFGS(
        [theta],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0,  # only the gradient decides on convergence
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    solver.step(objective)
    gradient = _loss_and_gradient(train, theta, l2)[1].abs().max().item()
    return Fit(theta, gradient, solver.state[theta]["n_iter"], gradient <= tolerance)


@torch.no_grad()
def _loss_and_gradient(train: Split, theta: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Objective () and its gradient (C, D + 1)."""
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
    """theta (C, D + 1), x (n, D) -> logits (n, C)."""
    return torch.addmm(theta[:, -1], x, theta[:, :-1].T)


@torch.no_grad()
def fit_correct(fit: Fit, split: Split) -> tuple[int, int]:
    """Number of samples classified correctly at top-1 and top-5."""
    blocks = ((_logits(fit.theta, x), label) for x, label in split.blocks())
    return tuple(sum(count_correct(classes_ahead(*block), len(fit.theta)) for block in blocks).tolist())


def stratified_split(label: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split into rows to fit and held-out rows, (n,) int64 ascending: `share` of every class, drawn by seed.

    A class with two samples or more has at least one on either side.
    """
    random, label = np.random.default_rng(seed), label.cpu().numpy()
    held_out = np.zeros(len(label), bool)
    for each in np.unique(label):
        rows = np.flatnonzero(label == each)
        held_out[random.permutation(rows)[: min(max(round(share * len(rows)), 1), len(rows) - 1)]] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def fast_protocol(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    seeds: int,
    held_out: float,
    max_iterations: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Linear evaluation by logistic regression, once per seed.

    A seed decides which part of the training set is held out and thereby which penalty is chosen; then the classifier
    is fitted to the whole training set. Seeds that choose the same penalty share this fit. The test set is used once
    all penalties have been chosen.

    Args:
        train: features (N, D) and labels (N,).
        test: features (M, D) and labels (M,).
        seeds: number of repetitions, with seeds 0, 1 and so on.
        held_out: share of every class that is held out.

    Returns:
        For every seed: the chosen penalty, how accurately it was solved, the path of penalties, and the scores.

    Raises:
        UserError: no class has two samples.
    """
    if device.type == "mps":  # it does not support float64
        device = torch.device("cpu")
    if device.type == "cuda":  # every step of the solver reads all features: keep those that leave half of it free
        train, test = (
            (x.to(device), label.to(device)) if x.nbytes < torch.cuda.mem_get_info(device)[0] / 2 else (x, label)
            for x, label in (train, test)
        )
    mean, scale = standardization(train[0], device)
    whole, tested = Split(*train, mean, scale, device), Split(*test, mean, scale, device)
    results: list[dict[str, Any]] = []
    fits: dict[float, Fit] = {}
    with progress_bar(seeds * (len(L2_PATH) + 1), "fitting") as update:
        for seed in range(seeds):
            parts = stratified_split(train[1], held_out, seed)
            fitted, validation = (replace(whole, rows=rows.to(train[0].device)) for rows in parts)
            if not len(validation):
                raise UserError("No class has two training images, one of which could be held out; use more images.")
            path, start, best = [], None, -1.0
            for l2 in L2_PATH:  # with a looser tolerance, because only the order of the accuracies matters
                fit = logistic_regression(fitted, classes, l2, start, 1e-4, max_iterations)
                start, top1 = fit.theta, fit_correct(fit, validation)[0] / len(validation)
                path.append({"l2": l2, "top1": top1, "converged": fit.converged, "iterations": fit.iterations})
                if top1 > best:  # among equal ones the strongest penalty
                    chosen, chosen_start, best = l2, start, top1
                update(advance=1)
            if chosen not in fits:
                fits[chosen] = logistic_regression(whole, classes, chosen, chosen_start, max_iterations=max_iterations)
            update(advance=1)
            fit = fits[chosen]
            solved = {"converged": fit.converged, "gradient": fit.gradient, "iterations": fit.iterations}
            results.append({"seed": seed, "l2": chosen, **solved, "held_out_images": len(validation), "l2_path": path})
    tested_scores = {l2: scores(fit_correct(fit, tested), len(tested)) for l2, fit in fits.items()}
    return [result | tested_scores[result["l2"]] for result in results]
