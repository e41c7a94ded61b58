"""The augmentation backend on the fused kernels."""

import numpy as np
import torch
from torch import Tensor

from ...common import UserError
from ...images.pixel_format import RGB8, PixelFormat
from ..config import AugmentConfig
from ..decoding import ImageDecoder
from ..gpu import augment_in_chunks, check_rgb8
from ..params import AugmentParams
from . import unsupported_reason
from .render import render


class TritonBackend:
    """Augmentation backend of fused kernels; see `Backend` for the interface.

    Args:
        config: augmentation options.
        device: device of the views: a GPU, or the CPU in Triton's interpreter.
        batch_size, views: not used; part of the common signature.
        workers: number of threads that decode on the host.
        dtype: of the views, float32 or bfloat16; they are computed in float32.
        pixel_format: format of the images, which must be 8-bit RGB.

    Raises:
        UserError: the device or the format is not supported, or a C compiler is missing.
    """

    calls_at_once = 1

    def __init__(
        self,
        config: AugmentConfig,
        device: torch.device,
        batch_size: int,
        views: int,
        workers: int,
        dtype: torch.dtype = torch.float32,
        pixel_format: PixelFormat = RGB8,
    ):
        self._device = self.image_device = torch.device(device)
        check_rgb8("Triton", pixel_format)  # first, because the other reason names backends that refuse such images
        if reason := unsupported_reason(self._device):
            raise UserError(reason)
        self._config, self._dtype = config, dtype
        self._decoder = ImageDecoder(self._device, workers)

    def __call__(self, images: list[bytes | np.ndarray | Tensor], params: AugmentParams) -> Tensor:
        """Augment V views of n images; see `Backend`. An image may be decoded, (H, W, 3) uint8, and on the device."""
        return augment_in_chunks(self._augment, images, params, self._config, self._device, self._dtype)

    def close(self) -> None:
        """End the decoding threads."""
        self._decoder.close()

    def _augment(self, images: list[bytes | np.ndarray | Tensor], params: AugmentParams, out: Tensor) -> None:
        render(self._decoder(images, params.crop), params, self._config, out)
