"""NT-Xent loss: the public function, its configuration and the choice of implementation."""

import math
import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from . import distributed
from .common import UserError, check_range
from .cpu import one_pass
from .cpu.blockwise import compute_dtype, nt_xent_blockwise
from .queue import NegativeQueue, log_sums
from .reference import nt_xent_reference, past_similarities
from .triton import NO_C_COMPILER, unsupported_reason

Impl = Literal["auto", "blockwise", "reference", "triton"]
Precision = Literal["tf32", "ieee"]
IMPLS, PRECISIONS = get_args(Impl), (None, *get_args(Precision))
LEARNED_RANGE = 0.01, 1.0
"""Range of a learned temperature. CLIP keeps 1 / tau at or below 100 (arXiv 2103.00020, section 2.5); 1 is the largest
temperature with which SimCLR was evaluated (arXiv 2002.05709, table 5)."""


@dataclass(frozen=True)
class LossConfig:
    """Options of the contrastive loss."""

    temperature: float = 0.1
    """Temperature of NT-Xent; with --loss.learn-temperature the initial one."""
    learn_temperature: bool = False
    """Learn the temperature, within 0.01 to 1."""
    decoupled: bool = False
    """Leave the positive out of the denominator (DCL, arXiv 2110.06848)."""
    queue: int = 0
    """Number of projections of past steps that are further negatives after a quarter of the run; 0 for none."""
    impl: Impl = "auto"
    """Implementation of NT-Xent. auto: triton on NVIDIA GPUs that support it, blockwise elsewhere."""

    def __post_init__(self) -> None:
        check_range("--loss.temperature", self.temperature, 0.001, 1000)
        check_range("--loss.queue", self.queue, 0, 10**6)
        if self.learn_temperature:
            check_range("--loss.temperature with --loss.learn-temperature", self.temperature, *LEARNED_RANGE)

    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """Refuse an implementation that does not run on such projections.

        Raises:
            UserError: names the reason and another implementation.
        """
        if self.impl == "triton" and (reason := unsupported_reason(device, dtype)):
            raise UserError(re.sub(r"impl='(\w+)'", r"--loss.impl \1", reason).replace("'", ""))


def nt_xent(
    z: Tensor,
    temperature: float | Tensor,
    group: torch.distributed.ProcessGroup | None = None,
    impl: Impl = "auto",
    precision: Precision | None = None,
    decoupled: bool = False,
    *,
    queue: NegativeQueue | None = None,
    sample: Tensor | None = None,
) -> Tensor:
    """NT-Xent, the contrastive loss of SimCLR (arXiv 2002.05709, section 2.1, equation 1 and Algorithm 1).

    The negatives of a row are all rows of all ranks except itself and the other view of its sample, and, with a queue,
    its entries of other samples.

    Args:
        z: (2n, D) projections of this rank, not normalized. Rows i and n + i are the two views of sample i. float64,
            float32, bfloat16 or float16; the latter two are computed in float32, also inside autocast, but the GEMMs of
            "triton" read them in their own dtype. The gradient has z's dtype. A zero row, or one too short to be
            squared (norm below 1.1e-17 in float32), has similarity 0 to every other row and receives no gradient. NaN,
            inf or a row too long to be squared (norm above 1e19 in float32) makes the loss NaN.
        temperature: a positive number, or a 0-dim tensor on the CPU or on z's device, which receives a gradient.
            float32 is accurate down to about 0.005. A tensor on the CPU is checked in every call, one on an accelerator
            by all implementations except "triton", which does not synchronize: if it is not positive, the loss is NaN,
            as under torch.compile.
        group: ranks that share one global batch, all with the same 2n, including this process. None: the default group
            if torch.distributed is initialized, else this process alone.
        impl: "blockwise" needs O(M D + block) memory for the M rows of all ranks; on a single rank without a queue, up
            to 4,096 rows keep M^2 / 2 exponentials instead of computing them twice. "triton" computes the same in fused
            kernels on NVIDIA GPUs of compute capability 8.0 or later, for all dtypes except float64. Both can be
            differentiated once, in reverse mode and outside torch.func. "reference" is the dense oracle, O(2n M)
            memory, without these limits. "auto" is "triton" where it runs, else "blockwise"; it warns once if all that
            "triton" lacks is a C compiler.
        precision: of the GEMMs of "triton" on a float32 z: "tf32" uses tensor cores with a 10-bit mantissa, "ieee" full
            float32 without tensor cores. None follows torch.backends.cuda.matmul.fp32_precision, which is "ieee" by
            default. The other implementations always follow torch's settings: after
            torch.set_float32_matmul_precision("medium") a CPU may multiply in bfloat16.
        decoupled: omit the positive from the denominator of equation 1 (DCL, arXiv 2110.06848). This needs at least two
            samples over all ranks, and the loss may be negative.
        queue: projections of past steps, on z's device, the same on every rank; constants, which receive no gradient.
            dL/dz is that of a batch which they would complete, see `loss.queue`. The caller appends those of each step
            after this call (`NegativeQueue.append`).
        sample: with a queue, the index of each sample, (n,) int64 on z's device, not negative.

    Returns:
        (): mean over the 2n row losses of this rank, float32 (float64 for a float64 z). Its mean over ranks is the loss
        of the global batch. Gradients averaged over ranks, as by DDP, are those of the global batch, for parameters
        behind z and for the temperature.

    Raises:
        ValueError: z is not a floating (2n, D) with n, D >= 1, temperature is not positive and finite, impl or
            precision is unknown, impl does not run here, decoupled is set for a single sample, queue or sample do not
            fit z, this process is not in the group, or the ranks' calls differ (on an accelerator only checked in the
            first call of a group: see `loss.distributed.check_equal_calls`).
        TypeError: z is not a tensor, or temperature is neither a number nor a tensor.
        RuntimeError: a second, forward-mode or torch.func derivative of an implementation other than "reference".
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}.")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be None, {' or '.join(PRECISIONS[1:])}; got {precision!r}.")
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor; got {type(z).__name__}.")
    if z.ndim != 2 or z.dtype not in distributed.DTYPES or z.layout != torch.strided:
        raise ValueError(
            "z must be a dense (2n, D) tensor of float64, float32, bfloat16 or float16; got shape "
            f"{tuple(z.shape)} of {z.dtype}, {z.layout}."
        )
    if impl == "triton" and (reason := unsupported_reason(z.device, z.dtype)):
        raise ValueError(reason)
    if impl == "auto":
        impl = _choose_impl(z.device, z.dtype)
    number = temperature if isinstance(temperature, Real) else None
    temperature = _as_tensor(temperature, z.device, may_read_device=impl != "triton")
    if impl != "reference":
        _check_reverse_mode(z, temperature)
    group = distributed.participants(group)
    if group is not None:  # before the check of z's rows, so that every rank raises and none hangs
        distributed.check_equal_calls(z, impl, number, decoupled, group, 0 if queue is None else len(queue.z))
    if 0 in z.shape or z.shape[0] % 2:
        raise ValueError(
            f"z must hold two views of each of n >= 1 samples, (2n, D) with D >= 1; got shape {tuple(z.shape)}."
        )
    if decoupled and group is None and z.shape[0] == 2:
        raise ValueError("decoupled=True needs negatives, but z holds a single sample; use at least two samples.")

    if queue is not None:
        _check_queue(z, queue, sample)

    autocast = torch.is_autocast_enabled(z.device.type)
    with torch.autocast(z.device.type, enabled=False) if autocast else nullcontext():
        if impl == "reference":
            z_all = z if group is None else distributed.GatherRowsWithGradient.apply(z, group)
            past = None if queue is None else past_similarities(twice(z), temperature, sample, queue.z, queue.sample)
            return nt_xent_reference(z, temperature, z_all, decoupled, past)
        if queue is not None and impl != "triton":
            z = z.to(compute_dtype(z))  # once, so that the gradient is rounded to z's dtype once
        past = None
        if queue is not None:
            past = log_sums(twice(z), temperature, sample, queue.z, queue.sample, torch.is_grad_enabled())[0]
        gather = None if group is None else partial(distributed.gather_rows, group=group)
        if impl == "triton":
            from .triton.ops import nt_xent_triton

            return nt_xent_triton(z, temperature, gather, precision or _torch_precision(), decoupled, past)
        if gather is None and past is None and z.shape[0] <= one_pass.MAX_ROWS:
            return one_pass.nt_xent_one_pass(z, temperature, decoupled)
        return nt_xent_blockwise(z, temperature, gather or Tensor.detach, decoupled, past)


def nt_xent_and_append(
    z: Tensor, temperature: float | Tensor, sample: Tensor | None, queue: NegativeQueue | None, **options: Any
) -> Tensor:
    """`nt_xent` of a training step, whose projections then join the queue, if there is one.

    Args:
        z, temperature, sample, queue, options: see `nt_xent`.
    """
    loss = nt_xent(z, temperature, queue=queue, sample=sample, **options)
    if queue is not None:
        queue.append(z, sample, options.get("group"))
    return loss


def twice(z: Tensor) -> Tensor:
    """z itself, but its gradient counts twice: see `loss.queue`."""
    return z + (z - z.detach())


def _check_queue(z: Tensor, queue: NegativeQueue, sample: Tensor | None) -> None:
    if queue.z.shape[1:] != z.shape[1:] or queue.z.device != z.device:
        raise ValueError(
            f"queue must hold projections of z's width on its device, (N, {z.shape[1]}) on {z.device}; got "
            f"{tuple(queue.z.shape)} on {queue.z.device}."
        )
    n = len(z) // 2
    fits = isinstance(sample, Tensor) and sample.shape == (n,) and sample.dtype == torch.int64
    if not fits or sample.device != z.device:
        raise ValueError(f"With a queue, sample must hold an int64 index on {z.device} for each of {n} samples.")


def _choose_impl(device: torch.device, dtype: torch.dtype) -> Impl:
    if device.type != "cuda":
        return "blockwise"
    reason = unsupported_reason(device, dtype)
    if reason == NO_C_COMPILER:
        _warn_of_missing_compiler()
    return "blockwise" if reason else "triton"


@cache
def _warn_of_missing_compiler() -> None:
    warnings.warn(
        f"nt_xent uses the slower impl='blockwise'. {NO_C_COMPILER}",
        stacklevel=4,
    )


def _torch_precision() -> Precision:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# See the end of triton/__init__.py.
_choose_impl._dynamo_marked_constant = True
_torch_precision._dynamo_marked_constant = True


def _as_tensor(temperature: float | Tensor, device: torch.device, may_read_device: bool) -> Tensor:
    if isinstance(temperature, Real):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {temperature}.")
        return torch.scalar_tensor(temperature, dtype=torch.float64, device="cpu")  # not the default device
    if not isinstance(temperature, Tensor):
        raise TypeError(f"temperature must be a number or a 0-dim tensor; got {type(temperature).__name__}.")
    if temperature.ndim != 0:
        raise ValueError(f"temperature must be a number or 0-dim; got shape {tuple(temperature.shape)}.")
    if temperature.dtype not in (*distributed.DTYPES, torch.int64, torch.int32):
        raise ValueError(f"temperature must be float64, float32, bfloat16 or float16; got {temperature.dtype}.")
    if temperature.device.type != "cpu" and temperature.device != device:
        raise ValueError(f"temperature must be on the CPU or on z's device {device}; got {temperature.device}.")
    if torch.compiler.is_compiling():  # a graph cannot raise
        return temperature.where((temperature > 0) & (temperature < math.inf), math.nan)
    may_read = may_read_device or temperature.device.type == "cpu"
    if may_read and not (temperature > 0) & (temperature < math.inf):
        raise ValueError(f"temperature must be positive and finite; got {temperature.item()}.")
    return temperature


def _check_reverse_mode(*inputs: Tensor) -> None:
    # The operators define reverse mode only, and torch would silently drop a tangent.
    unsupported = torch._C._are_functorch_transforms_active()
    if not torch.compiler.is_compiling():
        unsupported |= forward_ad._current_level >= 0  # dual tensors exist only inside a level
        unsupported = unsupported and any(_has_other_derivative(x) for x in inputs)
    if unsupported:
        raise RuntimeError(
            "nt_xent supports neither forward-mode differentiation nor the derivatives of torch.func; use "
            "impl='reference' or Tensor.backward."
        )


def _has_other_derivative(x: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(x):  # one layer per transform; vmap alone is supported
        if _functorch.is_gradtrackingtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None
