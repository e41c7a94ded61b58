"""Tile sizes of the kernels per GPU, and the number of programs that share the columns of a row.

Every line of the table was chosen by compiling it ahead of time with every Triton of requirements-triton.lock, so that
none spills registers, each fits the shared memory and, where registers allow, several programs fit a multiprocessor:
one computes exponentials while another multiplies. `python bench/loss_kernel.py --static` prints what each line
compiles to.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """Rows x columns of S that a program holds at a time.

    The similarities read `block_k` columns of x at a time, the product of the gradient `block_d`. Up to D = block_k, x
    is read once for both; above block_d, S is recomputed for every further block_d columns. `programs` is the number
    that fit a multiprocessor at once if the rows fill all tiles; `general_programs` if they do not or a running maximum
    is kept (ONLINE), which takes more registers. The compiler is held to as many registers as that leaves to a thread.
    """

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    warps: int
    stages: int
    programs: int
    general_programs: int

    def programs_for(self, even: bool, online: bool) -> int:
        return self.programs if even and not online else self.general_programs

    def registers_for(self, even: bool, online: bool) -> int:
        """Maximum per thread with which the programs fit a multiprocessor, in units of allocation of eight."""
        return min(255, REGISTERS // (self.programs_for(even, online) * 32 * self.warps) // 8 * 8)

    def is_even(self, n: int) -> bool:
        """Whether the 2n rows of every rank fill all tiles."""
        return n % self.block_m == 0 and n % self.block_n == 0

    def pitch(self, width: int) -> int:
        """D = `width` rounded up to whole blocks: a power of two, or above block_k a multiple of it."""
        return triton.cdiv(width, self.block_k) * self.block_k

    def own_tiles(self, n: int) -> int:
        """Number of column tiles of this rank's 2n rows; each view is tiled separately."""
        return 2 * triton.cdiv(n, self.block_n)

    def all_tiles(self, n: int, m: int) -> int:
        """Number of column tiles of the m rows of all ranks."""
        return self.own_tiles(n) + triton.cdiv(m - 2 * n, self.block_n)

    def constants(self, n: int, width: int, precision: str, online: bool) -> dict:
        """Constants of a launch over tiles, for 2n rows of this rank with D = `width`."""
        return {
            "D": width,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "EVEN": self.is_even(n),
            "PRECISION": precision,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers_for(self.is_even(n), online),
        }


class Chip(NamedTuple):
    architecture: str  # of the lines in TILES
    multiprocessors: int
    tensor_memory: bool = False  # holds what older tensor cores return in registers


# Registers per multiprocessor and maximum of shared memory per block: CUDA C++ programming guide, technical
# specifications per compute capability.
REGISTERS = 65536
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}

# Largest D and its tile, by architecture, kernel and arithmetic. "half" is bfloat16 and float16. sm_86 stands for all
# architectures with 99 KB of shared memory: sm_86, sm_89 and sm_120.
TILES: dict[tuple[str, str, str], dict[float, Tile]] = {
    ("sm_80", "lse_forward", "half"): {
        64: Tile(128, 64, 64, 64, 8, 3, 2, 2),
        128: Tile(128, 64, 128, 128, 4, 3, 2, 2),
        256: Tile(128, 64, 256, 256, 8, 3, 1, 1),
        math.inf: Tile(128, 64, 64, 64, 8, 2, 1, 1),
    },
    ("sm_80", "grad_matmul", "half"): {
        64: Tile(128, 32, 64, 64, 8, 3, 2, 1),
        128: Tile(64, 64, 128, 128, 4, 3, 2, 2),
        256: Tile(64, 32, 256, 256, 8, 3, 1, 1),
        math.inf: Tile(32, 64, 64, 512, 8, 2, 1, 1),
    },
    ("sm_80", "lse_forward", "tf32"): {
        64: Tile(64, 64, 64, 64, 4, 3, 3, 3),
        128: Tile(64, 64, 128, 128, 4, 2, 2, 2),
        math.inf: Tile(128, 64, 32, 32, 8, 3, 1, 1),
    },
    ("sm_80", "grad_matmul", "tf32"): {
        64: Tile(64, 32, 64, 64, 4, 2, 2, 2),
        128: Tile(64, 32, 128, 128, 4, 2, 2, 2),
        math.inf: Tile(64, 32, 32, 256, 8, 2, 1, 1),
    },
    ("sm_86", "lse_forward", "half"): {
        64: Tile(128, 64, 64, 64, 8, 3, 2, 2),
        128: Tile(64, 64, 128, 128, 4, 3, 2, 2),
        256: Tile(64, 64, 256, 256, 4, 2, 1, 1),
        math.inf: Tile(128, 64, 64, 64, 8, 3, 1, 1),
    },
    ("sm_86", "grad_matmul", "half"): {
        64: Tile(128, 32, 64, 64, 8, 3, 2, 1),
        128: Tile(64, 64, 128, 128, 4, 3, 1, 1),
        256: Tile(64, 32, 256, 256, 8, 3, 1, 1),
        math.inf: Tile(32, 64, 64, 512, 8, 2, 1, 1),
    },
    ("sm_86", "lse_forward", "tf32"): {
        64: Tile(64, 64, 64, 64, 4, 3, 2, 2),
        128: Tile(64, 64, 128, 128, 4, 2, 1, 1),
        math.inf: Tile(128, 64, 32, 32, 8, 3, 1, 1),
    },
    ("sm_86", "grad_matmul", "tf32"): {
        64: Tile(64, 32, 64, 64, 4, 2, 3, 2),
        128: Tile(64, 32, 128, 128, 4, 2, 1, 1),
        math.inf: Tile(64, 32, 32, 256, 8, 2, 1, 1),
    },
    ("sm_90", "lse_forward", "half"): {
        64: Tile(128, 64, 64, 64, 4, 3, 3, 3),
        128: Tile(128, 64, 128, 128, 4, 2, 3, 2),
        256: Tile(128, 128, 256, 256, 8, 2, 1, 1),
        math.inf: Tile(128, 128, 64, 64, 8, 3, 1, 1),
    },
    ("sm_90", "grad_matmul", "half"): {
        64: Tile(64, 64, 64, 64, 4, 3, 3, 2),
        128: Tile(64, 64, 128, 128, 4, 3, 3, 2),
        256: Tile(128, 32, 256, 256, 8, 2, 1, 1),
        math.inf: Tile(32, 32, 64, 512, 8, 2, 1, 1),
    },
    ("sm_90", "lse_forward", "tf32"): {
        64: Tile(128, 64, 64, 64, 8, 3, 2, 2),
        128: Tile(64, 64, 128, 128, 4, 2, 2, 2),
        math.inf: Tile(128, 64, 32, 32, 8, 3, 1, 1),
    },
    ("sm_90", "grad_matmul", "tf32"): {
        64: Tile(64, 32, 64, 64, 4, 2, 4, 3),
        128: Tile(64, 32, 128, 128, 4, 2, 2, 2),
        math.inf: Tile(64, 32, 32, 256, 8, 2, 1, 1),
    },
}
for _architecture in SHARED_BYTES:  # no tensor cores: the operands should stay in registers
    TILES[_architecture, "lse_forward", "ieee"] = {
        32: Tile(64, 32, 32, 32, 4, 1, 4, 4),
        math.inf: Tile(64, 64, 32, 32, 8, 1, 2, 2),
    }
    TILES[_architecture, "grad_matmul", "ieee"] = {math.inf: Tile(32, 32, 32, 128, 8, 1, 2, 2)}
# The triangle keeps more sums in registers. It reads the copy of the rows made for the square: block_k is the same.
for _architecture in SHARED_BYTES:
    for _arithmetic in ("half", "tf32", "ieee"):
        TILES[_architecture, "lse_triangle", _arithmetic] = dict(TILES[_architecture, "lse_forward", _arithmetic])
TILES["sm_80", "lse_triangle", "half"][128] = Tile(64, 64, 128, 128, 4, 3, 2, 2)
TILES["sm_80", "lse_triangle", "tf32"][math.inf] = Tile(128, 64, 32, 32, 8, 2, 1, 1)
TILES["sm_86", "lse_triangle", "tf32"][math.inf] = Tile(128, 64, 32, 32, 8, 2, 1, 1)
TILES["sm_86", "lse_triangle", "half"][math.inf] = Tile(128, 64, 64, 64, 8, 2, 1, 1)
TILES["sm_90", "lse_triangle", "half"] = {
    64: Tile(128, 64, 64, 64, 8, 3, 2, 2),
    128: Tile(128, 64, 128, 128, 8, 3, 2, 2),
    256: Tile(128, 64, 256, 256, 8, 2, 1, 1),
    math.inf: Tile(128, 64, 64, 64, 8, 3, 1, 1),
}
TILES["sm_90", "lse_triangle", "ieee"] = {math.inf: Tile(64, 64, 32, 32, 8, 1, 2, 2)}

MAX_SPLITS = 16
"""Most programs that share the columns of a block of rows."""

# The interpreter runs programs one after another in NumPy: several small tiles reach every loop and every mask.
INTERPRETER_TILE = Tile(32, 16, 64, 64, 1, 1, 16, 16)


@cache
def chip(device: torch.device) -> Chip | None:
    """Architecture whose shared memory fits the device's, and its multiprocessors; None under the interpreter.

    Raises:
        ValueError: the device has less than 99 KB of shared memory per block.
    """
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = properties.shared_memory_per_block_optin
    if properties.major in (9, 10, 11) and shared_bytes >= SHARED_BYTES["sm_90"]:
        architecture = "sm_90"
    elif shared_bytes >= SHARED_BYTES["sm_80"]:
        architecture = "sm_80"
    elif shared_bytes >= SHARED_BYTES["sm_86"]:
        architecture = "sm_86"
    else:
        raise ValueError(
            f"impl='triton' needs 99 KB of shared memory per block, but {properties.name} has "
            f"{shared_bytes // 1024} KB; use impl='blockwise'."
        )
    return Chip(architecture, properties.multi_processor_count, properties.major in (10, 11))


def tile_for(kernel: str, architecture: str, dtype: torch.dtype, precision: str, width: int) -> Tile:
    """Tile of the table for D = `width`, with block_k and block_d no larger than D needs."""
    arithmetic = precision if dtype == torch.float32 else "half"
    rows = TILES[architecture, kernel, arithmetic]
    return _narrowed(next(tile for widest, tile in rows.items() if width <= widest), width)


def tile_of(kernel: str, x: Tensor, precision: str) -> Tile:
    """Tile for rows x (M, D) on their device; the same for D and for its pitch."""
    here, width = chip(x.device), x.shape[1]
    if here is None:
        return _narrowed(INTERPRETER_TILE, width)
    return tile_for(kernel, here.architecture, x.dtype, precision, width)


def choose_tile(kernel: str, x: Tensor, precision: str, n: int, columns: int) -> tuple[Tile, int]:
    """Tile for rows x (M, D) on their device, and its splits.

    `splits` programs share the columns of a block of the 2n rows. More splits fill the last wave of programs on the GPU
    better, but each adds partial sums in a slot of its own.
    """
    tile = tile_of(kernel, x, precision)
    programs = programs_at_once(tile, x.device, n)
    blocks = 2 * triton.cdiv(n, tile.block_m)
    if kernel == "grad_matmul":
        blocks *= triton.cdiv(x.shape[1], tile.block_d)
    # A split costs a prologue and a pass over its partial sums, about a hundredth of a wave.
    splits = min(
        range(1, min(MAX_SPLITS, triton.cdiv(columns, tile.block_n)) + 1),
        key=lambda count: triton.cdiv(blocks * count, programs) / count * (1 + 0.01 * count),
    )
    return tile, splits


def programs_at_once(tile: Tile, device: torch.device, n: int) -> int:
    """Number of programs that the device runs at once on 2n rows of this rank."""
    here = chip(device)
    return tile.programs_for(tile.is_even(n), online=False) * (1 if here is None else here.multiprocessors)


def _narrowed(tile: Tile, width: int) -> Tile:
    padded = max(16, triton.next_power_of_2(width))
    return tile._replace(block_k=min(tile.block_k, padded), block_d=min(tile.block_d, padded))


def row_block(width: int) -> tuple[int, int]:
    """Padded D and number of rows of a program of the kernels over rows: 4096 numbers, held in registers."""
    padded = triton.next_power_of_2(width)
    return padded, max(1, min(32, 4096 // padded))
