"""The augmentation backend on the fused kernels."""

from typing import Any

from torch import Tensor

from ...common import UserError
from ..decoding import DecodingBackend
from ..params import AugmentParams
from . import unsupported_reason
from .render import render


class TritonBackend(DecodingBackend):
    """Augmentation backend of fused kernels, on a GPU or on the CPU in Triton's interpreter.

    Raises:
        UserError: the device or the format is not supported, or a C compiler is missing.
    """

    name = "Triton"

    def __init__(self, *options: Any, **more: Any):
        # first the format, because the other reason names backends that refuse such images
        super().__init__(*options, **more)
        if reason := unsupported_reason(self._device):
            raise UserError(reason)

    def _render(self, images: list[Tensor], params: AugmentParams, out: Tensor) -> None:
        render(images, params, self._config, out)
