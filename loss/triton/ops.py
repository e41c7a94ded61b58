"""NT-Xent on the kernels of triton_kernels.py: operators for autograd and torch.compile, one rank or several.

The kernels run on NVIDIA GPUs and, for tests, in Triton's interpreter on the CPU.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .launch import gradient_rows, negatives, row_losses, scale_rows
from .tiles import choose


def nt_xent_triton(
    z: Tensor, temperature: Tensor, gather: Callable[[Tensor], Tensor] | None = None, precision: str = "tf32"
) -> Tensor:
    """The loss of `nt_xent` for this rank's z (m, D), float32, bfloat16 or float16.

    `gather` concatenates a tensor's rows over the ranks, this rank's first. That of z runs beside the sums over this
    rank's own columns. A temperature on z's device is read by the kernels, not by the host, and not checked there: the
    loss is NaN if it is not positive.
    """
    z = z.contiguous()
    with torch.no_grad():
        if gather is None:
            z_all = z.detach()
            losses, lse_all, q, g_all = own_losses(z_all, temperature, precision)
        else:
            wait = _start(gather, z.detach())
            own_partial, positives = own_negatives(z.detach(), temperature, precision)
            z_all = wait()
            losses, lse, q, g_all = all_losses(z_all, temperature, own_partial, positives, precision)
            lse_all = gather(lse)
    return mean_loss(z, temperature, z_all, losses, lse_all, q, g_all, precision)


@torch.library.custom_op("streamclr::triton_own_losses", mutates_args=())
def own_losses(z: Tensor, temperature: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """l (m,), lse (m,) in base 2, q (m,) and g (m,) of z (m, D) against itself, all fp32."""
    with torch.cuda.device_of(z):
        y, g, positives = scale_rows(z, temperature, z.shape[0] // 2, precision)
        partial = negatives(y, g, temperature, z.shape[0] // 2, precision, own=True)
        return *row_losses(partial, positives), g


@own_losses.register_fake
def _(z, temperature, precision):
    return tuple(z.new_empty(z.shape[0], dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("streamclr::triton_own_negatives", mutates_args=())
def own_negatives(z: Tensor, temperature: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Base-2 log-sums over this rank's own columns, (splits, m) yet to be added up, and the positives' t (m / 2,)."""
    with torch.cuda.device_of(z):
        y, g, positives = scale_rows(z, temperature, z.shape[0] // 2, precision)
        return negatives(y, g, temperature, z.shape[0] // 2, precision, own=True), positives


@own_negatives.register_fake
def _(z, temperature, precision):
    _, splits = choose("negatives", z.device, z.dtype, precision, z.shape[0] // 2, z.shape[0], z.shape[1])
    return z.new_empty(splits, z.shape[0], dtype=torch.float32), z.new_empty(z.shape[0] // 2, dtype=torch.float32)


@torch.library.custom_op("streamclr::triton_all_losses", mutates_args=())
def all_losses(
    z_all: Tensor, temperature: Tensor, own_partial: Tensor, positives: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`own_losses` of the first m rows of z_all (M, D) against all, given those of own_negatives; g is (M,)."""
    with torch.cuda.device_of(z_all):
        n = positives.shape[0]
        y_all, g_all, _ = scale_rows(z_all, temperature, n, precision)
        partial = torch.cat([own_partial, negatives(y_all, g_all, temperature, n, precision, own=False)])
        return *row_losses(partial, positives), g_all


@all_losses.register_fake
def _(z_all, temperature, own_partial, positives, precision):
    rows = 2 * positives.shape[0]
    return tuple(z_all.new_empty(size, dtype=torch.float32) for size in (rows, rows, rows, z_all.shape[0]))


@torch.library.custom_op("streamclr::triton_mean_loss", mutates_args=())
def mean_loss(
    z: Tensor,
    temperature: Tensor,
    z_all: Tensor,
    losses: Tensor,
    lse_all: Tensor,
    q: Tensor,
    g_all: Tensor,
    precision: str,
) -> Tensor:
    """Mean l_i () over the rows of z (m, D), differentiable once in z and in temperature.

    z_all (M, D), whose first m rows are z, and all after it are intermediate results, not inputs: the gradient that
    flows through them is already part of the gradient of z.
    """
    return losses.mean()


@mean_loss.register_fake
def _(z, temperature, z_all, losses, lse_all, q, g_all, precision):
    return losses.new_empty(())


@torch.library.custom_op("streamclr::triton_gradient", mutates_args=())
def gradient(
    grad_loss: Tensor, temperature: Tensor, z_all: Tensor, lse_all: Tensor, q: Tensor, g_all: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """dL/dz_i (m, D) and <z_i, dL/dz_i> (m,) of W times the global loss: averaged over W ranks, the global gradient."""
    with torch.cuda.device_of(z_all):
        return gradient_rows(grad_loss, temperature, z_all, lse_all, q, g_all, precision)


@gradient.register_fake
def _(grad_loss, temperature, z_all, lse_all, q, g_all, precision):
    return z_all.new_empty(q.shape[0], z_all.shape[1]), torch.empty_like(q)


def _save_for_gradient(ctx, inputs, output):
    _, temperature, z_all, _, lse_all, q, g_all, ctx.precision = inputs
    ctx.save_for_backward(temperature, z_all, lse_all, q, g_all)


def _backward(ctx, grad_loss):
    if torch.is_grad_enabled():  # the gradient would come out as a constant, and a penalty on it would do nothing
        raise RuntimeError("nt_xent cannot be differentiated twice (create_graph=True); impl='reference' can")
    temperature, z_all, lse_all, q, g_all = ctx.saved_tensors
    dz, along = gradient(grad_loss, temperature, z_all, lse_all, q, g_all, ctx.precision)
    # Only where it is asked for: bringing it to a temperature on the CPU makes the host wait.
    d_tau = (along.sum().to(temperature) / (-2 * temperature)) if ctx.needs_input_grad[1] else None
    return dz, d_tau, None, None, None, None, None, None


mean_loss.register_autograd(_backward, setup_context=_save_for_gradient)


def _start(gather: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[], Tensor]:
    """Begins to gather z, beside the current stream where there is one; the result waits for it."""
    if not z.is_cuda or torch.compiler.is_compiling():
        return lambda: gather(z)
    main = torch.cuda.current_stream(z.device)
    side = _side_stream(z.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        z_all = gather(z)

    def wait() -> Tensor:
        main.wait_stream(side)
        z_all.record_stream(main)  # or its memory could be given away on `side` while kernels on `main` still read it
        return z_all

    return wait


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
