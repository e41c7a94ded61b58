"""Static report on the fused augmentation: what its kernels compile to, and bounds on their speed, without a GPU.

    python -m bench.views_static          views_static.csv and views_bounds.csv in bench/results/

Every Triton of requirements-triton.lock compiles in a process of its own; see bench/loss_static.py for how resources
are read. The bounds are computed, not measured: the larger of the time to move each byte once and of the time of the
products on the tensor cores.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.harness import write_rows
from bench.loss_static import GPUS, ROOT, VERSIONS, environment_with, fitting_programs, resources
from pipeline.augment.config import AugmentConfig
from pipeline.augment.gpu import CHUNK
from pipeline.augment.params import AugmentParams, draw_params
from pipeline.augment.triton.kernels import crop_kernel, finish_kernel, whole_views_kernel
from pipeline.augment.triton.record import VIEW
from pipeline.augment.triton.render import BLOCK, TILE, constants
from pipeline.images.pixel_format import RGB8

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
POINTERS = {"records_ptr": "*i32", "levels_ptr": "*u16", "gray_ptr": "*fp32"}
IMAGES = {32: (32, 32), 224: (400, 500)}
"""Size of a view in pixels -> (height, width) of its image."""
VIEWS, VIEWS_PER_IMAGE = 1024, 2


class Case(NamedTuple):
    """A kernel compiled for views of `size` pixels."""

    architecture: str
    kernel: triton.JITFunction
    size: int
    jitter: str
    dtype: torch.dtype


class Compiled(NamedTuple):
    """Resources of a compiled kernel; `stack_bytes` are spilled registers, `programs` fit a multiprocessor at once."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    programs: int


def cases(architectures: tuple[str, ...] = ARCHITECTURES) -> Iterator[Case]:
    """Every kernel in every form, of the sizes in `IMAGES`; the crop kernel does not depend on the dtype of views."""
    for architecture in architectures:
        for jitter in ("exact", "affine"):
            for dtype in TYPES:
                yield Case(architecture, whole_views_kernel, 32, jitter, dtype)
                yield Case(architecture, finish_kernel, 224, jitter, dtype)
            yield Case(architecture, crop_kernel, 224, jitter, torch.bfloat16)


def compile_case(case: Case) -> Compiled:
    """Compile a case and read its resources."""
    capability = int(case.architecture.removeprefix("sm_"))
    values = constants(case.kernel, AugmentConfig(size=case.size, jitter=case.jitter), capability // 10)
    options = {name: values.pop(name) for name in ("num_warps", "maxnreg")}
    signature, attributes = {}, {}
    for position, name in enumerate(case.kernel.arg_names):
        if name in values:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, TYPES[case.dtype])
            attributes[position,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name in ("images", "view_stride") else "fp32"
    source = ASTSource(case.kernel, signature, values, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    registers, stack_bytes = resources(compiled.asm["cubin"])
    like = "sm_80" if case.architecture == "sm_80" else "sm_90"  # as much shared memory
    shared_bytes = compiled.metadata.shared
    programs = fitting_programs(registers, shared_bytes, options["num_warps"], like)
    return Compiled(registers, stack_bytes, shared_bytes, programs)


def static_rows() -> list[dict]:
    """One row per case: what it compiles to."""
    return [
        {
            "triton": triton.__version__,
            "architecture": case.architecture,
            "kernel": case.kernel.__name__.removesuffix("_kernel"),
            "size": case.size,
            "jitter": case.jitter,
            "dtype": str(case.dtype).removeprefix("torch."),
            **compile_case(case)._asdict(),
        }
        for case in cases()
    ]


def bound_rows() -> list[dict]:
    """One row per GPU, size, jitter and dtype: lower bounds on the time of 1,024 views, next to DALI's operators."""
    rows = []
    for gpu, peak in GPUS.items():
        for size, (height, width) in IMAGES.items():
            for jitter in ("exact", "affine"):
                config = AugmentConfig(size=size, jitter=jitter).for_images(RGB8, {})
                images = np.arange(VIEWS // VIEWS_PER_IMAGE)
                params = draw_params(config, 0, 0, images, np.full(len(images), height), np.full(len(images), width))
                flops = tensor_core_flops(params, config) / VIEWS
                for dtype in TYPES:
                    moved = bytes_moved(params, config, dtype) / VIEWS
                    memory_us = VIEWS * moved / peak["bytes_per_s"] * 1e6
                    product_us = VIEWS * flops / peak["half"] * 1e6
                    rows.append(
                        {
                            "gpu": gpu,
                            "size": size,
                            "image": f"{height}x{width}",
                            "jitter": jitter,
                            "dtype": str(dtype).removeprefix("torch."),
                            "bytes_per_view": round(moved),
                            "tensor_core_flops_per_view": round(flops),
                            "launches": (1 if size <= TILE else 2) * math.ceil(len(images) / CHUNK),
                            "memory_us": round(memory_us, 2),
                            "product_us": round(product_us, 2),
                            "bound_us": round(max(memory_us, product_us), 2),
                            "dali_operators": dali_operators(config),
                        }
                    )
    return rows


def bytes_moved(params: AugmentParams, config: AugmentConfig, dtype: torch.dtype) -> int:
    """Bytes read and written for all views: crops, records and views once, intermediate levels twice."""
    pixels = 3 * params.flip.size * config.size**2
    levels = 0 if config.size <= TILE else 2 * 2 * pixels
    crops = 3 * int(params.crop[..., 2:].prod(-1).sum())
    return crops + VIEW.itemsize * params.flip.size + levels + pixels * dtype.itemsize


def tensor_core_flops(params: AugmentParams, config: AugmentConfig) -> int:
    """Flops of the products of all views, zero weights and pixels beyond the edges of a block included."""
    size, tiles = config.size, math.ceil(config.size / TILE)
    total = 0
    for height, width, sigma in zip(*params.crop[..., 2:].reshape(-1, 2).T, params.sigma.ravel(), strict=True):
        down, across = blocks_of_lines(height, size, TILE), blocks_of_lines(width, size, BLOCK)
        products = down.sum() * across.sum() * BLOCK + tiles * down.sum() * TILE  # of TILE x TILE, to be added up
        if sigma and tiles == 1:
            products += 2 * TILE
        elif sigma:
            radius = min(math.ceil(4 * sigma), config.blur_window // 2)
            first = np.arange(tiles) * TILE
            margin = np.minimum(first + TILE + radius, size) - np.maximum(first - radius, 0)
            chunks = np.ceil(margin / BLOCK).sum()
            products += chunks * chunks * BLOCK * BLOCK / TILE + tiles * chunks * BLOCK
        total += 3 * 2 * int(products) * TILE**2
    return total


def blocks_of_lines(length: int, size: int, block: int) -> np.ndarray:
    """Number of blocks that each tile of a view reads of a line of `length` pixels: (tiles,); see `source_range`."""
    scale = length / size
    reach = 2 * max(scale, 1)
    first = np.arange(0, size, TILE)
    begin = np.maximum(np.floor((first + 0.5) * scale - reach), 0)
    end = np.minimum(np.ceil((np.minimum(first + TILE, size) - 0.5) * scale + reach), length)
    return np.ceil((end - begin) / block)


def dali_operators(config: AugmentConfig) -> int:
    """Number of operators in the graph of the DALI backend for two views on a GPU."""
    from pipeline.augment.dali import view_graph

    graph = view_graph(config, True, VIEWS_PER_IMAGE, batch_size=4, num_threads=1, device_id=None)
    graph.serialize()  # builds the graph, without a GPU
    return len(graph._ops)


def report() -> None:
    """Print the tables and write them to bench/results/."""
    command = [sys.executable, "-m", "bench.views_static", "--rows"]
    static = []
    for version in VERSIONS:
        run = subprocess.run(command, cwd=ROOT, env=environment_with(version), stdout=subprocess.PIPE, check=True)
        static += json.loads(run.stdout)
    for title, name, rows in (
        ("What the kernels of the fused augmentation compile to", "views_static", static),
        ("Bounds on the speed of 1,024 views, computed from data sheets, not measured", "views_bounds", bound_rows()),
    ):
        table = Table(*rows[0], title=title, title_justify="left", box=None)
        for row in rows:
            table.add_row(*map(str, row.values()))
        console = Console(width=Console(width=1000).measure(table).maximum)  # one line per row, also in a pipe
        console.print(table)
        console.print(f"written: {write_rows(name, rows)}")


if __name__ == "__main__":
    if "--rows" in sys.argv:  # in a process with another version of Triton
        print(json.dumps(static_rows()))
    else:
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
        report()
