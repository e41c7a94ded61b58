"""Losses: NT-Xent for contrastive pretraining, cross-entropies for distillation."""

from .distill import distillation, labeled_cross_entropy
from .ntxent import LossConfig, nt_xent, nt_xent_and_append
from .queue import NegativeQueue, create_queue
from .temperature import Temperature

__all__ = [
    "LossConfig",
    "NegativeQueue",
    "Temperature",
    "create_queue",
    "distillation",
    "labeled_cross_entropy",
    "nt_xent",
    "nt_xent_and_append",
]
