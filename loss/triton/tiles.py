"""Which tile each kernel takes on which GPU, and how many programs share a row's columns.

Chosen by compiling every line of the table ahead of time, so that none spills registers, each fits the shared memory
and, where registers allow, two programs fit a multiprocessor: one computes exponentials while the other multiplies.
`python -m bench.static_report` prints what each compiles to.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """Rows x columns of S that a program holds at a time.

    `block_k` columns of x enter the similarities at a time and `block_d` the gradient's product: at D of at most
    block_k, x is read once for both; above block_d, S is computed once more for every further block_d columns.
    `programs` fit a multiprocessor at once.
    """

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    warps: int
    stages: int
    programs: int

    def pitch(self, width: int) -> int:
        """D = `width` in whole blocks of the similarities: a power of two, or above block_k a multiple of it."""
        return triton.cdiv(width, self.block_k) * self.block_k


class Chip(NamedTuple):
    tiles: str
    multiprocessors: int


# What a block may ask for: CUDA C++ programming guide, technical specifications per compute capability.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}

# The widest D and its tile, by architecture, kernel and arithmetic. bf16 and fp16 are "half". sm_86 stands for all
# with 99 KB of shared memory: sm_86, sm_89 and sm_120.
TILES: dict[tuple[str, str, str], dict[float, Tile]] = {
    ("sm_80", "negatives", "half"): {
        64: Tile(128, 64, 64, 64, 8, 3, 2),
        128: Tile(128, 64, 128, 128, 4, 3, 2),
        256: Tile(128, 64, 256, 256, 8, 3, 1),
        math.inf: Tile(128, 64, 64, 64, 8, 3, 1),
    },
    ("sm_80", "products", "half"): {
        64: Tile(128, 64, 64, 64, 8, 3, 2),
        128: Tile(64, 64, 128, 128, 4, 3, 2),
        256: Tile(64, 32, 256, 256, 4, 3, 2),
        math.inf: Tile(32, 64, 64, 512, 8, 2, 1),
    },
    ("sm_80", "negatives", "tf32"): {
        64: Tile(64, 64, 64, 64, 4, 3, 3),
        128: Tile(64, 64, 128, 128, 4, 2, 2),
        math.inf: Tile(128, 64, 32, 32, 8, 3, 1),
    },
    ("sm_80", "products", "tf32"): {
        64: Tile(64, 32, 64, 64, 4, 2, 2),
        128: Tile(64, 32, 128, 128, 4, 2, 2),
        math.inf: Tile(64, 32, 32, 256, 8, 2, 1),
    },
    ("sm_86", "negatives", "half"): {
        64: Tile(128, 64, 64, 64, 8, 3, 2),
        128: Tile(64, 64, 128, 128, 4, 3, 2),
        256: Tile(64, 64, 256, 256, 4, 2, 1),
        math.inf: Tile(128, 64, 64, 64, 8, 3, 1),
    },
    ("sm_86", "products", "half"): {
        64: Tile(128, 64, 64, 64, 8, 3, 1),
        128: Tile(64, 64, 128, 128, 4, 3, 1),
        256: Tile(64, 32, 256, 256, 4, 3, 1),
        math.inf: Tile(32, 64, 64, 512, 8, 2, 1),
    },
    ("sm_86", "negatives", "tf32"): {
        64: Tile(64, 64, 64, 64, 4, 3, 2),
        128: Tile(64, 64, 128, 128, 4, 2, 1),
        math.inf: Tile(128, 64, 32, 32, 8, 3, 1),
    },
    ("sm_86", "products", "tf32"): {
        64: Tile(64, 32, 64, 64, 4, 2, 3),
        128: Tile(64, 32, 128, 128, 4, 2, 1),
        math.inf: Tile(64, 32, 32, 256, 8, 2, 1),
    },
    ("sm_90", "negatives", "half"): {
        64: Tile(128, 128, 64, 64, 8, 3, 2),
        128: Tile(128, 128, 128, 128, 8, 2, 2),
        256: Tile(128, 128, 256, 256, 8, 2, 1),
        math.inf: Tile(128, 128, 64, 64, 8, 3, 1),
    },
    ("sm_90", "products", "half"): {
        64: Tile(64, 64, 64, 64, 4, 3, 3),
        128: Tile(128, 64, 128, 128, 8, 3, 1),
        256: Tile(128, 32, 256, 256, 8, 2, 1),
        math.inf: Tile(32, 64, 64, 512, 8, 2, 1),
    },
    ("sm_90", "negatives", "tf32"): {
        64: Tile(128, 64, 64, 64, 8, 3, 2),
        128: Tile(64, 64, 128, 128, 4, 2, 2),
        math.inf: Tile(128, 64, 32, 32, 8, 3, 1),
    },
    ("sm_90", "products", "tf32"): {
        64: Tile(64, 32, 64, 64, 4, 2, 4),
        128: Tile(64, 32, 128, 128, 4, 2, 2),
        math.inf: Tile(64, 32, 32, 256, 8, 2, 1),
    },
}
for _architecture in SHARED_BYTES:  # no tensor cores: what matters is that the operands stay in registers
    TILES[_architecture, "negatives", "ieee"] = {
        32: Tile(64, 32, 32, 32, 4, 1, 4),
        math.inf: Tile(64, 64, 32, 32, 4, 1, 4),
    }
    TILES[_architecture, "products", "ieee"] = {math.inf: Tile(32, 32, 32, 128, 4, 1, 3)}
TILES["sm_86", "negatives", "ieee"] = {
    32: Tile(64, 32, 32, 32, 4, 1, 4),
    64: Tile(64, 64, 32, 32, 8, 1, 2),
    math.inf: Tile(64, 64, 32, 32, 4, 1, 4),
}
TILES["sm_90", "products", "ieee"] = {
    32: Tile(32, 16, 32, 32, 4, 1, 6),
    math.inf: Tile(32, 32, 32, 128, 4, 1, 3),
}

# The interpreter's programs run one after another in numpy: several small tiles reach every loop and every mask.
INTERPRETER_TILE = Tile(32, 16, 64, 64, 1, 1, 16)


@torch.compiler.assume_constant_result
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why impl="triton" cannot take such a z, in one sentence; None if it can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"impl='triton' takes float32, bfloat16 or float16; z is {dtype}: choose impl='auto' or 'blockwise'"
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return (
        f"impl='triton' is not available for z on {device}, but on NVIDIA GPUs of compute capability 8.0 or later and "
        "on the CPU if TRITON_INTERPRET=1 was set before Python started: choose impl='auto' or 'blockwise'"
    )


@cache
def chip(device: torch.device) -> Chip | None:
    """The lines of the table whose shared memory the device has, and its multiprocessors; None: interpreted."""
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
            f"impl='triton' needs 99 KB of shared memory per block; {properties.name} has {shared_bytes // 1024} KB: "
            "choose impl='blockwise'"
        )
    return Chip(architecture, properties.multi_processor_count)


def tile_for(kernel: str, architecture: str, dtype: torch.dtype, precision: str, width: int) -> Tile:
    """The table's tile for D = `width`, with block_k and block_d no wider than it takes."""
    arithmetic = precision if dtype == torch.float32 else "half"
    rows = TILES[architecture, kernel, arithmetic]
    return _narrowed(next(tile for widest, tile in rows.items() if width <= widest), width)


def tile_on(kernel: str, device: torch.device, dtype: torch.dtype, precision: str, width: int) -> Tile:
    """The tile for this device, the same for D = `width` and for D's pitch."""
    here = chip(device)
    return _narrowed(INTERPRETER_TILE, width) if here is None else tile_for(kernel, here.tiles, dtype, precision, width)


def choose(
    kernel: str, device: torch.device, dtype: torch.dtype, precision: str, n: int, m: int, width: int
) -> tuple[Tile, int]:
    """The tile for this device and its splits: how many programs share the m columns of a block of the 2n rows.

    The more, the better the last turn of programs fills the GPU; every split adds to its own slot of partial sums.
    """
    here = chip(device)
    tile = tile_on(kernel, device, dtype, precision, width)
    programs = tile.programs * (1 if here is None else here.multiprocessors)
    blocks = 2 * triton.cdiv(n, tile.block_m)
    if kernel == "products":
        blocks *= triton.cdiv(width, tile.block_d)
    tiles = triton.cdiv(m, tile.block_n)
    # A split costs a prologue and a pass over its partial sums, about a hundredth of a turn.
    splits = min(
        range(1, min(16, tiles) + 1),
        key=lambda count: triton.cdiv(blocks * count, programs) / count * (1 + 0.01 * count),
    )
    return tile, splits


def _narrowed(tile: Tile, width: int) -> Tile:
    padded = max(16, triton.next_power_of_2(width))
    return tile._replace(block_k=min(tile.block_k, padded), block_d=min(tile.block_d, padded))


def row_block(width: int) -> tuple[int, int]:
    """Padded D and rows of a program of the kernels that go over rows: 4096 numbers, held in registers."""
    padded = triton.next_power_of_2(width)
    return padded, max(1, min(32, 4096 // padded))
