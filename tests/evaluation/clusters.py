"""Labeled features whose classes overlap more or less."""

import torch


def clusters(n, seed, spread, classes=4, width=16):
    """Features (n, width) float32 around one center per class, and labels (n,)."""
    random = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % classes
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    return centers[label] + spread * torch.randn(n, width, generator=random), label
