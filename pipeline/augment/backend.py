"""Augmentation backends: which one, and how it is created."""

from importlib import import_module

import torch

from ..common import UserError
from .config import AugmentConfig

BACKENDS = ("auto", "dali", "kornia", "opencv")


def choose_backend(name: str, device: torch.device) -> str:
    """`auto` is DALI on a CUDA device (Kornia where DALI is not installed), Kornia on other GPUs, OpenCV on CPUs."""
    if name not in BACKENDS:
        raise UserError(f"There is no backend {name!r}: choose one of {', '.join(BACKENDS)}.")
    if name != "auto":
        return name
    if device.type == "cpu":
        return "opencv"
    return "dali" if device.type == "cuda" and _dali_loads() else "kornia"


def _dali_loads() -> bool:
    try:  # it may be installed and still not load, beside another CUDA say
        import_module("nvidia.dali")
    except (ImportError, OSError):
        return False
    return True


def create_backend(name: str, recipe: AugmentConfig, device: torch.device, batch_size: int, views: int, workers: int):
    """The chosen backend; each is imported only when it is used, so that none has to be installed."""
    name = choose_backend(name, device)
    if name == "dali":
        from .dali import DaliBackend as Backend
    elif name == "kornia":
        from .kornia import KorniaBackend as Backend
    else:
        from .opencv import OpenCVBackend as Backend
    return Backend(recipe, device, batch_size, views, workers)
