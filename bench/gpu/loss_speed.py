"""Part "loss": time of both passes next to the roofline of the device, and a sweep of tiles.

The roofline of a pass is the largest of three times: its products at the rate of a large square one, its exponentials
at the rate of the special-function units, and its memory accesses at the rate of a copy. The rates are measured in the
same run, in turn with the passes.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu.checks import Case, Check, Measurement, Outcome, Setup
from bench.harness import interleave, percentiles_ms, replay_of
from bench.implementations import dense, projections
from bench.rates import copy, exponentials, matmul_precision, matrix_product
from loss import nt_xent

TEMPERATURE = 0.1
SQUARE_TEMPERATURE = 0.07
"""Below the range of the triangle: the forward pass computes all pairs, and nothing else differs."""
SHAPES = [
    (8192, 128, "bf16"),
    (1024, 128, "bf16"),
    (65536, 128, "bf16"),
    (2048, 128, "bf16"),
    (4096, 128, "bf16"),
    (16384, 128, "bf16"),
    (32768, 128, "bf16"),
    (8192, 64, "bf16"),
    (8192, 256, "bf16"),
    (8192, 512, "bf16"),
    (8192, 128, "tf32"),
    (8192, 128, "fp16"),
    (8192, 128, "ieee"),
    (8190, 128, "bf16"),
    (65536, 64, "bf16"),
    (65536, 256, "bf16"),
    (65536, 512, "bf16"),
    (65536, 128, "tf32"),
]
"""(M, D, arithmetic), the important ones first."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
LARGEST_DENSE = 16384
"""Largest M at which the dense form is timed, whose memory grows with its square."""
UNITS = {"forward": 1, "backward": 2}
"""Matrix products of all pairs in each pass."""


def passes(z: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], object]]:
    """Functions that run the forward pass, and the backward pass of a kept graph."""
    z = z.detach().requires_grad_()
    kept = loss(z)
    return {"forward": lambda: loss(z), "backward": lambda: torch.autograd.grad(kept, z, retain_graph=True)}


def loss_speed(setup: Setup) -> Iterator[Case]:
    for m, d, name in [(32, 32, "ieee")] if setup.small else SHAPES:
        yield Case(f"M {m}, D {d}, {name}", partial(time_passes, setup, m, d, name))


def graph_speed(setup: Setup) -> Iterator[Case]:
    """The kernels alone, where the host takes longer to launch them; replayed as CUDA graphs."""
    shapes = [] if setup.device.type == "cpu" else SHAPES[:2] if setup.small else SHAPES
    for m, d, name in shapes:
        if m <= LARGEST_DENSE:
            yield Case(f"M {m}, D {d}, {name}, graph", partial(time_passes, setup, m, d, name, graphs=True))


def time_passes(setup: Setup, m: int, d: int, name: str, graphs: bool = False) -> Iterator[Measurement]:
    dtype, device = DTYPES[name], setup.device
    z = projections(m, d, dtype, device)
    precision = "tf32" if name == "tf32" else "ieee"
    fused, square = fused_loss(precision), fused_loss(precision, SQUARE_TEMPERATURE)
    if graphs:
        functions = {
            ("triton_graph", which): replay_of(lambda which=which: passes(z, fused)[which], device) for which in UNITS
        }
    else:
        functions = {("triton", which): function for which, function in passes(z, fused).items()}
        functions["triton_square", "forward"] = passes(z, square)["forward"]
    if m <= LARGEST_DENSE and not graphs:
        functions |= {("dense", which): f for which, f in passes(z, lambda z: dense(z, TEMPERATURE)).items()}
    works = {"product": matrix_product(dtype, device), "exps": exponentials(device), "bytes": copy(device)}
    with matmul_precision(precision):  # of the product that bounds the loss, and of the dense form
        every = functions | {what: work.call for what, work in works.items()}
        times = interleave(every, 0 if setup.small else 1, device)
    rates = {what: work.amount / statistics.median(times[what]) for what, work in works.items()}
    peaks = {"triton": peak_mb(z, fused, device), "triton_square": peak_mb(z, square, device)}
    for (implementation, which), _ in functions.items():
        timing = percentiles_ms(times[implementation, which])
        triangular = implementation in ("triton", "triton_graph") and which == "forward"
        triangle = triangular and on_triangle(z, precision)
        pairs = m * m / 2 if triangle else m * m
        flop = UNITS[which] * 2 * pairs * d
        # forward: reads x; backward: reads x twice, writes and reads the product in float32, writes the gradient
        moved = m * d * (dtype.itemsize if which == "forward" else 3 * dtype.itemsize + 8)
        bound_ms = 1000 * max(flop / rates["product"], pairs / rates["exps"], moved / rates["bytes"])
        yield Measurement(
            "loss",
            {"implementation": implementation, "pass": which, "M": m, "D": d, "arithmetic": name}
            | {"temperature": SQUARE_TEMPERATURE if implementation == "triton_square" else TEMPERATURE}
            | {"triangle": triangle}
            | timing
            | {
                "tflop_per_s": round(flop / timing["median_ms"] / 1e9, 2),
                "roofline_ms": round(bound_ms, 5),
                "ratio_to_roofline": round(timing["median_ms"] / bound_ms, 2),
                "peak_extra_mb": peaks.get(implementation, ""),
                "product_tflop_per_s": round(rates["product"] / 1e12, 2),
                "exps_per_s": f"{rates['exps']:.3g}",
                "copy_gb_per_s": round(rates["bytes"] / 1e9),
            },
        )


def fused_loss(precision: str, temperature: float = TEMPERATURE) -> Callable[[Tensor], Tensor]:
    return lambda z: nt_xent(z, temperature, impl="triton", precision=precision)


def on_triangle(z: Tensor, precision: str) -> bool:
    """Whether the forward pass at TEMPERATURE computes half of the pairs."""
    from loss.triton.lse_triangle import triangle_places

    return triangle_places(z, torch.tensor(TEMPERATURE), z.shape[0] // 2, precision) is not None


def peak_mb(z: Tensor, loss: Callable[[Tensor], Tensor], device: torch.device) -> float | str:
    """Peak memory of both passes in MB, with the gradient and without z; "" on a CPU."""
    if device.type != "cuda":
        return ""
    z = z.detach().requires_grad_()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss(z).backward()
    return round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 1)


BLOCKS = [(128, 128, 8), (128, 64, 4), (64, 64, 4), (128, 64, 8), (64, 128, 4), (128, 128, 4), (64, 32, 4)]
"""(rows, columns, warps)."""
SWEPT = {
    "lse_triangle": ("forward", TEMPERATURE),
    "lse_forward": ("forward", SQUARE_TEMPERATURE),
    "grad_matmul": ("backward", TEMPERATURE),
}
"""Kernel: the pass that launches it and the temperature at which it does."""


def tile_sweep(setup: Setup) -> Iterator[Case]:
    """Times of other tiles than the table's; programs per multiprocessor set the splits and the registers of a thread.

    Every tile must give the table's loss and gradient. The table's own tile is timed right after each.
    """
    from loss.triton.tiles import chip, tile_of

    here = chip(setup.device)
    square_only = here is not None and here.tensor_memory
    # at M = 8192, the host would take longer to launch a pass than the GPU to run it
    m, d, name = (32, 32, "fp16") if setup.small else (65536, 128, "bf16")
    z = projections(m, d, DTYPES[name], setup.device)
    for stages, programs in ((2, 2),) if setup.small else product((2, 3), (2, 1, 3)):
        for block_m, block_n, warps in ((16, 16, 1),) if setup.small else BLOCKS:
            for kernel in SWEPT:
                if kernel == "lse_triangle" and (square_only or block_m % block_n):
                    continue
                own = tile_of(kernel, z, "ieee")
                tile = own._replace(block_m=block_m, block_n=block_n, warps=warps, stages=stages, programs=programs)
                shown = f"{block_m}x{block_n}, {warps} warps, {stages} stages, {programs} programs"
                yield Case(f"{kernel} {shown}", partial(time_tile, setup, kernel, tile, z, name))


def time_tile(setup: Setup, kernel: str, tile, z: Tensor, name: str) -> Iterator[Outcome | Measurement]:
    from triton.runtime.errors import OutOfResources, PTXASError

    (which, temperature), (m, d) = SWEPT[kernel], z.shape
    loss = fused_loss("ieee", temperature)
    of_table = passes(z, loss)[which]
    expected = result(of_table).double()
    row = {"kernel": kernel, "M": m, "D": d, "arithmetic": name, **tile._asdict()}
    row["maxnreg"] = tile.constants(m // 2, d, "ieee", online=False)["maxnreg"]
    try:
        with replaced_tile(setup, kernel, tile):
            function = passes(z, loss)[which]
            found = result(function).double()
            resources = compiled_resources(kernel, setup.device)
            seconds = interleave({"": function}, 0, setup.device)[""]
    except (OutOfResources, PTXASError) as error:
        yield Measurement("tiles", row | {"note": f"does not fit: {str(error).splitlines()[0][:80]}"})
        return
    table_s = statistics.median(interleave({"": of_table}, 0, setup.device)[""])
    ratio = round(statistics.median(seconds) / table_s, 3)
    row |= {**resources, **percentiles_ms(seconds), "ratio_to_table": ratio, "note": ""}
    yield Measurement("tiles", row)
    difference = ((found - expected).norm() / expected.norm()).item()
    yield Outcome("relative difference to the table's result", difference, 1e-2 if which == "backward" else 1e-4)


def result(function: Callable[[], Tensor | tuple[Tensor, ...]]) -> Tensor:
    """Loss of a forward pass, or the gradient of a backward pass."""
    found = function()
    return found if isinstance(found, Tensor) else found[0]


@contextmanager
def replaced_tile(setup: Setup, kernel: str, tile) -> Iterator[None]:
    """Context in which the table holds `tile` for every D of a kernel in 16-bit arithmetic."""
    from loss.triton import tiles

    if setup.device.type == "cpu":
        with patch.object(tiles, "INTERPRETER_TILE", tile):
            yield
        return
    compiled_kernels(kernel, setup.device).clear()  # whatever is in it afterwards has this tile
    key = (tiles.chip(setup.device).architecture, kernel, "half")
    with patch.dict(tiles.TILES, {key: {float("inf"): tile}}):
        yield


def compiled_kernels(kernel: str, device: torch.device) -> dict:
    """Triton's cache of a kernel in this process: key -> compiled kernel."""
    from loss.triton.grad_matmul import grad_matmul_kernel
    from loss.triton.lse_forward import lse_forward_kernel
    from loss.triton.lse_triangle import lse_triangle_kernel

    kernels = {
        "lse_forward": lse_forward_kernel,
        "lse_triangle": lse_triangle_kernel,
        "grad_matmul": grad_matmul_kernel,
    }
    return kernels[kernel].device_caches[device.index][0]


def compiled_resources(kernel: str, device: torch.device) -> dict[str, int]:
    """Registers and spills of the tile in use; nothing in the interpreter."""
    if device.type == "cpu":
        return {}
    (compiled,) = compiled_kernels(kernel, device).values()
    return {"registers": compiled.n_regs, "spills": compiled.n_spills}


CHECKS = [
    Check(loss_speed, 150, ("triton",)),
    Check(graph_speed, 90, ("triton",)),
    Check(tile_sweep, 300, ("triton",)),
]
