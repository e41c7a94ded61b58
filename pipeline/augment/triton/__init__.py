"""The whole augmentation in fused Triton kernels, on NVIDIA GPUs of compute capability 8.0 or later.

    backend.py    the augmentation backend: decoding, batches
    record.py     what the kernels know of a view; render.py: launches
    kernels.py    whole_views_kernel: views of up to 32 px, one program each
                  crop_kernel, finish_kernel: tiles of larger views
    filters.py    device functions: crop, resize, flip and blur as products with matrices of weights
    color.py      device functions: jitter and grayscale

A view of up to 32 px stays on the chip from the pixels of its image to its normalized values. Larger views are
augmented in tiles. Contrast needs the mean gray of the whole view, so a first kernel does everything that precedes it
(crop, resize, flip, and the jitter operations before contrast) and writes 16-bit levels and the gray sum of each tile.
A second one adds up the sums and does the rest, reading a margin around its tile for the blur. Sums are added in a
fixed order: views do not depend on the run or the rest of the batch.

Images stay where they are: a record of 112 bytes per view, copied to the device with all others in one transfer, holds
the address and the strides of its image, interleaved or planar, next to the drawn parameters.
"""

import torch

from ...common import has_c_compiler

OTHER = "use --loader.backend opencv, dali or kornia."


def unsupported_reason(device: torch.device) -> str | None:
    """Reason why the backend cannot run on a device, as one sentence; None if it can. Imports Triton."""
    try:
        import triton
    except ImportError:
        return f"The Triton backend needs the triton package, which is not installed; {OTHER}"
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return (
            f"The Triton backend is not available on {device}: it needs an NVIDIA GPU of compute capability 8.0 or "
            f"later, or TRITON_INTERPRET=1 set before Python starts; {OTHER}"
        )
    if not has_c_compiler():
        return (
            "The Triton backend needs a C compiler and Python's header files; install gcc or clang (or set CC to a "
            f"compiler) and python3-dev, or {OTHER}"
        )
    return None
