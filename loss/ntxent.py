"""The one public door to the NT-Xent loss."""

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from loss import distributed
from loss.blockwise import nt_xent_blockwise
from loss.reference import nt_xent_reference

try:
    from loss.triton_loss import nt_xent_triton
    from loss.triton_tiles import refusal
except ImportError:

    def refusal(device: torch.device, dtype: torch.dtype) -> str:
        return "impl='triton' needs the triton package, which is not installed: choose impl='auto' or 'blockwise'"


Impl = Literal["auto", "blockwise", "reference", "triton"]
Precision = Literal["tf32", "ieee"]


def nt_xent(
    z: Tensor,
    temperature: float | Tensor,
    group: torch.distributed.ProcessGroup | None = None,
    impl: Impl = "auto",
    precision: Precision | None = None,
) -> Tensor:
    """NT-Xent, the contrastive loss of SimCLR (arXiv 2002.05709, section 2.1, equation 1 and Algorithm 1).

    The negatives of an anchor are all other rows of all ranks but its own other view.

    Args:
        z: (2n, D), this rank's projections as the head gives them: the loss itself normalises the rows. Both views
            of sample i stand at rows i and n + i. float64, float32, bfloat16 or float16; the latter two are computed
            in float32, inside autocast too, and the gradient has z's dtype; so does "triton", but that its GEMMs
            take their operands in z's dtype. A zero row has similarity 0 to every other and gets no gradient; NaN or
            inf anywhere makes the loss NaN.
        temperature: a positive number, or a 0-dim tensor, which may be learnt. "triton" leaves one on an accelerator
            there, unread by the host: NaN instead of a ValueError if it is not positive; the others read it in every
            call.
        group: the ranks that share one global batch, all with the same 2n. None: the default group where
            torch.distributed is initialised, else this process alone. So the same call serves 1 rank and many.
        impl: "blockwise" needs memory O(M D + block) for the M rows of all ranks and cannot be differentiated twice;
            "triton" does the same in fused kernels, on NVIDIA GPUs from compute capability 8.0 on, for all dtypes but
            float64; "reference" is the dense oracle, O(2n M). "auto" is "triton" where it runs, else "blockwise".
        precision: of the GEMMs of "triton" on a float32 z: "tf32" on tensor cores, with 10 bits of mantissa, or
            "ieee", full float32 without tensor cores. None: what torch.backends.cuda.matmul.fp32_precision says of
            torch's own products, "ieee" unless changed. Nothing else heeds it.

    Returns:
        (): the mean over this rank's 2n row losses, float32 (float64 for a float64 z). The average over ranks is the
        loss of the global batch, and the ranks' averaged gradients, as DDP averages them, are its gradient, for
        parameters behind z and for the temperature.

    Raises:
        ValueError: z is not a floating (2n, D) with n >= 1, temperature is not a positive 0-dim number, impl or
            precision is unknown, impl does not run here, or the ranks' shapes differ (on an
            accelerator only the group's first call checks this: see `loss.distributed.check_equal_shapes`).
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    if precision not in (None, *get_args(Precision)):
        raise ValueError(f"precision must be None, {' or '.join(get_args(Precision))}; got {precision!r}")
    if z.ndim != 2 or not z.is_floating_point():
        raise ValueError(f"z must be a floating (2n, D); got shape {tuple(z.shape)} of {z.dtype}")
    if impl == "triton" and (reason := refusal(z.device, z.dtype)):
        raise ValueError(reason)
    if impl == "auto" and z.is_cuda and not refusal(z.device, z.dtype):
        impl = "triton"
    temperature = _as_tensor(temperature, may_read_device=impl != "triton")
    group = distributed.participants(group)
    if group is not None:
        distributed.check_equal_shapes(z, group)  # before z is refused for its rows: on all ranks alike, or none hangs
    if z.shape[0] == 0 or z.shape[0] % 2:
        raise ValueError(f"z must hold two views of each of n >= 1 samples, (2n, D); got shape {tuple(z.shape)}")

    with torch.autocast(z.device.type, enabled=False):
        if impl == "reference":
            z_all = z if group is None else distributed.GatherRowsWithGradient.apply(z, group)
            return nt_xent_reference(z, temperature, z_all)
        gather = None if group is None else partial(distributed.gather_rows, group=group)
        if impl == "triton":
            return nt_xent_triton(z, temperature, gather, precision or _torch_precision())
        return nt_xent_blockwise(z, temperature) if gather is None else nt_xent_blockwise(z, temperature, gather)


@torch.compiler.assume_constant_result
def _torch_precision() -> Precision:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _as_tensor(temperature: float | Tensor, may_read_device: bool) -> Tensor:
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=torch.float64)
    if temperature.ndim != 0:
        raise ValueError(f"temperature must be a number or 0-dim; got shape {tuple(temperature.shape)}")
    may_read = may_read_device or temperature.device.type == "cpu"
    if may_read and not torch.compiler.is_compiling() and not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature.item()} of shape ()")
    return temperature
