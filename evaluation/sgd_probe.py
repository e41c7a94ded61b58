"""Linear classifiers trained by SGD as in SimCLR (arXiv 2002.05709, appendix B.6).

Nesterov momentum 0.9, learning rate 0.1 B / 256 for batches of B, no weight decay, a cosine without warm-up, 90 epochs;
the last epoch's classifier is the result.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .accuracy import classes_ahead, top_n


def probe_layer(width: int, classes: int, seed: int, device: torch.device) -> nn.Linear:
    """A linear layer whose weights begin at a standard deviation of 0.01, the same for a seed on any device."""
    probe = nn.Linear(width, classes, device=device)
    with torch.no_grad():
        probe.weight.copy_(0.01 * torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)))
        probe.bias.zero_()
    return probe


def train_on_views(
    probe: nn.Linear,
    forward_features: Callable[[Tensor], Tensor],
    loader: Iterable,
    *,
    batch_size: int,
    epochs: int,
    mean_over_ranks: Callable[[Tensor], Tensor] = lambda part: part,
) -> Iterator[Tensor]:
    """Train `probe` in place on randomly cropped and flipped views; the encoder stays as it is.

    The ranks must hold the same `probe` and keep it the same, since they all apply the mean of their gradients.

    Args:
        represent: (B, 3, S, S) -> h (B, D), with an encoder in evaluation mode.
        loader: iterating once gives one epoch of this rank's batches, with `views` (B, 3, S, S) and `label` (B,); its
            length is the number of steps.
        batch_size: of the global batch.
        mean_over_ranks: a tensor of each rank -> the mean of all.

    Yields:
        the mean loss () of each epoch, over all ranks.
    """
    rate, total = 0.1 * batch_size / 256, epochs * len(loader)
    optimizer, step = torch.optim.SGD(probe.parameters(), rate, momentum=0.9, nesterov=True), 0
    for _ in range(epochs):
        losses = 0.0
        for batch in loader:
            optimizer.param_groups[0]["lr"] = cosine(rate, step, total)
            with torch.no_grad():
                h = forward_features(batch.views).float()
            loss = cross_entropy(probe(h), batch.label)
            optimizer.zero_grad()
            loss.backward()
            for parameter in probe.parameters():
                parameter.grad = mean_over_ranks(parameter.grad)
            optimizer.step()
            losses, step = losses + loss.detach(), step + 1
        yield mean_over_ranks(losses / len(loader))


@torch.no_grad()
def probe_correct(probe: nn.Linear, features: Tensor, label: Tensor, device: torch.device) -> tuple[int, int]:
    """How many of the features (M, D) are classified rightly at top-1 and top-5."""
    top1, top5 = 0, 0
    for rows, truth in zip(features.split(8192), label.split(8192), strict=True):
        ahead = classes_ahead(probe(rows.to(device)), truth.to(device))
        top1, top5 = top1 + int((ahead < 1).sum()), top5 + int((ahead < top_n(probe.out_features)).sum())
    return top1, top5


def linear_top1(
    train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor, *, epochs: int = 90, seed: int = 0
) -> float:
    """Share of test samples that a linear classifier trained on `train` gets right, after its last epoch.

    The optimization is that of the paper, in batches of 256. The features are those of central views and are
    standardized per dimension, which stands in for augmenting them.

    Args:
        train: (N, D) float. train_label: (N,) int64. test: (M, D). test_label: (M,).
    """
    mean = train.float().mean(0)
    scale = train.float().std(0, correction=min(1, len(train) - 1)).clamp_min(1e-6)  # of one sample: 0, not NaN
    train, test = (train.float() - mean) / scale, (test.float() - mean) / scale
    batch_size = min(256, len(train))
    probe = nn.Linear(train.shape[1], int(train_label.max()) + 1, device=train.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    rate = 0.1 * batch_size / 256
    optimizer = torch.optim.SGD(probe.parameters(), rate, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(train) // batch_size
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=generator).to(train.device)
        for step in range(steps_per_epoch):
            optimizer.param_groups[0]["lr"] = cosine(rate, epoch * steps_per_epoch + step, epochs * steps_per_epoch)
            rows = order[step * batch_size : (step + 1) * batch_size]
            optimizer.zero_grad()
            cross_entropy(probe(train[rows]), train_label[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return (probe(test).argmax(1) == test_label).float().mean().item()


def cosine(rate: float, step: int, total: int) -> float:
    """The learning rate of a step."""
    return rate * 0.5 * (1 + math.cos(math.pi * step / total))
