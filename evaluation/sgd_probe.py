"""Linear classifiers trained by SGD as in SimCLR (arXiv 2002.05709, appendix B.6).

Nesterov momentum 0.9, learning rate 0.1 B / 256 for batches of B, no weight decay, cosine schedule without warm-up, 90
epochs; the classifier after the last epoch counts.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .accuracy import classes_ahead, count_correct, scores
from .common import UserError, progress_bar


def probe_layer(width: int, classes: int, seed: int, device: torch.device) -> nn.Linear:
    """Create a linear layer with weights of standard deviation 0.01, the same for a seed on every device."""
    probe = nn.Linear(width, classes, device=device)
    with torch.no_grad():
        probe.weight.copy_(0.01 * torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)))
        probe.bias.zero_()
    return probe


def base_learning_rate(batch_size: int) -> float:
    """Learning rate at the start of the cosine schedule."""
    return 0.1 * batch_size / 256


def global_batch_size(limit: int, images: int, world_size: int) -> int:
    """Largest multiple of `world_size` within `limit` and the number of images; a UserError if there is none."""
    batch_size = min(limit, images) // world_size * world_size
    if not batch_size:
        raise UserError(
            f"A batch of at most {limit} of the {images} labeled training images does not divide among {world_size} "
            "processes; use fewer processes or a larger --batch-size."
        )
    return batch_size


def simclr_protocol(
    forward_features: Callable[[Tensor], Tensor],
    create_loader: Callable[..., Any],
    test: tuple[Tensor, Tensor] | None,
    session: Any,
    *,
    feature_dim: int,
    classes: int,
    batch_size: int,
    epochs: int,
    seeds: int,
) -> list[dict[str, Any]]:
    """Linear evaluation by SGD on randomly cropped and flipped views, once per seed, trained by all ranks together.

    Args:
        forward_features: (B, C, S, S) -> h (B, D), with a frozen encoder in evaluation mode.
        create_loader: called with seed=...; each iteration over the loader yields one epoch of this rank's batches,
            with `views` (B, C, S, S) and `label` (B,); its length is the number of steps per epoch, and its
            `bad_samples` count and limit unreadable images.
        test: features (M, D) and labels (M,) of the test split on rank 0; None on other ranks.
        session: has `rank`, `device`, `mean` and `sum`, which map a tensor of each rank to the mean or sum over ranks.
        feature_dim: D.
        batch_size: global batch size.
        seeds: number of repetitions, with seeds 0, 1 and so on.

    Returns:
        Steps, mean loss of the last epoch and, on rank 0, scores for every seed.

    Raises:
        UserError: the training diverged, or too many images are unreadable on all ranks together.
    """
    forward_features = torch.no_grad()(forward_features)
    results = []
    with progress_bar(seeds * epochs, "training", shown=session.rank == 0) as update:
        for seed in range(seeds):
            probe = probe_layer(feature_dim, classes, seed, session.device)
            # the previous loader still exists, so that the next one shares its resident images
            with closing(create_loader(seed=seed)) as loader:
                steps = len(loader)
                batches = ((forward_features(b.views).float(), b.label) for _ in range(epochs) for b in loader)
                losses = sgd_steps(probe, batches, batch_size, epochs * steps, session.mean)
                for epoch in range(epochs):
                    loss = session.mean(sum(islice(losses, steps)) / steps).item()
                    replaced = session.sum(torch.tensor(loader.bad_samples.replaced, device=session.device))
                    loader.bad_samples.check(int(replaced), epoch)
                    update(advance=1)
            if not math.isfinite(loss):
                raise UserError(
                    f"The training of the classifier diverged (seed {seed}, mean loss {loss} in the last epoch); use a "
                    "smaller --batch-size, which lowers the learning rate, or --precision fp32."
                )
            result = {"seed": seed, "steps": epochs * steps, "train_loss": loss}
            if test is not None:
                result |= scores(probe_correct(probe, *test, session.device), len(test[1]))
            results.append(result)
    return results


def sgd_steps(
    probe: nn.Linear,
    batches: Iterable[tuple[Tensor, Tensor]],
    batch_size: int,
    total_steps: int,
    mean: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """Train `probe` in place, one step for each of this rank's batches.

    The ranks must start from the same `probe`; it stays the same on all of them, because each applies the mean of their
    gradients.

    Args:
        probe: linear layer, features (B, D) -> logits (B, classes).
        batches: features (B, D) float32 and labels (B,).
        batch_size: global batch size.
        total_steps: length of the learning rate schedule.
        mean: maps a tensor of each rank to the mean over ranks.

    Yields:
        Loss () of each step on this rank.
    """
    lr = base_learning_rate(batch_size)
    optimizer = torch.optim.SGD(probe.parameters(), lr, momentum=0.9, nesterov=True)
    for step, (features, label) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total_steps))
        loss = cross_entropy(probe(features), label)
        optimizer.zero_grad()
        loss.backward()
        for parameter in probe.parameters():
            parameter.grad = mean(parameter.grad)
        optimizer.step()
        yield loss.detach()


@torch.no_grad()
def probe_correct(probe: nn.Linear, features: Tensor, label: Tensor, device: torch.device) -> tuple[int, int]:
    """Number of features (M, D) classified correctly at top-1 and top-5."""
    blocks = zip(features.split(8192), label.split(8192), strict=True)
    ahead = (classes_ahead(probe(rows.to(device)), truth.to(device)) for rows, truth in blocks)
    return tuple(sum(count_correct(block, probe.out_features) for block in ahead).tolist())


def linear_top1(
    train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor, *, epochs: int = 90, seed: int = 0
) -> float:
    """Top-1 accuracy on `test` of `linear_predictions`; test_label is (M,) int64."""
    predicted = linear_predictions(train, train_label, test, epochs=epochs, seed=seed)
    return (predicted == test_label).float().mean().item()


def linear_predictions(train: Tensor, train_label: Tensor, test: Tensor, *, epochs: int = 90, seed: int = 0) -> Tensor:
    """Classes of `test`, (M,) int64, by a linear classifier trained on `train`, after its last epoch.

    The optimization is that of the paper, in batches of 256. Features of center crops, standardized per dimension,
    stand in for random views.

    Args:
        train: (N, D) float, with train_label (N,) int64.
        test: (M, D) float.
        seed: seed of the order of the samples.
    """
    mean = train.float().mean(0)
    scale = train.float().std(0, correction=min(1, len(train) - 1)).clamp_min(1e-6)  # 0 for one sample, not NaN
    train, test = (train.float() - mean) / scale, (test.float() - mean) / scale
    batch_size = min(256, len(train))
    steps_per_epoch = len(train) // batch_size
    probe = nn.Linear(train.shape[1], int(train_label.max()) + 1, device=train.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(epochs):
            order = torch.randperm(len(train), generator=generator).to(train.device)
            for rows in order.split(batch_size)[:steps_per_epoch]:
                yield train[rows], train_label[rows]

    for _ in sgd_steps(probe, batches(), batch_size, epochs * steps_per_epoch, mean=lambda gradient: gradient):
        pass
    with torch.no_grad():
        return probe(test).argmax(1)
