"""A linear classifier on frozen, stored features."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def linear_top1(
    train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor, *, epochs: int = 90, seed: int = 0
) -> float:
    """Share of test samples that a linear classifier trained on `train` gets right, after its last epoch.

    Optimisation as in arXiv 2002.05709, appendix B.6: Nesterov momentum 0.9, rate 0.1 B / 256, no decay, cosine. The
    features are those of central views and are standardised per dimension, which stands in for augmenting them.

    Args:
        train: (N, D) float. train_label: (N,) int64. test: (M, D). test_label: (M,).
    """
    mean, scale = train.float().mean(0), train.float().std(0).clamp_min(1e-6)
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
            progress = (epoch * steps_per_epoch + step) / (epochs * steps_per_epoch)
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
            rows = order[step * batch_size : (step + 1) * batch_size]
            optimizer.zero_grad()
            cross_entropy(probe(train[rows]), train_label[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return (probe(test).argmax(1) == test_label).float().mean().item()
