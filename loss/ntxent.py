"""The one public door to the NT-Xent loss."""

import math
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from . import distributed
from .common import check_range
from .cpu.blockwise import nt_xent_blockwise
from .reference import nt_xent_reference

try:
    from .triton.ops import nt_xent_triton
    from .triton.tiles import refusal
except ImportError:

    def refusal(device: torch.device, dtype: torch.dtype) -> str:
        return "impl='triton' needs the triton package, which is not installed: choose impl='auto' or 'blockwise'"


Impl = Literal["auto", "blockwise", "reference", "triton"]
Precision = Literal["tf32", "ieee"]


@dataclass(frozen=True)
class LossConfig:
    """Contrastive loss."""

    temperature: float = 0.1
    """Temperature of NT-Xent."""
    impl: Impl = "auto"
    """Implementation. auto: triton on NVIDIA GPUs that can run it, blockwise elsewhere."""

    def __post_init__(self) -> None:
        check_range("--loss.temperature", self.temperature, 0.001, 1000)


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
        z: (2n, D), this rank's projections as the head returns them: the loss normalizes the rows. The two views of
            sample i are rows i and n + i. float64, float32, bfloat16 or float16; the latter two are computed in
            float32, inside autocast too, and the gradient has z's dtype; the GEMMs of "triton" take their operands in
            z's dtype. A zero row has similarity 0 to every other row and gets no gradient, and so does a row too short
            to be squared (below 1.1e-17 in float32). NaN, inf or a row too long to be squared (above 1e19 in float32)
            makes the loss NaN.
        temperature: a positive number, or a 0-dim tensor on the CPU or on z's device, which may be learned. "triton"
            does not read a tensor on an accelerator on the host: if it is not positive, the loss is NaN instead of a
            ValueError, as under torch.compile. The others read it in every call. float32 holds down to about 0.005.
        group: the ranks that share one global batch, all with the same 2n, this process among them. None: the default
            group if torch.distributed is initialized, else this process alone. The same call serves 1 rank and many.
        impl: "blockwise" needs memory O(M D + block) for the M rows of all ranks and can be differentiated once, in
            reverse mode and outside torch.func; "triton" does the same in fused kernels, on NVIDIA GPUs of compute
            capability 8.0 or later, for all dtypes but float64; "reference" is the dense oracle, O(2n M), without
            those limits. "auto" is "triton" where it runs, else "blockwise".
        precision: of the GEMMs of "triton" on a float32 z: "tf32" on tensor cores, with 10 bits of mantissa, or
            "ieee", full float32 without tensor cores. None: what torch.backends.cuda.matmul.fp32_precision says of
            torch's own products, "ieee" unless changed. The other impls are made of torch's products and always follow
            torch's settings: after torch.set_float32_matmul_precision("medium") a CPU may multiply in bfloat16.

    Returns:
        (): the mean over this rank's 2n row losses, float32 (float64 for a float64 z). The average over ranks is the
        loss of the global batch, and the ranks' averaged gradients, as DDP averages them, are its gradient, for
        parameters behind z and for the temperature.

    Raises:
        ValueError: z is not a floating (2n, D) with n, D >= 1, temperature is not positive and finite, impl or
            precision is unknown, impl does not run here, this process is not in the group, or the ranks' calls differ
            (on an accelerator only the group's first call checks this: see `loss.distributed.check_equal_calls`).
        TypeError: z is not a tensor, or temperature is neither a number nor a tensor.
        RuntimeError: a second derivative, a forward-mode derivative or one of torch.func is taken, for which only
            "reference" has formulas.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    if precision not in (None, *get_args(Precision)):
        raise ValueError(f"precision must be None, {' or '.join(get_args(Precision))}; got {precision!r}")
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor; got {type(z).__name__}")
    if z.ndim != 2 or z.dtype not in distributed.DTYPES or z.layout != torch.strided:
        raise ValueError(
            "z must be a dense (2n, D) tensor of float64, float32, bfloat16 or float16; got shape "
            f"{tuple(z.shape)} of {z.dtype}, {z.layout}"
        )
    if impl == "triton" and (reason := refusal(z.device, z.dtype)):
        raise ValueError(reason)
    if impl == "auto":
        impl = "triton" if z.is_cuda and not refusal(z.device, z.dtype) else "blockwise"
    number = temperature if isinstance(temperature, Real) else None
    temperature = _as_tensor(temperature, z.device, may_read_device=impl != "triton")
    if impl != "reference":
        _check_reverse_mode(z, temperature)
    group = distributed.participants(group)
    if group is not None:  # before z is refused for its rows, so that all ranks refuse it and none hangs
        distributed.check_equal_calls(z, impl, number, group)
    if 0 in z.shape or z.shape[0] % 2:
        raise ValueError(
            f"z must hold two views of each of n >= 1 samples, (2n, D) with D >= 1; got shape {tuple(z.shape)}"
        )

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


def _as_tensor(temperature: float | Tensor, device: torch.device, may_read_device: bool) -> Tensor:
    if isinstance(temperature, Real):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {temperature}")
        return torch.tensor(float(temperature), dtype=torch.float64, device="cpu")  # whatever the default device is
    if not isinstance(temperature, Tensor):
        raise TypeError(f"temperature must be a number or a 0-dim tensor; got {type(temperature).__name__}")
    if temperature.ndim != 0:
        raise ValueError(f"temperature must be a number or 0-dim; got shape {tuple(temperature.shape)}")
    if temperature.dtype not in (*distributed.DTYPES, torch.int64, torch.int32):
        raise ValueError(f"temperature must be float64, float32, bfloat16 or float16; got {temperature.dtype}")
    if temperature.device.type != "cpu" and temperature.device != device:
        raise ValueError(f"temperature must be on the CPU or on z's device {device}; got {temperature.device}")
    if torch.compiler.is_compiling():  # a graph cannot raise
        return temperature.where((temperature > 0) & (temperature < math.inf), math.nan)
    may_read = may_read_device or temperature.device.type == "cpu"
    if may_read and not (temperature > 0) & (temperature < math.inf):
        raise ValueError(f"temperature must be positive and finite; got {temperature.item()}")
    return temperature


def _check_reverse_mode(*inputs: Tensor) -> None:
    # The operators have no formulas for the other modes, and torch would drop a tangent without a word.
    if torch.compiler.is_compiling():
        unsupported = torch._C._are_functorch_transforms_active()
    else:
        unsupported = any(_has_other_derivative(x) for x in inputs)
    if unsupported:
        raise RuntimeError(
            "nt_xent supports neither forward-mode differentiation nor the derivatives of torch.func: use "
            "impl='reference' or Tensor.backward"
        )


def _has_other_derivative(x: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(x):  # one layer per transform; vmap alone is fine
        if _functorch.is_gradtrackingtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None
