"""Decoding to a device: JPEGs with nvJPEG on CUDA, everything else in host threads."""

import re
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from ..images.files import DecodeError, contains, decode, nvjpeg_decodes_alike
from ..images.pixel_format import RGB8, PixelFormat
from .config import AugmentConfig
from .gpu import augment_in_chunks, check_rgb8, pinned, refusal, warn_once
from .params import AugmentParams

NVJPEG_REFUSALS = re.compile(
    r"Failed to [a-z ]+: (3|4|9|10)\b"  # of nvjpegStatus_t: bad, unsupported, not implemented, incomplete
    r"|Unknown chroma subsampling|not compiled with nvJPEG|Couldn't load the image extension"
)
"""Errors of torchvision that mean that nvJPEG is missing or cannot decode a file."""


class DecodingBackend(ABC):
    """Augmentation backend that decodes a batch to the device and then renders its views there; see `Backend`.

    Args:
        config: augmentation options.
        device: device of the views.
        batch_size, views: not used; part of the common signature.
        workers: number of threads that decode on the host.
        dtype: of the views, float32 or bfloat16; they are computed in float32.
        pixel_format: format of the images, which must be 8-bit RGB.

    Raises:
        UserError: another format.
    """

    name: str
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
        check_rgb8(self.name, pixel_format)
        self._config, self._dtype = config, dtype
        self._device = torch.device(device)
        self.image_device = self._device if self._device.type in ("cpu", "cuda") else None
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __call__(self, images: list[bytes | np.ndarray | Tensor], params: AugmentParams) -> Tensor:
        """Augment V views of n images; see `Backend`. An image may be decoded, (H, W, 3) uint8, and on the device."""
        return augment_in_chunks(self._augment, images, params, self._config, self._device, self._dtype)

    def close(self) -> None:
        """End the decoding threads."""
        self._threads.shutdown()

    def _augment(self, images: list[bytes | np.ndarray | Tensor], params: AugmentParams, out: Tensor) -> None:
        self._render(self._decode(images, params.crop), params, out)

    def _decode(self, images: list[bytes | np.ndarray | Tensor], crops: np.ndarray) -> list[Tensor]:
        """Decode n images to (3, H, W) uint8 RGB each, of any strides; the EXIF orientation is not applied.

        Args:
            images: each encoded, or decoded to (H, W, 3) uint8: an array on the host, or a tensor on the device, which
                is not copied.
            crops: (V, n, 4), crops that are needed of the images: top, left, height, width.

        Raises:
            DecodeError: an image can't be decoded or is smaller than a crop; `args[1]` is its position.
        """
        found = {i: image.permute(2, 0, 1) for i, image in enumerate(images) if isinstance(image, Tensor)}
        if self._device.type == "cuda":
            jpegs = [i for i, file in enumerate(images) if isinstance(file, bytes) and nvjpeg_decodes_alike(file)]
            decoded = decode_on_gpu([images[i] for i in jpegs], self._device)
            found |= {i: image for i, image in zip(jpegs, decoded, strict=True) if image is not None}
        rest = [i for i in range(len(images)) if i not in found]
        for i, pixels in zip(rest, self._threads.map(self._on_host, [images[i] for i in rest]), strict=True):
            if pixels is None:
                raise DecodeError("the image can't be decoded", i)
            found[i] = pixels.to(self._device, non_blocking=True).permute(2, 0, 1)
        for i in range(len(images)):
            if not contains(*found[i].shape[1:], crops[:, i]):
                raise DecodeError("the image is smaller than its index says", i)
        return [found[i] for i in range(len(images))]

    def _on_host(self, image: bytes | np.ndarray) -> Tensor | None:
        pixels = decode(image) if isinstance(image, bytes) else image
        return None if pixels is None else pinned(pixels, self._device)

    @abstractmethod
    def _render(self, images: list[Tensor], params: AugmentParams, out: Tensor) -> None:
        """Write the V views of k decoded images (3, H, W) to `out` (V, k, 3, S, S)."""


def decode_on_gpu(files: list[bytes], device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs with nvJPEG to (3, H, W) uint8 RGB each; all None if nvJPEG is missing or refuses one of them."""
    if not files:
        return []
    # torchvision decodes on its own stream into memory of the current stream. That memory may have been freed while
    # kernels that read the previous batch were still queued, so wait for them before it is overwritten.
    torch.cuda.current_stream(device).synchronize()
    try:
        return decode_jpeg(
            [torch.frombuffer(bytearray(f), dtype=torch.uint8) for f in files], ImageReadMode.RGB, device
        )
    except RuntimeError as error:
        reason = refusal(error, NVJPEG_REFUSALS)
        warn_once(f"nvJPEG can't decode some JPEGs ({reason}); batches with them are decoded on the host.")
        return [None] * len(files)
