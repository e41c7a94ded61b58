"""Throughput, memory and error of NT-Xent, forward and backward, next to its floor and to other implementations.

    python bench/loss_kernel.py                   full sweep; bench/results/loss_kernel.csv, docs/loss_kernel.png
    python bench/loss_kernel.py --rows 8192       this M only; replaces its rows in the CSV
    python bench/loss_kernel.py --quick           M = 1024 and 2048 only; writes no files
    python bench/loss_kernel.py --static          what the Triton kernels compile to, without a GPU
    make bench                                    installs the other implementations first

The floor of a shape is a time that no exact implementation on this device can beat by much: two GEMM units of 2 M M D
flop (half a unit forward and one and a half backward, because S is symmetric) at the rate of a large square matrix
product, and one exponential per pair and direction at the rate of `bench.rates`, both measured in the same run, in turn
with the candidates.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.harness import csv_name, environment, interleave, percentiles_ms, read_rows, show, write_rows
from bench.implementations import Implementation, implementations, projections
from bench.rates import Work, exponentials, matrix_product
from engine.environment import peak_resident_mb
from loss import nt_xent

TEMPERATURE = 0.1
SHAPES = [(M, 128) for M in (1024, 2048, 4096, 8192)] + [(4096, 64), (4096, 256), (4096, 512)]
LONG = [16384, 32768, 65536]
"""Rows M at which only implementations with linear memory are measured."""
CUBIC, CUBIC_LIMIT = "pytorch-metric-learning", 512
"""It materializes M x M (M - 2) similarities, 2 GB here. It is not timed in turn with the others, because it takes so
long that they would have a few calls each, with cold caches."""
console = Console()


def forward_backward(implementation: Implementation, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    implementation(z, TEMPERATURE).backward()
    return z.grad


def floor_works(dtype: torch.dtype, device: torch.device) -> dict[str, Work]:
    """Works whose rates determine the floor."""
    return {"floor: matrix product": matrix_product(dtype, device), "floor: exponentials": exponentials(device)}


def floor_ms(works: dict[str, Work], times: dict[str, list[float]], m: int, d: int) -> float:
    """Floor of M rows of dimension D in ms, from the seconds of every turn of `works`."""
    flop_s, exp_s = (work.amount / statistics.median_high(times[name]) for name, work in works.items())
    return 1000 * (2 * 2 * m * m * d / flop_s + m * m / exp_s)


def error_against_float64(implementation: Implementation, z: Tensor) -> float:
    """Maximum error of dL/dz against float64 autograd of the reference, relative to the maximum gradient."""
    truth = forward_backward(lambda x, t: nt_xent(x, t, impl="reference"), z.double())
    return ((forward_backward(implementation, z).double() - truth).abs().max() / truth.abs().max()).item()


def peak_extra_mb(name: str, m: int, d: int, dtype: str, device: torch.device) -> float:
    """Peak memory of one forward and backward pass minus the memory in use before it, in MB."""
    if device.type == "cuda":
        z, implementation = projections(m, d, getattr(torch, dtype), device), implementations(device)[name]
        forward_backward(implementation, z)  # compiles
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward_backward(implementation, z)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    # a separate process, because the peak of a process never decreases
    command = [sys.executable, __file__, "--memory-of", name, str(m), str(d), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_memory(name: str, m: int, d: int, dtype: str) -> None:
    """Child process of `peak_extra_mb`: memory of the second call; the first one compiles and starts threads."""
    device = torch.device("cpu")
    implementation = implementations(device)[name]
    z = projections(m, d, getattr(torch, dtype), device)
    forward_backward(implementation, z)  # compiles
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed would hide what the next call needs
    if (peak := Path("/proc/self/clear_refs")).exists():  # on Linux
        peak.write_text("5")  # forgets the peak, to which the projections' own memory belongs
    before = peak_resident_mb()
    forward_backward(implementation, z)
    print(peak_resident_mb() - before)


def measure(m: int, d: int, dtype: str, device: torch.device, seconds: float, memory: bool) -> list[dict]:
    """One row per implementation that can run this shape."""
    torch.compiler.reset()  # after eight shapes of a function, torch silently runs it uncompiled
    z = projections(m, d, getattr(torch, dtype), device)
    chosen = {
        name: implementation
        for name, implementation in implementations(device).items()
        if (m not in LONG or name in ("triton", "blockwise")) and (m <= CUBIC_LIMIT or name != CUBIC)
    }
    calls = {name: lambda f=implementation: forward_backward(f, z) for name, implementation in chosen.items()}
    works = floor_works(z.dtype, device)
    cubic = {CUBIC: calls.pop(CUBIC)} if CUBIC in calls else {}
    timed = calls | {name: work.call for name, work in works.items()}
    times = interleave(timed, seconds, device, shuffled=True)
    times |= interleave(cubic, 0, device) if cubic else {}
    floor = floor_ms(works, times, m, d)
    rows = []
    for name, implementation in chosen.items():
        timing = percentiles_ms(times[name])
        median_s = timing["median_ms"] / 1000
        rows.append(
            environment(device)
            | {"implementation": name, "M": m, "D": d, "dtype": dtype, "temperature": TEMPERATURE}
            | timing
            | {
                "pairs_per_s": round(m * m / median_s),
                "tflop_per_s": round(3 * 2 * m * m * d / median_s / 1e12, 4),
                "floor_ms": round(floor, 6),
                "ratio_to_floor": round(timing["median_ms"] / floor, 3),
                "peak_extra_mb": round(peak_extra_mb(name, m, d, dtype, device), 1) if memory else "",
                "gradient_error": f"{error_against_float64(implementation, z):.2e}" if m <= 4096 else "",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument("--quick", action="store_true", help="M = 1024 and 2048 at D = 128 only; writes no files")
    parser.add_argument("--static", action="store_true", help="report what the Triton kernels compile to")
    parser.add_argument("--seconds", type=float, default=6.0, help="approximate time per shape in s (default: 6)")
    sweep = [(256, 128), (512, 128), *SHAPES, *((m, 128) for m in LONG)]
    rows_help = "measure this M only and replace its rows in the CSV"
    selection.add_argument("--rows", type=int, choices=sorted({m for m, _ in sweep}), help=rows_help)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        name, m, d, dtype = arguments.memory_of
        return print_memory(name, int(m), int(d), dtype)
    if arguments.static:
        if not find_spec("triton"):
            parser.error("--static needs the triton package, which is available for Linux only")
        from bench.loss_static import report

        return report()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ("bfloat16", "float32") if device.type == "cuda" else ("float32",)
    shapes = [(1024, 128), (2048, 128)] if arguments.quick else sweep
    rows, table = [], csv_name("loss_kernel", device)
    if arguments.rows:
        shapes = [(m, d) for m, d in shapes if m == arguments.rows]
        rows = [row for row in read_rows(table) if int(row["M"]) != arguments.rows]
    for dtype in dtypes:
        for m, d in shapes:
            console.print(f"M = {m}, D = {d}, {dtype} ...")
            rows += measure(m, d, dtype, device, arguments.seconds, memory=not arguments.quick)
    rows.sort(key=lambda row: (row["dtype"], int(row["D"]) != 128, int(row["M"]), int(row["D"])))
    columns = ("implementation", "M", "D", "dtype", "median_ms", "ratio_to_floor", "tflop_per_s", "peak_extra_mb")
    show(rows, (*columns, "gradient_error"))
    if not arguments.quick:
        from bench.plot import plot_loss_kernel

        console.print(f"written: {write_rows(table, rows)} and {plot_loss_kernel(table)}")
    if missing := [name for name in ("lightly", "pytorch_metric_learning") if not find_spec(name)]:
        console.print(f"Not installed, so not measured: {' and '.join(missing)}; `make bench` installs both.")
    if device.type == "cpu":
        console.print("No GPU found: the Triton kernels were not timed; use --static to see what they compile to.")


if __name__ == "__main__":
    main()
