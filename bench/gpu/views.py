"""Part "dali": views of DALI, Kornia and Triton on the device, where installed: accuracy, rate, memory, overlap."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from bench.gpu.checks import Case, Check, Measurement, Outcome, Setup, imports
from bench.gpu.files import LEVELS
from bench.gpu.step_speed import networks, time_training
from bench.gpu.training import SHARDS
from bench.harness import interleave, percentiles_ms, replay_of
from common import available_cores

MODULES = {"dali": "nvidia.dali", "kornia": "kornia", "triton": "triton"}
REPEATED = 0.01
"""Largest mean difference of two runs of a backend, in levels."""
CPU = torch.device("cpu")


def installed() -> list[str]:
    """Backends on the device that can be used here."""
    return [name for name, module in MODULES.items() if imports(module)]


def photographs(count: int, small: bool) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Encoded images, heights and widths."""
    from bench.train_step import one_of_many_photographs, texture

    image = texture if small else one_of_many_photographs
    encoded = [image(number) for number in range(count)]
    if small:
        return encoded, np.full(count, 40), np.full(count, 40)
    upright = np.array([number % 100 % 3 == 0 for number in range(count)])
    return encoded, np.where(upright, 500, 400), np.where(upright, 400, 500)


def view_accuracy(setup: Setup) -> Iterator[Case]:
    """Views differ from OpenCV's by rounding, and depend neither on the run nor on the rest of the batch."""
    for name in installed():
        for jitter in ("exact", "affine"):
            yield Case(f"{name}, {jitter}", partial(compare_views, setup, name, jitter))


def compare_views(setup: Setup, name: str, jitter: str) -> Iterator[Outcome]:
    from pipeline.augment.backend import create_backend
    from pipeline.augment.config import AugmentConfig
    from pipeline.augment.params import AugmentParams, draw_params
    from pipeline.images.pixel_format import RGB8

    count = 6 if setup.small else 32
    config = AugmentConfig(size=32 if setup.small else 224, jitter=jitter).for_images(RGB8, {})
    encoded, height, width = photographs(count, setup.small)
    params = draw_params(config, 0, 0, np.arange(count), height, width)
    part = AugmentParams(**{field: array[:, 1:5] for field, array in vars(params).items()})
    std = torch.tensor(config.std)[:, None, None]
    pair = (("opencv", CPU), (name, setup.device))
    backends = [create_backend(which, config, device, count, 2, 4) for which, device in pair]
    try:
        expected, views = (backend(encoded, params).float().cpu() for backend in backends)
        again = backends[1](encoded, params).float().cpu()
        some = backends[1](encoded[1:5], part).float().cpu().unflatten(0, (2, -1))
    finally:
        for backend in backends:
            backend.close()
    for what, found, true, limit in (
        ("difference to OpenCV", views, expected, LEVELS),
        ("difference between runs", again, views, REPEATED),
        ("difference in a smaller batch", some, views.unflatten(0, (2, -1))[:, 1:5], REPEATED),
    ):
        yield Outcome(f"{what}, mean levels", (255 * std * (found - true)).abs().mean().item(), limit)


def view_speed(setup: Setup) -> Iterator[Case]:
    sizes = [(32, 6)] if setup.small else [(224, 256), (32, 512)]
    for size, count in sizes:
        for name in (*installed(), "opencv"):
            for jitter in ("exact", "affine"):
                yield Case(f"{name}, {jitter}, {size} px", partial(time_views, setup, name, jitter, size, count))


def time_views(setup: Setup, name: str, jitter: str, size: int, count: int) -> Iterator[Measurement]:
    """Rate of a backend alone, and the memory that it takes on the device, which torch does not count for DALI."""
    from pipeline.augment.backend import create_backend
    from pipeline.augment.config import AugmentConfig
    from pipeline.augment.params import draw_params

    config, threads = AugmentConfig(size=size, jitter=jitter), available_cores()
    encoded, height, width = photographs(count, size == 32)
    params = draw_params(config, 0, 0, np.arange(count), height, width)
    free_mb = free_device_mb(setup.device)
    backend = create_backend(name, config, setup.device, count, 2, threads)
    try:
        times = interleave({"": lambda: backend(encoded, params)}, 0 if setup.small else 5, setup.device)[""]
        used_mb = free_mb - free_device_mb(setup.device, release=False)
    finally:
        backend.close()
    timing = percentiles_ms(times)
    yield Measurement(
        "views",
        {"backend": name, "jitter": jitter, "size": size, "images": count, "host_threads": threads}
        | {"mean_kb": round(sum(map(len, encoded)) / count / 1000, 1)}
        | {"images_per_s": round(1000 * count / timing["median_ms"], 1)}
        | timing
        | {"device_mb": round(used_mb) if setup.device.type == "cuda" else ""},
    )


def fused_speed(setup: Setup) -> Iterator[Case]:
    """Kernels of the fused augmentation on decoded images, next to Kornia's functions and the memory's bandwidth.

    The kernels of small views take less time than the host needs to write their records, which it does before, and to
    launch them, so they are replayed as a CUDA graph.
    """
    for size in (32,) if setup.small else (224, 32):
        for jitter in ("exact", "affine"):
            for dtype in (torch.bfloat16, torch.float32):
                yield Case(f"{jitter}, {size} px, {dtype}", partial(time_fused, setup, size, jitter, dtype))


def time_fused(setup: Setup, size: int, jitter: str, dtype: torch.dtype) -> Iterator[Measurement]:
    from bench.views_static import bytes_moved
    from pipeline.augment.config import AugmentConfig
    from pipeline.augment.gpu import CHUNK, copy_to
    from pipeline.augment.params import draw_params
    from pipeline.augment.triton.record import view_records
    from pipeline.augment.triton.render import render_records
    from pipeline.images.pixel_format import RGB8

    count = 2 if setup.small else CHUNK
    config = AugmentConfig(size=size, jitter=jitter).for_images(RGB8, {})
    height, width = (32, 32) if size == 32 else (400, 500)
    params = draw_params(config, 0, 0, np.arange(count), np.full(count, height), np.full(count, width))
    images = [torch.randint(256, (3, height, width), dtype=torch.uint8, device=setup.device) for _ in range(count)]
    out = torch.empty((2, count, size, size, 3), dtype=dtype, device=setup.device).permute(0, 1, 4, 2, 3)
    memory = torch.empty(2 if setup.small else 2**28, dtype=torch.float32, device=setup.device)
    records = copy_to(setup.device, view_records(images, params, config))
    functions = {
        "triton": replay_of(lambda: partial(render_records, records, count, config, out), setup.device),
        "copy": partial(torch.neg, memory, out=memory),  # reads and writes every byte once
    }
    if imports("kornia"):
        from pipeline.augment.kornia import augment

        functions["kornia"] = lambda: out.copy_(augment(images, params, config).unflatten(0, (2, -1)))
    times = interleave(functions, 0 if setup.small else 4, setup.device)
    copy_s = float(np.median(times.pop("copy")))
    moved = bytes_moved(params, config, dtype)
    bound_ms = 1000 * moved * copy_s / (2 * memory.nbytes)
    for name, seconds in times.items():
        timing = percentiles_ms(seconds)
        yield Measurement(
            "fused",
            {"backend": name, "jitter": jitter, "size": size, "dtype": str(dtype).removeprefix("torch.")}
            | {"views": 2 * count, "views_per_s": round(2000 * count / timing["median_ms"], 1)}
            | timing
            | {"gb_per_s": round(moved / timing["median_ms"] / 1e6, 2), "bound_ms": round(bound_ms, 4)}
            | {"ratio_to_bound": round(timing["median_ms"] / bound_ms, 2)},
        )


def free_device_mb(device: torch.device, release: bool = True) -> float:
    """Free memory of the GPU in MB; 0 for a CPU.

    Args:
        release: whether torch's unused blocks count as free, which a backend's working memory is after a batch.
    """
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    if release:
        torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] / 1e6


def dali_overlap(setup: Setup) -> Iterator[Case]:
    """The training step with views by DALI; rows of part "step" have the same step with views in memory."""
    for name in networks(setup):
        yield Case(f"{name}, dali", partial(time_training, setup, name, "dali"))


CHECKS = [
    Check(view_accuracy, 90, SHARDS),
    Check(view_speed, 200, SHARDS),
    Check(fused_speed, 60, (*SHARDS, "triton")),
    Check(dali_overlap, 240, (*SHARDS, "nvidia.dali")),
]
