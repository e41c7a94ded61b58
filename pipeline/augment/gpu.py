"""What the backends that compute on a GPU share: formats, batches in chunks, copies through pinned memory, errors."""

import logging
import re
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..common import UserError
from ..images.files import DecodeError
from ..images.pixel_format import RGB8, PixelFormat
from .config import AugmentConfig
from .params import AugmentParams

CHUNK = 256
"""Largest number of images that are augmented at a time."""

OUT_OF_MEMORY = re.compile(
    r"out of memory|CUDA allocation failed|Can't allocate \d+ bytes"
    r"|Failed to [a-z ]+: 5\b|nvImageCodec failure: '#(5|15)'"  # allocators of nvjpegStatus_t and nvimgcodecStatus_t
)
"""How torchvision and DALI report that memory is exhausted, each by a RuntimeError."""

log = logging.getLogger(__name__)


def check_rgb8(backend: str, pixel_format: PixelFormat) -> None:
    """Refuse images that are not 8-bit RGB.

    Raises:
        UserError: names the format and another backend.
    """
    if pixel_format != RGB8:
        raise UserError(
            f"The {backend} backend supports 8-bit RGB images only, not {pixel_format}; use --loader.backend opencv."
        )


def augment_in_chunks(
    augment: Callable[[list, AugmentParams, Tensor], None],
    images: list[bytes | np.ndarray | Tensor],
    params: AugmentParams,
    config: AugmentConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Augment a batch in chunks of at most `CHUNK` images, so that intermediate results do not grow with the batch.

    Args:
        augment: (k images, their parameters, out) writes the V views of each to out (V, k, 3, S, S).
        images: n images, see `Backend`.
        params: parameters of their V views.
        config: augmentation options.
        device, dtype: of the result.

    Returns:
        (V n, 3, S, S), channels-last; see `Backend`.

    Raises:
        DecodeError: of `augment`, with the position in the batch.
    """
    views, n = params.flip.shape
    out = torch.empty((views, n, config.size, config.size, 3), dtype=dtype, device=device).permute(0, 1, 4, 2, 3)
    for first in range(0, n, CHUNK):
        chunk = slice(first, first + CHUNK)
        try:
            augment(images[chunk], params.of_images(chunk), out[:, chunk])
        except DecodeError as error:
            raise DecodeError(error.args[0], first + error.args[1]) from error
    return out.flatten(0, 1)


def pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """Tensor of an array on the host, for CUDA in pinned memory: the host waits for copies of any other memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def copy_to(device: torch.device, array: np.ndarray) -> Tensor:
    """Copy an array to a device, on the current stream, without waiting for it."""
    return pinned(array, device).to(device, non_blocking=True)


def refusal(error: RuntimeError, refusals: re.Pattern) -> str:
    """Return the part of an error's message that means that a file can't be decoded; raise every other error.

    Raises:
        OutOfMemoryError: the message means that memory is exhausted.
        RuntimeError: `error`, if it means anything else.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if OUT_OF_MEMORY.search(str(error)):
        raise torch.OutOfMemoryError(str(error)) from error
    if found := refusals.search(str(error)):
        return found[0]
    raise error


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time that this process has it."""
    log.warning(message)
