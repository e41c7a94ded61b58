"""What the shipped tiles compile to, told without a GPU: registers, spills, shared memory, tensor-core instructions.

Triton compiles for an architecture it does not find here; the report is read off the binary by `cuobjdump`, which comes
with Triton, and off the PTX. Not in a process with TRITON_INTERPRET=1.
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loss.triton.kernels import grad_matmul_kernel, lse_forward_kernel
from loss.triton.rows import gradient_kernel, row_losses_kernel, scale_rows_kernel
from loss.triton.tiles import SHARED_BYTES, TILES, Tile, row_block, tile_for

KERNELS = {"negatives": lse_forward_kernel, "products": grad_matmul_kernel}
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor: CUDA C++ programming guide, technical specifications
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Form(NamedTuple):
    """What a launch fixes besides the tile: rows that fill all tiles, the running maximum, the temperature's place."""

    even: bool
    online: bool
    tau_is_pointer: bool


PLAIN = Form(even=True, online=False, tau_is_pointer=False)
FORMS = (
    PLAIN,
    Form(even=False, online=False, tau_is_pointer=False),
    Form(even=False, online=True, tau_is_pointer=True),
)


class Case(NamedTuple):
    architecture: str
    kernel: str
    dtype: torch.dtype
    precision: str
    width: int
    form: Form = PLAIN


class Compiled(NamedTuple):
    """`stack_bytes` holds spilled registers. `programs` fit a multiprocessor at once, by registers, memory and threads.

    `exps_per_pair` and `gemm_units` (of 2 D flops per pair) are counted in the code of a tile; gemm_units is None where
    it goes over D in a loop, or without tensor cores.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    programs: int
    tensor_core: str | None
    exps_per_pair: float
    gemm_units: float | None


def shipped(widths: tuple[int, ...] = ()) -> Iterator[Case]:
    """Every line of the table with the widest D it serves (twice the line above, for the last), in every form.

    Then every kernel and arithmetic of the table at D in `widths`.
    """
    for (architecture, kernel, arithmetic), rows in TILES.items():
        widest = [int(width) for width in rows if width < math.inf]
        for width in (*widest, 2 * widest[-1] if widest else 128, *widths):
            for dtype in (torch.bfloat16, torch.float16) if arithmetic == "half" else (torch.float32,):
                precision = "tf32" if arithmetic == "half" else arithmetic
                yield from (Case(architecture, kernel, dtype, precision, width, form) for form in FORMS)


def compile_case(case: Case, target: int | None = None) -> Compiled:
    """Compiles for the case's architecture, or for that of compute capability `target`: 100 for 10.0."""
    tile = tile_for(case.kernel, case.architecture, case.dtype, case.precision, case.width)
    constants = {
        "D": tile.pitch(case.width),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_D": tile.block_d,
        "EVEN": case.form.even,
        "ONLINE": case.form.online,
        "TAU_IS_POINTER": case.form.tau_is_pointer,
        "PRECISION": case.precision,
    }
    capability = target or int(case.architecture.removeprefix("sm_"))
    compiled = _compile(KERNELS[case.kernel], constants, case.dtype, capability, tile.warps, tile.stages)
    registers, stack_bytes = _resources(compiled.asm["cubin"])
    return _read(compiled.asm["ptx"], tile, case, registers, stack_bytes, compiled.metadata.shared)


def row_kernel_resources(dtype: torch.dtype, width: int, capability: int, tau_is_pointer: bool) -> dict[str, tuple]:
    """Registers and bytes of stack of the kernels that go over rows."""
    pitch = max(16, triton.next_power_of_2(width))  # the most any tile asks for
    padded, block_m = row_block(pitch)
    constants = {
        "D": width,
        "PITCH": pitch,
        "D_PADDED": padded,
        "BLOCK_M": block_m,
        "TAU_IS_POINTER": tau_is_pointer,
        "COPIED": pitch != width or dtype == torch.float16,
        "SCALED": dtype == torch.float16,
    }
    kernels = (scale_rows_kernel, row_losses_kernel, gradient_kernel)
    return {
        kernel.__name__: _resources(_compile(kernel, constants, dtype, capability, warps=4, stages=3).asm["cubin"])
        for kernel in kernels
    }


def _compile(
    kernel: triton.JITFunction, constants: dict, dtype: torch.dtype, capability: int, warps: int, stages: int
) -> triton.compiler.CompiledKernel:
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "temperature":
            signature[name] = "*fp32" if constants["TAU_IS_POINTER"] else "fp32"
        elif name.endswith("_ptr"):
            signature[name] = TYPES[dtype] if name in ("x_ptr", "y_ptr", "dx_ptr") else "*fp32"
        else:
            signature[name] = "fp32" if name == "headroom" else "i32"
        if "*" in signature[name] or (constants.get("EVEN") and name in ("n", "M")):  # as a launch finds them
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages})


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack_bytes, local_bytes = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return int(registers), int(stack_bytes) + int(local_bytes)


def _read(ptx: str, tile: Tile, case: Case, registers: int, stack_bytes: int, shared_bytes: int) -> Compiled:
    # The loop stands there twice, with and without pairs; the online sums' rescaling is not per pair, nor in PLAIN.
    pairs = 2 * tile.block_m * tile.block_n
    threads = 32 * tile.warps
    wgmma = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx)
    mma = re.findall(r"\bmma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx)
    flops = sum(2 * int(m) * int(n) * int(k) for m, n, k in wgmma) * tile.warps / 4  # one per group of four warps
    flops += sum(2 * int(m) * int(n) * int(k) for m, n, k in mma) * tile.warps
    names = {"wgmma": wgmma, "mma.sync": mma, "tcgen05.mma": "tcgen05.mma" in ptx}
    found = " + ".join(name for name, present in names.items() if present) or None
    counted = found in ("wgmma", "mma.sync") and tile.block_k >= tile.pitch(case.width)
    limits = (
        REGISTERS // (-(-registers // 8) * 8 * threads),  # given out in eights per thread
        (SHARED_BYTES[case.architecture] + 1024) // (shared_bytes + 1024),  # each block costs 1 KB more
        THREADS // threads,
    )
    return Compiled(
        registers,
        stack_bytes,
        shared_bytes,
        min(limits),
        found,
        len(re.findall(r"ex2\.approx", ptx)) * threads / pairs,
        flops / pairs / (2 * tile.pitch(case.width)) if counted else None,
    )
