"""NT-Xent on the Triton kernels as custom operators, for autograd and torch.compile, on one rank or several.

The kernels run on NVIDIA GPUs and, for tests, on the CPU in Triton's interpreter.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import OPERATOR_NAMESPACE
from ..cpu.blockwise import positives_of, refuse_second_derivative, unit_rows, with_gradient_in
from .grad_matmul import grad_matmul
from .lse_forward import lse_forward
from .lse_triangle import lse_triangle, triangle_places
from .rows import gradient_rows, is_copied, row_losses, scale_rows
from .tiles import choose_tile, tile_of


class RowTerms(NamedTuple):
    """Float32 terms of this rank's 2n rows; g (M,) of the rows of all ranks."""

    losses: Tensor
    a: Tensor
    b: Tensor
    q: Tensor
    g: Tensor


def nt_xent_triton(
    z: Tensor,
    temperature: Tensor,
    gather: Callable[[Tensor], Tensor] | None = None,
    precision: str = "tf32",
    decoupled: bool = False,
    past: Tensor | None = None,
) -> Tensor:
    """`nt_xent` of this rank's projections, computed by Triton kernels.

    Args:
        z: (2n, D) float32, bfloat16 or float16.
        temperature: (). On z's device it is read by the kernels only and cannot be checked: if it is not positive, the
            loss is NaN.
        gather: concatenates a tensor's rows over all ranks, this rank's first; None for a single rank. Gathering z
            overlaps with the sums over this rank's own columns.
        precision: of the products of float32 rows, "tf32" or "ieee".
        decoupled: whether to omit the positive from the denominator.
        past: (2n,) float32 log-sums over negatives outside the batch, differentiable; None for no others.

    Returns:
        () float32, differentiable once in z, in temperature and in past.
    """
    z = z.contiguous()
    with torch.no_grad():
        others = None if past is None else past[None] / math.log(2)
        if gather is None:
            z_all = z.detach()
            terms = RowTerms(*own_losses(z_all, temperature, precision, decoupled, others))
            b_all = terms.b
        else:
            wait = _start(gather, z.detach())
            own_partial, own_sums, positives = own_log_sums(z.detach(), temperature, precision)
            z_all = wait()
            own = own_partial if others is None else torch.cat([own_partial, others])
            terms = RowTerms(*all_losses(z_all, temperature, own, own_sums, positives, precision, decoupled))
            b_all = gather(terms.b)
    loss = mean_loss(z, temperature, terms.losses, z_all, terms.a, b_all, terms.q, terms.g, precision)
    if past is None:
        return loss
    with torch.no_grad():
        lse = positives_of(unit_rows(z)[0], z.shape[0], temperature) + terms.losses  # whether decoupled or not
    return with_gradient_in(past, loss, lse)


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::triton_own_losses", mutates_args=())
def own_losses(
    z: Tensor, temperature: Tensor, precision: str, decoupled: bool, others: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`RowTerms` of z (2n, D) on a single rank; others (1, 2n) are base-2 log-sums over negatives outside the batch."""
    with torch.cuda.device_of(z):
        n = z.shape[0] // 2
        y, g, positives, sums = scale_rows(z, temperature, n, precision, "lse_forward")
        places = triangle_places(z, temperature, n, precision)
        if places is None:
            partial = lse_forward(y, g, temperature, n, precision, own=True)
        else:
            partial = g.new_empty(0, 2 * n)
            lse_triangle(y, g, sums, places, n, precision)
        if others is not None:
            partial = torch.cat([partial, others])
        return *row_losses(partial, sums, places, positives, g, temperature, z.dtype, decoupled), g


@own_losses.register_fake
def _(z, temperature, precision, decoupled, others=None):
    return tuple(z.new_empty(z.shape[0], dtype=torch.float32) for _ in range(5))


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::triton_own_log_sums", mutates_args=())
def own_log_sums(z: Tensor, temperature: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the columns of z (2n, D), and t_ip(i) (n,) of its positives.

    The sums are log-sums (splits, 2n) in base 2, or integers (2n,) from `lse_triangle`; the other tensor adds nothing.
    """
    with torch.cuda.device_of(z):
        n = z.shape[0] // 2
        y, g, positives, sums = scale_rows(z, temperature, n, precision, "lse_forward")
        places = triangle_places(z, temperature, n, precision)
        if places is None:
            return lse_forward(y, g, temperature, n, precision, own=True), sums, positives
        lse_triangle(y, g, sums, places, n, precision)
        _, splits = choose_tile("lse_forward", z, precision, n, 2 * n)
        return g.new_full((splits, 2 * n), -math.inf), sums, positives


@own_log_sums.register_fake
def _(z, temperature, precision):
    rows = z.shape[0]
    _, splits = choose_tile("lse_forward", z, precision, rows // 2, rows)
    sums = z.new_empty(rows, dtype=torch.int64)
    return z.new_empty(splits, rows, dtype=torch.float32), sums, z.new_empty(rows // 2, dtype=torch.float32)


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::triton_all_losses", mutates_args=())
def all_losses(
    z_all: Tensor,
    temperature: Tensor,
    own_partial: Tensor,
    own_sums: Tensor,
    positives: Tensor,
    precision: str,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`RowTerms` of the first 2n rows of z_all (M, D), from the results of `own_log_sums` and the other ranks' rows."""
    with torch.cuda.device_of(z_all):
        n = positives.shape[0]
        y_all, g_all, *_ = scale_rows(z_all, temperature, n, precision, "lse_forward")
        partial = torch.cat([own_partial, lse_forward(y_all, g_all, temperature, n, precision, own=False)])
        places = triangle_places(z_all, temperature, n, precision)
        terms = row_losses(partial, own_sums, places, positives, g_all, temperature, z_all.dtype, decoupled)
        return *terms, g_all


@all_losses.register_fake
def _(z_all, temperature, own_partial, own_sums, positives, precision, decoupled):
    rows = 2 * positives.shape[0]
    return tuple(z_all.new_empty(size, dtype=torch.float32) for size in (rows, rows, rows, rows, z_all.shape[0]))


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::triton_mean_loss", mutates_args=())
def mean_loss(
    z: Tensor,
    temperature: Tensor,
    losses: Tensor,
    z_all: Tensor,
    a: Tensor,
    b_all: Tensor,
    q: Tensor,
    g_all: Tensor,
    precision: str,
) -> Tensor:
    """Mean loss () of this rank's rows z (2n, D), differentiable once in z and in temperature.

    The other tensors are intermediate results, not inputs: gradients through them are part of the gradient of z.
    """
    return losses.mean()


@mean_loss.register_fake
def _(z, temperature, losses, z_all, a, b_all, q, g_all, precision):
    return losses.new_empty(())


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::triton_gradient", mutates_args=())
def loss_gradient(
    grad_loss: Tensor,
    temperature: Tensor,
    z_all: Tensor,
    a: Tensor,
    b_all: Tensor,
    q: Tensor,
    g_all: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """dL/dz_i (2n, D) and shares of dL/dtau (2n,) of W times the global loss: the mean over W ranks is its gradient."""
    with torch.cuda.device_of(z_all):
        n = q.shape[0] // 2
        y = z_all
        if is_copied(z_all, tile_of("grad_matmul", z_all, precision).pitch(z_all.shape[1])):
            y, *_ = scale_rows(z_all, temperature, n, precision, "grad_matmul")
        product = grad_matmul(y, g_all, a, b_all, temperature, precision)
        return gradient_rows(grad_loss, temperature, z_all, product, q)


@loss_gradient.register_fake
def _(grad_loss, temperature, z_all, a, b_all, q, g_all, precision):
    return z_all.new_empty(q.shape[0], z_all.shape[1]), torch.empty_like(q)


def _save_for_gradient(ctx, inputs, output):
    _, temperature, _, *saved, ctx.precision = inputs
    ctx.save_for_backward(temperature, *saved)


def _backward(ctx, grad_loss):
    refuse_second_derivative()
    dz, dtau = loss_gradient(grad_loss, *ctx.saved_tensors, ctx.precision)
    d_tau = None
    if ctx.needs_input_grad[1]:  # only then: copying to a temperature on the CPU synchronizes
        d_tau = dtau.sum().to(ctx.saved_tensors[0])
    return dz, d_tau, None, None, None, None, None, None, None


mean_loss.register_autograd(_backward, setup_context=_save_for_gradient)


def _start(gather: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[], Tensor]:
    """Start gathering z, on a side stream if it is on a GPU; the returned function waits for the result."""
    if not z.is_cuda or torch.compiler.is_compiling():
        return lambda: gather(z)
    main = torch.cuda.current_stream(z.device)
    side = _side_stream(z.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        z_all = gather(z)

    def wait() -> Tensor:
        main.wait_stream(side)
        z_all.record_stream(main)  # or `side` could reuse its memory while kernels on `main` still read it
        return z_all

    return wait


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
