"""Static report on the Triton kernels: what every shipped tile compiles to, and bounds on its speed, without a GPU.

    python bench/loss_kernel.py --static          loss_static.csv, loss_launches.csv, loss_bounds.csv in bench/results/

Triton compiles for an architecture that is not present; registers, spills and shared memory are read from the binary by
`cuobjdump`, which is part of Triton, and tensor-core instructions from the PTX. Not possible in a process with
TRITON_INTERPRET=1. Every Triton of requirements-triton.lock compiles in a process of its own.

The bounds are computed, not measured: the maximum of the time of the products on the tensor cores, of the exponentials
on the special-function units, and of reading and writing each tensor once. A kernel without any overlap takes the sum
of the first two, `serial_ms`.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.harness import write_rows
from loss.triton.grad_matmul import grad_matmul_kernel
from loss.triton.lse_forward import lse_forward_kernel
from loss.triton.lse_triangle import lse_triangle_kernel, uses_wgmma
from loss.triton.rows import gradient_rows_kernel, log2_headroom, row_losses_kernel, scale_rows_kernel
from loss.triton.tiles import REGISTERS, SHARED_BYTES, TILES, Tile, row_block, tile_for

ROOT = Path(__file__).parents[1]
VERSIONS = re.findall(r"^triton==(\S+)$", (ROOT / "requirements-triton.lock").read_text(), re.MULTILINE)
KERNELS = {
    "lse_forward": lse_forward_kernel,
    "lse_triangle": lse_triangle_kernel,
    "grad_matmul": grad_matmul_kernel,
}
PASSES = {"lse_forward": "forward", "lse_triangle": "forward_triangle", "grad_matmul": "backward"}
THREADS = 2048  # per multiprocessor: CUDA C++ programming guide, technical specifications
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}

# NVIDIA's data sheets of A100 80GB SXM and H100 SXM: dense tensor-core FLOP/s, bytes/s, multiprocessors. Exponentials
# per clock and multiprocessor: CUDA C++ programming guide, arithmetic instructions, compute capability 8.0 and 9.0.
# The clock is the one at which 1024 (A100) or 2048 (H100) bfloat16 multiply-adds per multiprocessor reach the peak.
GPUS = {
    "A100 80GB SXM": {
        "architecture": "sm_80",
        "half": 312e12,
        "tf32": 156e12,
        "bytes_per_s": 2.039e12,
        "exps_per_s": 16 * 312e12 / (2 * 1024),
        "multiprocessors": 108,
    },
    "H100 SXM": {
        "architecture": "sm_90",
        "half": 989.4e12,
        "tf32": 494.7e12,
        "bytes_per_s": 3.35e12,
        "exps_per_s": 16 * 989.4e12 / (2 * 2048),
        "multiprocessors": 132,
    },
}
ROWS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


class Form(NamedTuple):
    """Constants of a launch besides the tile: rows fill all tiles, running maximum, temperature on the device."""

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
    """A kernel compiled for D = `width`."""

    architecture: str
    kernel: str
    dtype: torch.dtype
    precision: str
    width: int
    form: Form = PLAIN

    @property
    def tile(self) -> Tile:
        return tile_for(self.kernel, self.architecture, self.dtype, self.precision, self.width)


class Compiled(NamedTuple):
    """Resources and instruction counts of a compiled kernel.

    `stack_bytes` are spilled registers. `programs` fit a multiprocessor at once, given registers, memory and threads.
    `exps_per_pair` and `gemm_units` (of 2 D flops per pair) are counted in the code of one tile; gemm_units is None if
    that code loops over D or uses no tensor cores.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    programs: int
    tensor_core: str | None
    exps_per_pair: float
    gemm_units: float | None


def shipped(widths: tuple[int, ...] = ()) -> Iterator[Case]:
    """Every line of the table in every form, at its largest D (twice the previous for the last line) and `widths`."""
    for (architecture, kernel, arithmetic), rows in TILES.items():
        widest = [int(width) for width in rows if width < math.inf]
        for width in (*widest, 2 * widest[-1] if widest else 128, *widths):
            for dtype in (torch.bfloat16, torch.float16) if arithmetic == "half" else (torch.float32,):
                precision = "tf32" if arithmetic == "half" else arithmetic
                forms = FORMS[:2] if kernel == "lse_triangle" else FORMS  # never online
                yield from (Case(architecture, kernel, dtype, precision, width, form) for form in forms)


def compile_case(case: Case, target: int | None = None) -> Compiled:
    """Compile for the case's architecture or for compute capability `target`, for example 100 for 10.0."""
    tile = case.tile
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
        "WGMMA": uses_wgmma(case.architecture, case.dtype, case.precision),
    }
    capability = target or int(case.architecture.removeprefix("sm_"))
    options = {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers_for(case.form.even, case.form.online),
    }
    compiled = _compile(KERNELS[case.kernel], constants, case.dtype, capability, options)
    registers, stack_bytes = resources(compiled.asm["cubin"])
    shared_bytes = compiled.metadata.shared
    programs = fitting_programs(registers, shared_bytes, tile.warps, case.architecture)
    return Compiled(registers, stack_bytes, shared_bytes, programs, *_instructions(compiled.asm["ptx"], case))


def fitting_programs(registers: int, shared_bytes: int, warps: int, architecture: str) -> int:
    """Number of programs that fit a multiprocessor at once."""
    threads = 32 * warps
    limits = (
        REGISTERS // (-(-registers // 8) * 8 * threads),  # allocated in units of eight per thread
        (SHARED_BYTES[architecture] + 1024) // (shared_bytes + 1024),  # every block costs another 1 KB
        THREADS // threads,
    )
    return min(limits)


def row_kernel_resources(dtype: torch.dtype, width: int, capability: int, tau_is_pointer: bool) -> dict[str, tuple]:
    """Registers and bytes of stack of every kernel over rows."""
    pitch = max(16, triton.next_power_of_2(width))  # largest pitch of any tile
    padded, block_m = row_block(pitch)
    constants = {
        "D": width,
        "PITCH": pitch,
        "D_PADDED": padded,
        "BLOCK_M": block_m,
        "TAU_IS_POINTER": tau_is_pointer,
        "COPIED": pitch != width or dtype == torch.float16,
        "SCALED": dtype == torch.float16,
        "LOG2_HEADROOM": log2_headroom(dtype),
        "DECOUPLED": False,  # leaves instructions out
    }
    kernels = (scale_rows_kernel, row_losses_kernel, gradient_rows_kernel)
    return {
        kernel.__name__: resources(_compile(kernel, constants, dtype, capability, {}).asm["cubin"])
        for kernel in kernels
    }


def _compile(
    kernel: triton.JITFunction, constants: dict, dtype: torch.dtype, capability: int, options: dict
) -> triton.compiler.CompiledKernel:
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "temperature":
            signature[name] = "*fp32" if constants["TAU_IS_POINTER"] else "fp32"
        elif name == "sums_ptr":
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = TYPES[dtype] if name in ("x_ptr", "y_ptr", "dx_ptr") else "*fp32"
        else:
            signature[name] = "fp32" if name in ("headroom", "scale", "unit") else "i32"
        if "*" in signature[name] or (constants.get("EVEN") and name in ("n", "M")):  # as in a launch
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", capability, 32), options)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, where spilled registers are."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack_bytes, local_bytes = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return int(registers), int(stack_bytes) + int(local_bytes)


def _instructions(ptx: str, case: Case) -> tuple[str | None, float, float | None]:
    """`Compiled.tensor_core`, `exps_per_pair` and `gemm_units`."""
    # The code of a tile occurs twice, with and without pairs. Rescaling of the running sums is not per pair, and absent
    # from PLAIN.
    tile = case.tile
    pairs = 2 * tile.block_m * tile.block_n
    wgmma = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx)
    mma = re.findall(r"\bmma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx)
    flops = sum(2 * int(m) * int(n) * int(k) for m, n, k in wgmma) * tile.warps / 4  # one per group of four warps
    flops += sum(2 * int(m) * int(n) * int(k) for m, n, k in mma) * tile.warps
    names = {"wgmma": wgmma, "mma.sync": mma, "tcgen05.mma": "tcgen05.mma" in ptx}
    found = " + ".join(name for name, present in names.items() if present) or None
    counted = found in ("wgmma", "mma.sync") and tile.block_k >= tile.pitch(case.width)
    return (
        found,
        len(re.findall(r"ex2\.approx", ptx)) * 32 * tile.warps / pairs,
        flops / pairs / (2 * tile.pitch(case.width)) if counted else None,
    )


def environment_with(version: str) -> dict[str, str]:
    """Environment of a process that imports this version of Triton, which pip installs into .venv unless it is there.

    Raises:
        subprocess.CalledProcessError: pip could not install it; `stderr` says why.
    """
    folder = ROOT / ".venv" / f"triton-{version}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", unfinished]
            subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True, check=True)
            Path(unfinished).rename(folder)
            Path(unfinished).mkdir()  # for TemporaryDirectory to remove
    return os.environ | {"PYTHONPATH": str(folder)}


def static_rows() -> list[dict]:
    """One row per shipped tile, dtype and form, of float16 in one form only: what it compiles to."""
    return [
        {
            "triton": triton.__version__,
            "architecture": case.architecture,
            "kernel": case.kernel,
            "dtype": str(case.dtype).removeprefix("torch."),
            "precision": case.precision if case.dtype == torch.float32 else "",
            "d": case.width,
            "even": case.form.even,
            "online": case.form.online,
            "tile": "x".join(map(str, case.tile[:4])),
            "warps": case.tile.warps,
            "stages": case.tile.stages,
            "max_registers": case.tile.registers_for(case.form.even, case.form.online),
            **compile_case(case)._asdict(),
        }
        for case in shipped()
        if case.dtype != torch.float16 or case.form == PLAIN
    ]


def _rows_of(module: str, environment: dict[str, str]) -> list[dict]:
    run = subprocess.run([sys.executable, "-m", module], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


def bound_rows(width: int = 128, dtype: torch.dtype = torch.bfloat16, precision: str = "tf32") -> list[dict]:
    """One row per GPU, pass and M: lower bounds on the time of products, exponentials and memory accesses."""
    rows = []
    size = dtype.itemsize
    for gpu, peak in GPUS.items():
        for kernel in KERNELS:
            case = Case(peak["architecture"], kernel, dtype, precision, width)
            exps_per_pair = compile_case(case).exps_per_pair
            forward = kernel != "grad_matmul"
            units = 1 if forward else 1 + math.ceil(width / case.tile.block_d)
            for m in ROWS:
                strips = 2 * triton.cdiv(m // 2, case.tile.block_m)
                pairs = m * m * (strips + 1) / (2 * strips) if kernel == "lse_triangle" else m * m
                flops, exps = units * 2 * pairs * width, exps_per_pair * pairs
                # forward reads x and writes log-sums; backward reads x, writes and reads the product, reads x and
                # writes its gradient
                moved = m * width * (size if forward else 3 * size + 8) + 4 * m
                gemm_ms = flops / peak["half" if size == 2 else precision] * 1e3
                exp_ms = exps / peak["exps_per_s"] * 1e3
                memory_ms = moved / peak["bytes_per_s"] * 1e3
                rows.append(
                    {
                        "gpu": gpu,
                        "pass": PASSES[kernel],
                        "m": m,
                        "d": width,
                        "gemm_flops": flops,
                        "exps": exps,
                        "bytes_moved": moved,
                        "gemm_ms": gemm_ms,
                        "exp_ms": exp_ms,
                        "memory_ms": memory_ms,
                        "bound_ms": max(gemm_ms, exp_ms, memory_ms),
                        "serial_ms": max(gemm_ms + exp_ms, memory_ms),
                        "programs": strips,
                        "multiprocessors": peak["multiprocessors"],
                    }
                )
    return rows


def report() -> None:
    """Print the tables and write them to bench/results/."""
    static = [row for version in VERSIONS for row in _rows_of("bench.loss_static", environment_with(version))]
    launches = _rows_of("bench.loss_launches", os.environ | {"TRITON_INTERPRET": "1"})
    for title, name, rows in (
        ("What every shipped tile compiles to", "loss_static", static),
        ("Launches of one forward and backward pass", "loss_launches", launches),
        ("Bounds on speed, computed from data sheets, not measured", "loss_bounds", bound_rows()),
    ):
        table = Table(*rows[0], title=title, title_justify="left", box=None)
        for row in rows:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        console = Console(width=Console(width=1000).measure(table).maximum)  # one line per row, also in a pipe
        console.print(table)
        console.print(f"written: {write_rows(name, rows)}")


if __name__ == "__main__":
    print(json.dumps(static_rows()))
