"""Launches of the kernels: outputs, grids, tiles. Every function takes and gives tensors, and no host waits for any."""

import math

import torch
import triton
from torch import Tensor

from .kernels import MIN_TEMPERATURE, grad_matmul_kernel, lse_forward_kernel
from .rows import gradient_kernel, row_losses_kernel, scale_rows_kernel
from .tiles import Tile, choose, row_block, tile_on

# In fp16, 2^-lse times this: (P_ij + P_ji) g_j stays below half its largest number, and 4e-9 among its normal ones.
FP16_HEADROOM = 2.0**14


def scale_rows(
    x: Tensor, temperature: Tensor, n: int, precision: str, kernel: str = "negatives"
) -> tuple[Tensor, Tensor, Tensor]:
    """From x (M, D): the rows y (M, pitch) that `kernel` takes, g (M,), and the positives' t (M / 2,), in fp32."""
    m, width = x.shape
    pitch = tile_on(kernel, x.device, x.dtype, precision, width).pitch(width)
    y = x.new_empty(m, pitch) if _is_copied(x, pitch) else x
    g = x.new_empty(m, dtype=torch.float32)
    positives = x.new_empty(m // 2, dtype=torch.float32)
    padded, block_m = row_block(pitch)
    scale_rows_kernel[triton.cdiv(n, block_m), m // (2 * n)](
        *(x, _readable(temperature), g, positives, y, n),
        D=width,
        PITCH=pitch,
        D_PADDED=padded,
        BLOCK_M=block_m,
        TAU_IS_POINTER=not _on_host(temperature),
        COPIED=_is_copied(x, pitch),
        SCALED=x.dtype == torch.float16,
    )
    return y, g, positives


def negatives(y: Tensor, g: Tensor, temperature: Tensor, n: int, precision: str, own: bool) -> Tensor:
    """Base-2 log-sums (splits, 2n), yet to be added up, over this rank's columns or over all others of y (M, pitch)."""
    m, width = y.shape
    tile, splits = choose("negatives", y.device, y.dtype, precision, n, 2 * n if own else m - 2 * n, width)
    first_tile, last_tile = (0, _own_tiles(n, tile)) if own else (_own_tiles(n, tile), _tiles(n, m, tile))
    partial = y.new_empty(splits, 2 * n, dtype=torch.float32)
    for form in _forms(temperature):
        lse_forward_kernel[2 * triton.cdiv(n, tile.block_m), splits](
            *(y, g, _readable(temperature), partial, n, m, first_tile, last_tile),
            **_constants(tile, n, width, precision),
            **form,
        )
    return partial


def row_losses(partial: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """l (2n,), lse (2n,) in base 2 and q (2n,) from all log-sums (slots, 2n) and the positives' t (n,)."""
    slots, rows = partial.shape
    losses, lse, q = (partial.new_empty(rows) for _ in range(3))
    row_losses_kernel[(triton.cdiv(rows, 128),)](
        *(partial, positives, losses, lse, q, rows // 2, slots),
        BLOCK_M=128,
    )
    return losses, lse, q


def gradient_rows(
    grad_loss: Tensor, temperature: Tensor, x: Tensor, lse: Tensor, q: Tensor, g: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """W dL/dx_i (2n, D) and W <z_i, dL/dz_i> (2n,) of the first 2n of x (M, D), with lse and g (M,) of all, q (2n,)."""
    rows, (m, width) = q.shape[0], x.shape
    n = rows // 2
    pitch = tile_on("products", x.device, x.dtype, precision, width).pitch(width)
    y = scale_rows(x, temperature, n, precision, "products")[0] if _is_copied(x, pitch) else x
    headroom = FP16_HEADROOM if x.dtype == torch.float16 else 1.0
    lse = lse - math.log2(headroom)
    a = torch.exp2(-lse)

    tile, splits = choose("products", x.device, x.dtype, precision, n, m, pitch)
    product = x.new_empty(splits, rows, pitch, dtype=torch.float32)
    for form in _forms(temperature):
        grad_matmul_kernel[2 * triton.cdiv(n, tile.block_m), splits, triton.cdiv(pitch, tile.block_d)](
            *(y, g, lse, a, a * g, _readable(temperature), product, n, m, _tiles(n, m, tile)),
            **_constants(tile, n, pitch, precision),
            **form,
            BLOCK_D=tile.block_d,
        )

    dx = x.new_empty(rows, width)
    along = x.new_empty(rows, dtype=torch.float32)
    padded, block_m = row_block(width)
    gradient_kernel[(triton.cdiv(rows, block_m),)](
        *(x, product, q, _readable(temperature), grad_loss, dx, along, n, splits, headroom),
        D=width,
        PITCH=pitch,
        D_PADDED=padded,
        BLOCK_M=block_m,
        TAU_IS_POINTER=not _on_host(temperature),
    )
    return dx, along


def _is_copied(x: Tensor, pitch: int) -> bool:
    # Scaled, or padded with zeros: the docstring of triton_kernels.py says why.
    return x.dtype == torch.float16 or x.shape[1] != pitch


def _on_host(temperature: Tensor) -> bool:
    return temperature.device.type == "cpu"


def _readable(temperature: Tensor) -> float | Tensor:
    # A number of the host's is handed over; one on the device stays there, where fetching it would cost a wait.
    return temperature.item() if _on_host(temperature) else temperature


def _forms(temperature: Tensor) -> tuple[dict[str, bool], ...]:
    # A temperature which only the device can read launches both forms: one of them returns at once.
    if _on_host(temperature):
        return ({"ONLINE": temperature.item() < MIN_TEMPERATURE.value, "TAU_IS_POINTER": False},)
    return tuple({"ONLINE": online, "TAU_IS_POINTER": True} for online in (False, True))


def _constants(tile: Tile, n: int, width: int, precision: str) -> dict:
    return {
        "D": width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "EVEN": n % tile.block_m == 0 and n % tile.block_n == 0,
        "PRECISION": precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _own_tiles(n: int, tile: Tile) -> int:
    return 2 * triton.cdiv(n, tile.block_n)  # each view's apart


def _tiles(n: int, m: int, tile: Tile) -> int:
    return _own_tiles(n, tile) + triton.cdiv(m - 2 * n, tile.block_n)
