"""What every kind of run needs around its loop: processes, loaders, checkpoints, the run folder and the last words."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer

from common import UserError
from config import Common, check_same_run
from engine import checkpoint, run_lock
from engine.metrics import MetricsFile, RunningMeans
from engine.nonfinite import NonFiniteGuard
from engine.run_folder import run_folder, start_run
from engine.schedule import peak_learning_rate, warmup_cosine
from model import synchronize_batchnorm
from pipeline.augment.backend import choose_backend
from pipeline.convert.textures import ensure_textures
from pipeline.loader.loader import Batch, ViewLoader
from pipeline.shards.cache import ShardCache
from pipeline.shards.dataset import ShardSet, open_splits

TEXTURES = "data/textures"
console = Console()


@dataclass(frozen=True)
class Run:
    """Where a run takes place."""

    accelerator: Accelerator
    cores: int
    """Of this process."""
    bf16: bool
    out: Path
    resume_from: Path | None
    """The checkpoint to go on from."""

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.bf16)


@dataclass(frozen=True)
class Task:
    """What is trained, and all that the loop has to know of it."""

    module: nn.Module
    loader: ViewLoader
    optimizers: list[Optimizer]
    learning_rate: Callable[[int], float]
    """step -> rate of the first optimizer."""
    forward_backward: Callable[[nn.Module, Batch], tuple[Tensor, ...]]
    """(module as it is prepared for several processes, batch) -> figures (), the loss first."""
    figures: tuple[str, ...]
    """Their names."""
    collapse_loss: float
    """The loss of a network that tells nothing apart."""
    validate: Callable[[], dict[str, float]] | None
    """Scores in the course of the run; None for none."""
    validate_every: int
    """Epochs; 0 for never."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Checksums of what else the result depends on."""


@dataclass
class State:
    """How far a run has come, beside weights and optimizers."""

    step: int
    means: RunningMeans
    """Of the metrics row that has not been written yet."""
    guard: NonFiniteGuard
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    """The final table as far as it is known."""


def begin(config: Common, name: str) -> Run:
    """Processes, threads, seed and run folder."""
    accelerator = Accelerator(
        mixed_precision="no",  # the loop opens autocast itself, around the forward pass alone
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.gradient_accumulation_steps != 1:  # from the environment; it would divide every gradient
        raise UserError(
            "Gradient accumulation would lose negatives and is not supported; unset "
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS and use --micro-batch."
        )
    device = accelerator.device
    cores = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cpu":
        torch.set_num_threads(cores)  # the launcher leaves one thread to each process
        if config.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
            raise UserError("--compile needs a C++ compiler on a CPU: install g++ or leave it out.")
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    bf16 = config.precision == "bf16" or (config.precision == "auto" and computes_in_bf16(device))
    set_seed(config.seed)
    return Run(accelerator, cores, bf16, *chosen_folder(accelerator, config, name))


def chosen_folder(accelerator: Accelerator, config: Common, name: str) -> tuple[Path, Path | None]:
    """Run folder and checkpoint, chosen by the main process for all: clocks and views of a network folder differ."""
    chosen: list = [None]
    if accelerator.is_main_process:
        default = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        is_named = config.out or config.resume not in ("auto", "none")
        for number in range(1, 2 if is_named else 100):  # jobs of a sweep may start in the same second
            try:
                chosen = [run_folder(config.out, config.resume, default if number == 1 else f"{default}-{number}")]
                break
            except (UserError, OSError) as error:
                chosen = [error]
    chosen = broadcast_object_list(chosen)
    if isinstance(chosen[0], Exception):
        raise chosen[0]
    return chosen[0]


def loading_options(run: Run, config: Common) -> dict:
    """What loaders for training and for evaluation have in common."""
    device = run.accelerator.device
    return {
        "device": device,
        "backend": choose_backend(config.loading.backend, device),
        "workers": config.loading.workers or run.cores,
        "max_bad": config.loading.max_bad,
        "bad_samples": run.out / "bad_samples.jsonl",
        "cache": ShardCache(limit_bytes=round(config.loading.cache_gb * 1e9)),
    }


def open_data(run: Run, config: Common) -> tuple[Common, ShardSet, ShardSet | None, dict]:
    """(configuration, train split, test split if there is one, what all loaders have in common).

    The built-in textures are rendered if they are wanted and not there; for them the batch is made to divide by the
    processes, since the demonstration must run on any number of them.
    """
    if config.preset == "textures" and not config.data:
        ensure_textures(Path(TEXTURES))
        processes = run.accelerator.num_processes
        config = dataclasses.replace(config, batch_size=max(config.batch_size // processes, 1) * processes)
    loading = loading_options(run, config)
    return config, *open_splits(config.data or TEXTURES, loading["cache"]), loading


def view_loader(run: Run, config: Common, shards: ShardSet, loading: dict, **options) -> ViewLoader:
    """Augmented batches of this process."""
    return ViewLoader(
        shards,
        config.views,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        node_groups=config.loading.node_groups,
        prefetch=config.loading.prefetch,
        epochs=config.epochs,
        **loading,
        **options,
    )


def to_device(run: Run, config: Common, module: nn.Module) -> nn.Module:
    """The module where and how it will be trained: batch norm over all ranks, channels last, compiled if asked for."""
    if run.accelerator.num_processes > 1:
        module = synchronize_batchnorm(module, run.accelerator.device)
    module = module.to(run.accelerator.device, memory_format=torch.channels_last)
    if config.compile:
        module.compile()  # in place: names in checkpoints stay as they are
    return module


def schedule(config: Common, steps_per_epoch: int) -> Callable[[int], float]:
    """step -> learning rate; epochs become steps here and nowhere else."""
    peak = peak_learning_rate(config.optim.lr, config.batch_size, config.optim.scaling)
    warmup_epochs = min(config.optim.warmup_epochs, config.epochs / 10)
    steps = {"warmup_steps": round(warmup_epochs * steps_per_epoch), "total_steps": config.epochs * steps_per_epoch}
    return partial(warmup_cosine, **steps, peak=peak)


def restore(run: Run, config: Common, task: Task) -> State:
    """A new state, or that of the checkpoint to go on from, with the task's modules and optimizers put back."""
    device = run.accelerator.device
    guard = NonFiniteGuard(task.module, task.optimizers, device)
    state = State(0, RunningMeans((*task.figures, "gradient_norm"), device), guard)
    if run.resume_from is None:
        return state
    tensors, record = checkpoint.load(run.resume_from)
    check_same_run(config, record["config"])
    if record["data"] != identity(task.loader):
        raise UserError(
            f"{run.resume_from} was trained on other shards than {task.loader.shards.root}: give its --data."
        )
    if record["inputs"] != task.inputs:
        raise UserError(
            f"{' and '.join(name for name in task.inputs if task.inputs[name] != record['inputs'].get(name))} changed "
            f"since {run.resume_from} was written: begin anew with another --out."
        )
    if record["bf16"] != run.bf16:
        before = "bf16" if record["bf16"] else "fp32"
        raise UserError(
            f"{run.resume_from} was trained in {before}: go on where that runs, or with --precision {before}."
        )
    checkpoint.unpack(tensors, task.module, task.optimizers)
    state.means.sums, guard.counts = tensors["means"].to(device), tensors["guard"].to(device)
    guard.counts[1] = guard.counts[
        0
    ]  # what an earlier part was allowed by another --max-skipped is not held against it
    task.loader.load_state_dict(record["loader"])
    if run.accelerator.is_main_process:  # which counts for all that went before
        task.loader.bad_samples.replaced = record["replaced"]
    state.step, state.report = record["step"], record["report"]
    return state


def save(run: Run, config: Common, task: Task, state: State) -> None:
    """Write a checkpoint, unless the weights are not sound: the last good ones shall stay."""
    replaced = torch.tensor(task.loader.bad_samples.replaced, device=run.accelerator.device)
    replaced = int(run.accelerator.reduce(replaced, "sum"))
    sums = run.accelerator.reduce(state.means.sums, "mean")  # the ranks have different ones, and all go on from these
    if run.accelerator.is_main_process and state.guard.is_sound():
        run_lock.check(run.out)
        tensors = checkpoint.pack(task.module, task.optimizers)
        tensors |= {"means": sums.cpu(), "guard": state.guard.counts.cpu()}
        record = {"loader": task.loader.state_dict(), "report": state.report, "data": identity(task.loader)}
        record |= {"inputs": task.inputs, "bf16": run.bf16}
        record |= {"replaced": replaced, "config": dataclasses.asdict(config)}
        checkpoint.Checkpoints(run.out / "checkpoints", config.checkpoint.keep).save(state.step, tensors, record)


def identity(loader: ViewLoader) -> dict[str, int | str]:
    """What the samples of a run are known by: their number, and one checksum over those of all shards."""
    return {"samples": len(loader.shards), "shards": checksum_of(loader.shards)}


def checksum_of(shards: ShardSet) -> str:
    """One checksum over those of all shards."""
    return hashlib.sha256("".join(shard["sha256"] for shard in shards.manifest["shards"]).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_folder(run: Run, config: Common, task: Task, state: State, record: dict) -> MetricsFile | None:
    """Make the run folder, only now that every part stands, and say what is about to be done; None on other ranks."""
    accelerator, metrics = run.accelerator, None
    if accelerator.is_main_process:
        metrics = start_run(run.out, {**dataclasses.asdict(config), **record}, state.step)
        if metrics.damaged:
            console.print(
                f"{run.out}/metrics.jsonl: {metrics.damaged} damaged row(s) of the earlier part were dropped."
            )
        order, total_steps = task.loader.order, config.epochs * len(task.loader)
        console.print(
            f"{order.dropped + len(task.loader) * config.batch_size:,} images, batch {config.batch_size} "
            f"({order.dropped} left over each epoch), {total_steps:,} steps on {accelerator.num_processes} x "
            f"{accelerator.device.type} in {'bf16' if run.bf16 else 'fp32'}, "
            f"views by {choose_backend(config.loading.backend, accelerator.device)}, encoder {record['timm_name']} "
            f"{record['timm_kwargs']}" + (f"; going on from {run.resume_from}" if run.resume_from else "")
        )
    accelerator.wait_for_everyone()
    return metrics


def finish(run: Run, metrics: MetricsFile, summary: list[str]) -> None:
    """The last words of a run."""
    metrics.close()
    for sentence in summary:
        console.print(sentence)
    console.print(f"run folder: {run.out}")
    run_lock.release(run.out)


def diverged(run: Run, task: Task, in_a_row: int, step: int) -> UserError:
    """The error of a run whose gradients were not finite too often; lists the images of the last such step."""
    epoch, position = divmod(step - 1, len(task.loader))
    index = task.loader.shards.index
    samples = np.sort(task.loader.order.batch(epoch, position))
    keys = [key.decode() for key in index["key"][samples]]
    if run.accelerator.is_main_process:
        (run.out / "diverged.json").write_text(json.dumps({"step": step, "images": keys}, indent=1) + "\n")
    return UserError(
        f"The gradient was not finite in {in_a_row} steps in a row, the last of them step {step} (images "
        f"{', '.join(keys[:3])} and more, listed in {run.out}/diverged.json): lower --optim.lr, lengthen "
        "--optim.warmup-epochs or use --precision fp32, in a new --out; or allow more by --max-skipped."
    )


def available_cores() -> int:
    """Cores this process may use; not every system knows an affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@contextmanager
def progress_bar(total_steps: int, shown: bool) -> Iterator[Callable[[dict], None]]:
    """A bar with loss, images/s and data wait on the main process of a terminal; yields what advances it."""
    figures = "loss {task.fields[loss]:.3f}  {task.fields[images_per_s]:,.0f} images/s  wait {task.fields[wait]:.0%}"
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn(figures))
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("", total=total_steps, loss=math.nan, images_per_s=0, wait=0)

        def advance(row: dict) -> None:
            wait = row["data_wait_ms"] / row["step_ms"]
            progress.update(task, completed=row["step"], loss=row["loss"], images_per_s=row["images_per_s"], wait=wait)

        yield advance
