"""Launch of the kernels."""

import torch
import triton
from torch import Tensor

from ..config import AugmentConfig
from ..gpu import copy_to
from ..params import AugmentParams
from .kernels import crop_kernel, finish_kernel, whole_views_kernel
from .record import view_records

TILE = 32
"""Side of a tile in pixels; a view of this size or smaller is one tile, which one program augments completely."""
BLOCK = 16
"""Number of pixels of a line that are multiplied with weights at a time. Smaller than a tile: Triton would give blocks
of both the same layout, in which neighboring threads do not read neighboring pixels of the image."""
WARPS = 4
FOUR_PROGRAMS, THREE_PROGRAMS = 128, 168
"""Maximum of registers per thread with which as many programs fit a multiprocessor."""


def render(images: list[Tensor], params: AugmentParams, config: AugmentConfig, out: Tensor) -> None:
    """Augment V views of k images on the current stream, without waiting for it.

    Args:
        images: (3, H, W) uint8 RGB each, of any strides, on the device of `out`.
        params: parameters of the V views.
        config: augmentation options.
        out: (V, k, 3, S, S), float32 or bfloat16; each out[v] is contiguous in channels-last order.
    """
    render_records(copy_to(out.device, view_records(images, params, config)), len(images), config, out)


def render_records(records: Tensor, images: int, config: AugmentConfig, out: Tensor) -> None:
    """Launch the kernels for the `view_records` of V views of k images, which are on the device.

    Args:
        records: (V k, WORDS) int32; the images that they name must stay in memory.
        images: k.
        config, out: see `render`.
    """
    major = torch.cuda.get_device_capability(out.device)[0] if out.device.type == "cuda" else 0
    views, size = len(records), config.size
    gain = [1 / std for std in config.std]
    shift = [-mean / std for mean, std in zip(config.mean, config.std, strict=True)]
    target = (out, images, out.stride(0), *gain, *shift)
    if size <= TILE:
        whole_views_kernel[(views,)](records, *target, **constants(whole_views_kernel, config, major))
        return
    tiles = triton.cdiv(size, TILE) ** 2
    levels = torch.empty((views, 3, size, size), dtype=torch.uint16, device=out.device)
    gray = torch.empty((views, tiles), dtype=torch.float32, device=out.device)
    crop_kernel[tiles, views](records, levels, gray, **constants(crop_kernel, config, major))
    finish_kernel[tiles, views](records, levels, gray, *target, **constants(finish_kernel, config, major))


def constants(kernel: triton.JITFunction, config: AugmentConfig, major: int) -> dict[str, int | bool]:
    """Compile-time arguments, warps and registers of a kernel on a GPU of compute capability `major`.x."""
    tiles = triton.cdiv(config.size, TILE) ** 2
    values = {
        "SIZE": config.size,
        "WINDOW": config.blur_window,
        "WINDOW_PADDED": triton.next_power_of_2(config.blur_window),
        "EXACT": config.jitter == "exact",
        "TILE": TILE,
        "TILES": tiles,
        "TILES_PADDED": triton.next_power_of_2(tiles),
        "BLOCK": BLOCK,
    }
    # the assembler for Blackwell needs more registers to spill none
    registers = THREE_PROGRAMS if kernel is finish_kernel or major >= 10 else FOUR_PROGRAMS
    options = {"num_warps": WARPS, "maxnreg": registers}
    return {name: value for name, value in values.items() if name in kernel.arg_names} | options
