"""Part "step": speed, parts, memory and bottleneck of `train.pretrain`, and a profiler trace of a few steps."""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.checks import Case, Check, Measurement, Setup, Skipped, imports
from bench.gpu.training import SHARDS, quiet
from bench.harness import percentiles_ms
from engine.environment import peak_resident_mb

PRECISION = "bf16"


class Network(NamedTuple):
    """A network, its batch and its images."""

    preset: str
    batch: int
    image: str
    """Function of bench.train_step that renders an image."""


NETWORKS = {
    "ResNet-50, 224 px": Network("imagenet", 256, "one_of_many_photographs"),
    "ResNet-18, 32 px": Network("cifar10", 512, "texture"),
}
SMALL_NETWORKS = {"ResNet-10 x 1/8, 32 px": Network("textures", 8, "texture")}
WARM, STEPS = 6, 12
TRACED_STEPS = 3


def networks(setup: Setup) -> dict[str, Network]:
    return SMALL_NETWORKS if setup.small else NETWORKS


def counts(setup: Setup) -> tuple[int, int]:
    """Warm-up steps and measured steps."""
    return (1, TRACED_STEPS) if setup.small else (WARM, STEPS)


def configuration(setup: Setup, network: Network, out: str, backend: str, resident: bool = False, **modes: bool):
    """Epochs that are longer than the measured steps, so that no checkpoint falls into them.

    One of them, or three with resident images: the first one decodes, the second is measured while the third is
    prepared.
    """
    import presets

    config = presets.PRETRAIN[network.preset]()
    return replace(
        config,
        data=str(shards(setup.scratch / network.image, network, sum(counts(setup)))),
        out=str(setup.scratch / out),
        epochs=3 if resident else 1,
        batch_size=network.batch,
        log_every=10**6,
        report=False,
        trackers=("none",),
        precision=PRECISION,
        **modes,
        loader=replace(config.loader, backend=backend, resident="on" if resident else "off"),
        encoder=replace(config.encoder, width=0.125) if setup.small else config.encoder,
    )


@cache
def shards(folder: Path, network: Network, steps: int) -> Path:
    """Shards for an epoch of `epoch_steps(steps)` batches."""
    from bench import train_step

    setting = train_step.Setting([], network.batch, getattr(train_step, network.image), 0, 0)
    train_step.make_images(folder, setting, network.batch * epoch_steps(steps))
    return folder


def epoch_steps(steps: int) -> int:
    """Batches of an epoch: `steps`, and those that the loader prepares meanwhile."""
    from bench.train_step import AHEAD

    return steps + AHEAD


def step_speed(setup: Setup) -> Iterator[Case]:
    for source in ("views in memory", "opencv"):
        for name in networks(setup):
            yield Case(f"{name}, {source}", partial(time_training, setup, name, source))
    yield Case("profiler trace", partial(trace, setup))
    for name in networks(setup):
        yield Case(f"{name}, CUDA graph", partial(time_training, setup, name, "views in memory", cuda_graph=True))
    if not setup.small:  # compilation takes minutes
        compiled = partial(time_training, setup, source="views in memory", compile=True)
        for name in networks(setup):
            yield Case(f"{name}, compiled", partial(compiled, name=name))
            yield Case(f"{name}, compiled, CUDA graph", partial(compiled, name=name, cuda_graph=True))
    backends = ["opencv"] + ["kornia"] * imports("kornia")
    backends += ["triton"] * (not setup.small)  # the interpreter takes minutes
    for name in networks(setup):
        sources = backends[1:]
        if networks(setup)[name].image == "texture":
            sources = sources + [f"{backend}, resident" for backend in backends]
        for source in sources:
            yield Case(f"{name}, {source}", partial(time_training, setup, name, source))


def time_training(
    setup: Setup, name: str, source: str, compile: bool = False, cuda_graph: bool = False
) -> Iterator[Measurement | Skipped]:
    """Time steps of `train.pretrain`; the parts of a step are marked as in bench/trainers.py.

    Args:
        setup, name: which network of `networks(setup)`, and where.
        source: "views in memory"; or a backend, with ", resident" for images that an earlier epoch has decoded.
        compile, cuda_graph: --compile, --cuda-graph.
    """
    if cuda_graph and setup.device.type != "cuda":
        yield Skipped("CUDA graphs need a GPU")
        return
    import train
    from bench.trainers import PARTS, LoopMarks, Marks, supplied
    from engine.metrics import verdict

    network, (warm, steps) = networks(setup)[name], counts(setup)
    backend, _, resident = ("opencv" if source == "views in memory" else source).partition(", ")
    modes = {"compile": compile, "cuda_graph": cuda_graph}
    out = " ".join(map(str, (name, source, *modes.values())))
    config = configuration(setup, network, out, backend, bool(resident), **modes)
    repeated, marks = "same batch" if source == "views in memory" else "images", Marks(setup.device)
    epoch = epoch_steps(warm + steps) if resident else 0
    with quiet():
        supply = partial(supplied, source=repeated, warm=warm, steps=max(steps, epoch), device=setup.device)
        train.pretrain(config, LoopMarks(marks, supply))
    measured = marks.steps_ms()[epoch + warm :][:steps]
    on_gpu = setup.device.type == "cuda"
    peak_mb = torch.cuda.max_memory_allocated(setup.device) / 1e6 if on_gpu else peak_resident_mb()
    free_memory(compile)
    ms = [sum(step.values()) for step in measured]
    parts = {part: sum(step[part] for step in measured) / len(measured) for part in PARTS}
    mean_ms = sum(ms) / len(ms)
    yield Measurement(
        "step",
        {"network": name, "batch": network.batch, "source": source, "precision": PRECISION}
        | {"compiled": compile, "cuda_graph": cuda_graph}
        | {"images_per_s": round(1000 * network.batch / mean_ms, 1), "step_ms": round(mean_ms, 3)}
        | percentiles_ms([value / 1000 for value in ms])
        | {f"{part}_ms": round(value, 3) for part, value in parts.items()}
        | {"peak_mb": round(peak_mb), "wait_share": round(parts["wait"] / mean_ms, 4)}
        | {"verdict": verdict(parts["wait"] / mean_ms, 0.0, "--compile" if not compile else "faster hardware")},
    )


def free_memory(compiled: bool) -> None:
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Tracer:
    """Instruments of a run on its first batch whose steps after the warm-up are profiled."""

    def __init__(self, setup: Setup):
        self.warm = counts(setup)[0]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (setup.device.type == "cuda")
        self.profile = profile(activities=activities)

    def mark(self, part: str) -> None:
        pass

    def batches(self, loader: Iterable) -> Iterator:
        batch = next(iter(loader))
        for step in range(self.warm + TRACED_STEPS):
            if step == self.warm:
                if torch.cuda.is_available():  # the host may be steps ahead
                    torch.cuda.synchronize()
                self.profile.start()
            yield batch
        self.profile.stop()


def trace(setup: Setup) -> Iterator[Measurement]:
    """Write gpu_trace.json.gz of three steps of the first network, and yield what takes most of their time."""
    import train

    name, network = next(iter(networks(setup).items()))
    tracer = Tracer(setup)
    with quiet():
        train.pretrain(configuration(setup, network, "trace", "opencv"), tracer)
    free_memory(False)
    setup.out.mkdir(parents=True, exist_ok=True)
    tracer.profile.export_chrome_trace(str(setup.out / "gpu_trace.json.gz"))
    on_gpu = setup.device.type == "cuda"

    def own_us(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [e for e in tracer.profile.key_averages() if e.device_type == kind and not e.is_user_annotation]
    events.sort(key=own_us, reverse=True)
    total = sum(map(own_us, events))
    for event in events[:15]:
        yield Measurement(
            "kernels",
            {"network": name, "kernel": event.key[:100], "calls_per_step": round(event.count / TRACED_STEPS, 1)}
            | {"ms_per_step": round(own_us(event) / 1000 / TRACED_STEPS, 4), "share": round(own_us(event) / total, 4)},
        )


CHECKS = [Check(step_speed, 540, SHARDS)]
