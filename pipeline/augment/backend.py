"""Augmentation backends: interface, selection and creation."""

import threading
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..common import UserError
from ..images.pixel_format import RGB8, PixelFormat
from .config import AugmentConfig
from .params import AugmentParams

BACKENDS = ("auto", "dali", "kornia", "opencv", "triton")
SMALL_VIEW = 64
"""Largest view in pixels for which "auto" prefers DALI on a GPU, where it is installed."""
ENOUGH_THREADS = 8
"""Number of host threads from which the OpenCV backend is expected to be faster than the training step of a GPU."""


class Backend(Protocol):
    """Interface of all backends: decode images once and apply the augmentation of each view."""

    image_device: torch.device | None
    """Where decoded images must be; None if the backend takes only encoded ones."""
    calls_at_once: int
    """Number of threads that may call the backend at the same time.

    With two, the threads of the backend start with the next batch while the last images of a batch are being augmented.
    """

    def __call__(self, images: list[bytes | np.ndarray | Tensor], params: AugmentParams) -> Tensor:
        """Augment V views of n images.

        Args:
            images: each encoded, or decoded to (H, W, C): an array on the host, a tensor on a GPU; never changed.
            params: parameters of their views.

        Returns:
            (V n, C, S, S) on the backend's device, channels-last, normalized; row v n + i is view v of image i. The
            values are float32, or the same rounded to bfloat16, as chosen when the backend was created. On a GPU the
            views are ordered on the current CUDA stream, and the host does not wait for them.

        Raises:
            DecodeError: an image can't be decoded or is smaller than its crop; `args[1]` is its position in `images`.
        """

    def close(self) -> None:
        """End the backend's threads and free its memory."""


class BackendChoice(NamedTuple):
    """A backend, and why "auto" chose it; no reason if the user did."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def choose_backend(
    name: str,
    device: torch.device,
    size: int,
    threads: int,
    pixel_format: PixelFormat = RGB8,
    *,
    fits_device: bool = False,
) -> BackendChoice:
    """Resolve "auto" by what limits each backend.

    On a CPU, OpenCV is the fastest in every measurement (bench/results/pipeline.csv). On a GPU nothing has been
    measured; the rates below are expected for one H100 with 16 cores, in images/s with two views each:

        view      OpenCV            DALI               Kornia           training step
        224 px    4,000 to 7,000    3,000 to 6,000     3,000 to 5,000   1,200 to 1,500 (ResNet-50)
        32 px     10,000            10,000 to 25,000   5,000 to 8,000   15,000 to 30,000 (ResNet-18)

    So at 224 px half of these cores are enough, and the GPU is left to the training step. The rate of small views with
    OpenCV was that of its calls; since they are compiled (compiled.py), it should be higher. Where the decoded images
    stay in the GPU's memory, the Triton kernels need neither the host nor a decoder; the bound of their memory traffic
    is 2.4 us for 1,024 views of 32 px (bench/results/views_bounds.csv).

    Args:
        name: one of `BACKENDS`.
        device: device of the views.
        size: side of a view in pixels.
        threads: number of threads of this process on the host.
        pixel_format: format of the images; only OpenCV supports others than 8-bit RGB.
        fits_device: whether the decoded images may stay in the device's memory.

    Raises:
        UserError: unknown backend.
    """
    if name not in BACKENDS:
        raise UserError(f"There is no backend {name!r}; use one of {', '.join(BACKENDS)}.")
    if name != "auto":
        return BackendChoice(name)
    if device.type == "cpu":
        return BackendChoice("opencv", "the fastest on a CPU")
    if pixel_format != RGB8:
        return BackendChoice("opencv", f"the only one for images of this kind: {pixel_format}")
    if fits_device and device.type == "cuda" and _triton_runs(device):
        return BackendChoice("triton", "expected to be the fastest for images in the GPU's memory, not measured")
    dali = device.type == "cuda" and _dali_loads()
    if size <= SMALL_VIEW:
        small = f"views of {size} px"
        if dali:
            return BackendChoice("dali", f"expected to be the fastest for {small}, not measured")
        return BackendChoice("opencv", f"expected to be the fastest for {small} without DALI, not measured")
    if threads >= ENOUGH_THREADS:
        return BackendChoice("opencv", f"expected to be fast enough with {threads} host threads, not measured")
    if dali:
        return BackendChoice("dali", f"expected to be the fastest with {threads} host threads, not measured")
    return BackendChoice("kornia", f"expected to be the fastest with {threads} host threads without DALI, not measured")


def _triton_runs(device: torch.device) -> bool:
    from .triton import unsupported_reason

    return unsupported_reason(device) is None


def _dali_loads() -> bool:
    try:  # an installed DALI may still fail to load, for example next to another version of CUDA
        import_module("nvidia.dali")
    except (ImportError, OSError):
        return False
    return True


def create_backend(
    name: str,
    config: AugmentConfig,
    device: torch.device,
    batch_size: int,
    views: int,
    workers: int,
    dtype: torch.dtype = torch.float32,
    pixel_format: PixelFormat = RGB8,
) -> Backend:
    """Create a backend; only its own library is imported, so the others need not be installed.

    Args:
        name: one of `BACKENDS`.
        config: augmentation options; a mean or std that nobody set is ImageNet's (see `AugmentConfig.for_images`).
        device: device of the views.
        batch_size: largest number of images per call.
        views: V, number of views per image.
        workers: number of threads on the host.
        dtype: of the views, float32 or bfloat16.
        pixel_format: format of the images.

    Raises:
        UserError: unknown backend, it is not available here, or it does not support the format.
    """
    name = choose_backend(name, device, config.size, workers, pixel_format).name
    options = (config.for_images(pixel_format, {}), device, batch_size, views, workers, dtype, pixel_format)
    if name == "dali":
        from .dali import DaliBackend

        return DaliBackend(*options)
    if name == "kornia":
        from .kornia import KorniaBackend

        return KorniaBackend(*options)
    if name == "triton":
        from .triton.backend import TritonBackend

        return TritonBackend(*options)
    from .opencv import OpenCVBackend

    return OpenCVBackend(*options)


class EpochBackends:
    """Backend of every epoch, because the size of the views may change between epochs (`AugmentConfig.size_schedule`).

    One backend exists at a time: when the size changes, the earlier one is closed as soon as no thread uses it.

    Args:
        config: augmentation options.
        create: creates the backend for the options of an epoch.

    Attributes:
        image_device, calls_at_once: see `Backend`; the same in all epochs.

    Raises:
        UserError: the first backend is created at once, and is not available.
    """

    def __init__(self, config: AugmentConfig, create: Callable[[AugmentConfig], Backend]):
        self.config, self.create = config, create
        self._calls, self._call_ended = 0, threading.Condition()
        self._use(config.at_epoch(0))
        self.image_device, self.calls_at_once = self._backend.image_device, self._backend.calls_at_once

    def _use(self, config: AugmentConfig) -> None:
        self._size, self._backend = config.size, self.create(config)

    def __call__(self, epoch: int, images: list[bytes | np.ndarray | Tensor], params: AugmentParams) -> Tensor:
        """Augment a batch by the backend for the views of an epoch; see `Backend`."""
        config = self.config.at_epoch(epoch)
        with self._call_ended:
            self._call_ended.wait_for(lambda: config.size == self._size or not self._calls)
            if config.size != self._size:
                self._backend.close()
                self._use(config)
            self._calls += 1
        try:
            return self._backend(images, params)
        finally:
            with self._call_ended:
                self._calls -= 1
                self._call_ended.notify_all()

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()
