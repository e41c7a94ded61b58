"""What the Triton kernels compile to and the fastest they could then run, told without a GPU.

    python bench/loss_kernel.py --static          a table of all tiles, then the bounds at D = 128

The times are upper bounds on speed, not measurements: the larger of the time the tensor cores need for the products,
the special-function units for the exponentials and the memory for reading and writing each tensor once. A kernel that
overlaps nothing takes the sum of the first two, the column `serial_ms`.
"""

import math

import torch
import triton

from bench import loss_static as triton_static
from bench.harness import write_rows
from bench.loss_static import Case, Form
from loss.triton import tiles as triton_tiles

# NVIDIA's data sheets of A100 80GB SXM and H100 SXM: dense tensor-core FLOP/s, bytes/s, multiprocessors. Exponentials
# per clock and multiprocessor: CUDA C++ programming guide, arithmetic instructions, compute capability 8.0 and 9.0.
# The clock is that at which 1024 (A100) or 2048 (H100) bf16 multiply-adds per multiprocessor give the sheet's peak.
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


def static_rows(
    widths: tuple[int, ...] | None = (128,), forms: tuple[Form, ...] = (triton_static.PLAIN,)
) -> list[dict]:
    """One row per shipped tile: what it compiles to. `widths` None: every D of the table."""
    return [
        {
            "architecture": case.architecture,
            "kernel": case.kernel,
            "dtype": str(case.dtype).removeprefix("torch."),
            "precision": case.precision if case.dtype == torch.float32 else "",
            "d": case.width,
            "even": case.form.even,
            "online": case.form.online,
            "tile": "x".join(map(str, _tile(case)[:4])),
            "warps": _tile(case).warps,
            "stages": _tile(case).stages,
            **triton_static.compile_case(case)._asdict(),
        }
        for case in triton_static.shipped()
        if case.form in forms and (widths is None or case.width in widths)
    ]


def bound_rows(width: int = 128, dtype: torch.dtype = torch.bfloat16, precision: str = "tf32") -> list[dict]:
    """One row per GPU, pass and M: the least time in ms that products, exponentials and memory each take."""
    rows = []
    size = dtype.itemsize
    for gpu, peak in GPUS.items():
        for kernel in ("negatives", "products"):
            case = Case(peak["architecture"], kernel, dtype, precision, width)
            compiled = triton_static.compile_case(case)
            units = {"negatives": 1, "products": 1 + math.ceil(width / _tile(case).block_d)}[kernel]
            for m in ROWS:
                flops, exps = units * 2 * m * m * width, compiled.exps_per_pair * m * m
                # forward: x in, log-sums out; backward: x in, product out and in again, x in and its gradient out
                moved = m * width * (size if kernel == "negatives" else 3 * size + 8) + 4 * m
                gemm_ms = flops / peak["half" if size == 2 else precision] * 1e3
                exp_ms = exps / (peak["exps_per_s"]) * 1e3
                memory_ms = moved / peak["bytes_per_s"] * 1e3
                rows.append(
                    {
                        "gpu": gpu,
                        "pass": {"negatives": "forward", "products": "backward"}[kernel],
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
                        "programs": 2 * triton.cdiv(m // 2, _tile(case).block_m),
                        "multiprocessors": peak["multiprocessors"],
                    }
                )
    return rows


def _tile(case: Case) -> triton_tiles.Tile:
    return triton_tiles.tile_for(case.kernel, case.architecture, case.dtype, case.precision, case.width)


def report() -> None:
    """Print both tables and write bench/results/loss_static.csv and loss_bounds.csv."""
    compiled, bounds = static_rows(widths=None), bound_rows()
    for title, name, rows in (
        ("What every shipped tile compiles to", "loss_static", compiled),
        ("Upper bounds on speed, computed from data sheets: not measurements", "loss_bounds", bounds),
    ):
        print(f"\n{title}")
        _print_table(rows)
        print(f"written: {write_rows(name, rows)}")


def _print_table(rows: list[dict]) -> None:
    cells = [[_cell(value) for value in row.values()] for row in rows]
    header = list(rows[0])
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    for line in [header, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
