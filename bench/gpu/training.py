"""Short real training runs on textures: host waits, kill and resume. The scripts' own functions run, not copies."""

import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.gpu.checks import Case, Outcome, Setup, Skipped, largest
from bench.harness import read_metrics

SHARDS = ("cv2", "numba", "rich")
"""What training needs that neither torch nor timm nor accelerate installs."""
BATCH = 8
WARM, STEPS = 3, 10


@contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Context in which the scripts print into the returned buffer."""
    with redirect_stdout(io.StringIO()) as printed:
        yield printed


@cache
def texture_shards(folder: Path) -> Path:
    """Shards of textures for `WARM` + `STEPS` + 1 steps; one more step writes the metrics row."""
    from bench.train_step import Setting, make_images, texture

    make_images(folder, Setting([], BATCH, texture, 0, 0), BATCH * (WARM + STEPS + 1))
    return folder


def configuration(setup: Setup, stage: str, name: str, **changes: Any):
    """One epoch of a stage on `texture_shards`, with the metrics row at its end and a network that fits a CPU."""
    import presets

    preset = {"train": presets.textures, "finetune": presets.fine_tune_textures, "distill": presets.distill_textures}
    config = preset[stage]()
    config = replace(
        config,
        data=str(texture_shards(setup.scratch / "textures")),
        out=str(setup.scratch / name),
        epochs=1,
        batch_size=BATCH,
        log_every=10**6,
        report=False,
        trackers=("none",),
        loader=replace(config.loader, backend="opencv"),
        encoder=replace(config.encoder, width=0.125),
    )
    return replace(config, **changes)


class Supply:
    """Instruments of a run whose steps all train on its first batch, and that calls `before_step` with their number."""

    def __init__(self, before_step: Callable[[int], None]):
        self.before_step = before_step

    def mark(self, part: str) -> None:
        pass

    def batches(self, loader: Iterable) -> Iterator:
        batch = next(iter(loader))
        for step in range(len(loader)):
            self.before_step(step)
            yield batch


def host_waits(setup: Setup) -> Iterator[Case]:
    """Ten steps of every stage in which the host does not wait for the GPU."""
    stages = {
        "pretraining": ("train", {}),
        "pretraining in slices": ("train", {"micro_batch": BATCH // 2}),
        "fine-tuning": ("finetune", {}),
        "distillation": ("distill", {"teacher": str(setup.scratch / "waits fine-tuning")}),
    }
    if setup.device.type == "cuda":
        stages["pretraining with CUDA graphs"] = "train", {"cuda_graph": True}
    for name, (stage, changes) in stages.items():
        yield Case(name, partial(steps_without_waits, setup, stage, f"waits {name}", changes))


def steps_without_waits(setup: Setup, stage: str, name: str, changes: dict) -> Iterator[Outcome]:
    import distill
    import finetune
    import train
    from pipeline.loader.subsets import LabelsConfig

    run = {"train": train.pretrain, "finetune": finetune.finetune, "distill": distill.distill}[stage]
    if stage == "finetune":
        changes = changes | {"labels": LabelsConfig(1.0)}
    modes = []

    def before_step(step: int) -> None:
        if setup.device.type == "cuda" and step in (WARM, WARM + STEPS):
            torch.cuda.set_sync_debug_mode("error" if step == WARM else "default")
        modes.append(WARM <= step < WARM + STEPS)

    try:
        with quiet():
            run(configuration(setup, stage, name, **changes), Supply(before_step))
    finally:
        if setup.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    yield Outcome("steps not observed", STEPS - sum(modes), 0)
    yield Outcome("loss is not finite", float(read_metrics(setup.scratch / name)[-1]["loss"] is None), 0)


def kill_and_resume(setup: Setup) -> Iterator[Case]:
    """A run killed between two checkpoints and resumed trains like an uninterrupted one."""
    yield Case("pretraining", partial(compare_resumed, setup))


def compare_resumed(setup: Setup) -> Iterator[Outcome]:
    import train
    from engine.optim import OptimConfig

    # LARS, because AdamW's first steps turn rounding of small gradients into steps of full length
    changes = {"log_every": 1, "precision": "fp32", "optim": OptimConfig("lars", scaling="none")}
    whole = configuration(setup, "train", "whole", **changes)
    whole = replace(whole, checkpoint=replace(whole.checkpoint, every_steps=4))
    killed = replace(whole, out=str(setup.scratch / "killed"))
    child = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(killed, 10))
    child.start()
    with quiet():
        train.pretrain(whole)
    child.join(120)
    yield Outcome("exit code other than SIGKILL's", abs((child.exitcode or 0) + signal.SIGKILL), 0)
    with quiet() as printed:
        train.pretrain(killed)
    resumed = "resumes from" in " ".join(printed.getvalue().split())
    yield Outcome("did not resume", float(not resumed), 0)
    yield from compare_runs(killed, whole)


def compare_runs(run: Any, reference: Any) -> Iterator[Outcome]:
    """Steps, losses and weights of two runs in float32."""
    rows, expected = ([r for r in read_metrics(Path(c.out)) if "loss" in r] for c in (run, reference))
    yield Outcome("rows of other steps", float([r["step"] for r in rows] != [r["step"] for r in expected]), 0)
    # on a GPU a run is not repeatable bit for bit, but after few steps in float32 its rounding is still small
    pairs = zip(rows, expected, strict=True)
    yield Outcome("relative difference of a loss", largest(abs(r["loss"] / e["loss"] - 1) for r, e in pairs), 1e-3)
    weights, truth = (load_file(Path(config.out) / "encoder.safetensors") for config in (run, reference))
    error = largest((weights[n] - truth[n]).norm() / truth[n].norm() for n in truth if truth[n].ndim > 1)
    yield Outcome("relative difference of the weights", error, 1e-2)


def cuda_graphs(setup: Setup) -> Iterator[Case]:
    """Replayed passes, eager or compiled, train like eager ones, also if the size of the views changes."""
    yield Case("graphs", partial(compare_graphs, setup, "graphs", 1, {}))
    yield Case("graphs of compiled passes", partial(compare_graphs, setup, "graphs compiled", 1, {"compile": True}))
    yield Case("graphs of two sizes", partial(compare_graphs, setup, "graphs of two sizes", 2, {}))


def compare_graphs(setup: Setup, name: str, sizes: int, modes: dict) -> Iterator[Outcome | Skipped]:
    import train
    from engine.optim import OptimConfig

    if setup.device.type != "cuda":
        yield Skipped("CUDA graphs need a GPU")
        return
    changes = {"log_every": 1, "precision": "fp32", "optim": OptimConfig("lars", scaling="none")}
    eager = configuration(setup, "train", f"{name} eager", epochs=sizes, **changes)
    if sizes > 1:
        eager = replace(eager, views=replace(eager.views, size_schedule=("16:1",)))
    graphs = replace(eager, out=str(setup.scratch / name), cuda_graph=True, **modes)
    for config in (eager, graphs):
        with quiet():
            train.pretrain(config)
    yield from compare_runs(graphs, eager)


def train_until_killed(config: Any, steps: int) -> None:
    """Child process: train and end by SIGKILL before step `steps` (from 0)."""
    import train

    class Killer(Supply):
        def batches(self, loader: Iterable) -> Iterator:
            for step, batch in enumerate(loader):
                if step == steps:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

    with quiet():
        train.pretrain(config, Killer(lambda step: None))
