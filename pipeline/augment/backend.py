"""Augmentation backends: interface, selection and creation."""

from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from ..common import UserError
from .config import AugmentConfig
from .params import AugmentParams

BACKENDS = ("auto", "dali", "kornia", "opencv")


class Backend(Protocol):
    """Interface of all backends: decode images once and apply the augmentation of each view."""

    def __call__(self, encoded: list[bytes], params: AugmentParams) -> Tensor:
        """Augment V views of n encoded images.

        Returns:
            (V n, 3, S, S) float32 on the backend's device, channels-last, normalized; row v n + i is view v of image i.
            On a GPU the views are ordered on the current CUDA stream, and the host does not wait for them.

        Raises:
            DecodeError: an image can't be decoded or is smaller than its crop; `args[1]` is its position in `encoded`.
        """

    def close(self) -> None:
        """End the backend's threads and free its memory."""


def choose_backend(name: str, device: torch.device) -> str:
    """Resolve "auto": DALI on CUDA devices (Kornia if DALI is not installed), Kornia on other GPUs, OpenCV on CPUs.

    Raises:
        UserError: unknown backend.
    """
    if name not in BACKENDS:
        raise UserError(f"There is no backend {name!r}; use one of {', '.join(BACKENDS)}.")
    if name != "auto":
        return name
    if device.type == "cpu":
        return "opencv"
    return "dali" if device.type == "cuda" and _dali_loads() else "kornia"


def _dali_loads() -> bool:
    try:  # an installed DALI may still fail to load, for example next to another version of CUDA
        import_module("nvidia.dali")
    except (ImportError, OSError):
        return False
    return True


def create_backend(
    name: str, config: AugmentConfig, device: torch.device, batch_size: int, views: int, workers: int
) -> Backend:
    """Create a backend; only its own library is imported, so the others need not be installed.

    Args:
        name: one of `BACKENDS`.
        config: augmentation options.
        device: device of the views.
        batch_size: largest number of images per call.
        views: V, number of views per image.
        workers: number of threads on the host.

    Raises:
        UserError: unknown backend, or its library is not installed.
    """
    name, options = choose_backend(name, device), (config, device, batch_size, views, workers)
    if name == "dali":
        from .dali import DaliBackend

        return DaliBackend(*options)
    if name == "kornia":
        from .kornia import KorniaBackend

        return KorniaBackend(*options)
    from .opencv import OpenCVBackend

    return OpenCVBackend(*options)
