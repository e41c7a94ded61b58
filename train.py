"""StreamCLR: train a SimCLR encoder from shards.

    accelerate launch train.py                                          the built-in demonstration
    accelerate launch train.py --preset imagenet --data /data/imagenet  a real run
    python train.py --help                                              every option

Read `pretrain` from top to bottom, then `fit`: the parts, one loop, the report.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from config import Common, Config, check_same_run, parse
from engine import checkpoint
from engine.gradcache import backward_in_slices
from engine.guard import CollapseWatch, Guard
from engine.metrics import MetricsFile, RunningMeans, StepClock, communication_s, verdict
from engine.optim import create_optimizer, parameter_groups
from engine.processes import is_first_to_fail, leave_process_group, was_left_alone
from engine.run_folder import run_folder, start_run
from engine.schedule import peak_learning_rate, warmup_cosine
from errors import UserError
from evaluation.features import raw_pixels
from evaluation.report import Evaluator, report_table
from loss import nt_xent
from model import (
    SimCLR,
    create_encoder,
    encoder_spec,
    projection_head,
    representation_width,
    save_encoder,
    save_head,
    synchronise_batchnorm,
)
from pipeline.cache import ShardCache
from pipeline.convert import ensure_textures
from pipeline.loader import Batch, ViewLoader, central_batches, choose_backend
from pipeline.shards import ShardSet, open_splits

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
    begun_at: Path | None
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
    """step -> rate of the first optimiser."""
    backpropagate: Callable[[nn.Module, Batch], tuple[Tensor, ...]]
    """(module as it is prepared for several processes, batch) -> figures (), the loss first."""
    figures: tuple[str, ...]
    """Their names."""
    chance: float
    """The loss of a network that tells nothing apart."""
    validate: Callable[[], dict[str, float]] | None
    """Scores in the course of the run; None for none."""
    validate_every: int
    """Epochs; 0 for never."""


@dataclass
class State:
    """How far a run has come, beside weights and optimisers."""

    step: int
    means: RunningMeans
    """Of the metrics row that has not been written yet."""
    guard: Guard
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    """The final table as far as it is known."""


def pretrain(config: Config) -> None:
    """SimCLR, from shards to `encoder.safetensors`."""
    run = begin(config, config.preset)
    accelerator = run.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes

    # ---- data: shards -> two views of every image
    if config.preset == "textures" and not config.data:
        ensure_textures(Path(TEXTURES))
        # the demonstration must run on any number of processes
        config = dataclasses.replace(config, batch_size=config.batch_size // world_size * world_size)
    loading = loading_options(run, config)
    train, test = open_splits(config.data or TEXTURES, loading["cache"])
    loader = view_loader(run, config, train, loading)

    # ---- model: views -> h -> z
    spec = encoder_spec(image_size=config.views.size, **dataclasses.asdict(config.encoder))
    encoder = create_encoder(spec)
    width = representation_width(encoder, config.views.size)
    head = projection_head(config.head.version, width, config.head.hidden, config.head.out)
    simclr = to_device(run, config, SimCLR(encoder, head, width, classes=len(train.classes)))

    # ---- optimisation
    groups = parameter_groups([simclr.encoder, simclr.head], config.optim.weight_decay)
    learning_rate = schedule(config, len(loader))
    optimizers = [create_optimizer(config.optim.name, groups, learning_rate(0), config.optim.momentum)]
    if simclr.probe is not None:  # it has its own, so that no setting of the encoder's touches the yardstick
        optimizers.append(torch.optim.AdamW(simclr.probe.parameters(), 1e-3, fused=True))

    def encode(views: Tensor, through: nn.Module) -> tuple[Tensor, Tensor | None]:
        with run.autocast():
            return through(views)  # (2B, out), (2B, classes)

    def backpropagate(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        contrast = partial(nt_xent, temperature=config.loss.temperature, impl=config.loss.impl)
        if not 0 < config.micro_batch < len(batch.label):
            z, scores = encode(batch.views, model)
            loss = contrast(z)
            probe_loss, probe_top1 = probe_objective(scores, batch.label, batch.label)
            accelerator.backward(loss + probe_loss)
            return loss, probe_top1
        top1 = []

        def probe_loss_of(scores: Tensor | None, part: slice) -> Tensor:
            loss, share = probe_objective(scores, batch.label[part], batch.label)
            top1.append(share)
            return loss

        loss = backward_in_slices(
            lambda views: encode(views, model if torch.is_grad_enabled() else simclr),
            simclr,
            batch.views,
            config.micro_batch,
            contrast,
            probe_loss_of,
            no_sync=lambda: accelerator.no_sync(model),
        )
        return loss, sum(top1)

    # ---- evaluation on frozen features, before, during and after
    evaluate = None
    labelled = [(split, np.flatnonzero(split.index["label"] >= 0)) for split in (train, test) if split is not None]
    if len(labelled) == 2 and all(len(samples) for _, samples in labelled):
        evaluate = Evaluator(
            *labelled,
            lambda split, samples: central_batches(split, config.views, samples, batch_size=256, **loading),
            accelerator.gather,
            rank,
            world_size,
            config.eval.k,
            config.eval.max_bank,
        )

    def represent(views: Tensor) -> Tensor:
        """(B, 3, S, S) -> h (B, features), in evaluation mode."""
        simclr.eval()
        with run.autocast():
            h = simclr.encoder(views)
        simclr.train()
        return h

    # ---- what is new of the run, or where an earlier part of it stopped
    task = Task(
        simclr,
        loader,
        optimizers,
        learning_rate,
        backpropagate,
        figures=("loss", "probe_top1"),
        chance=math.log(2 * config.batch_size - 1),
        validate=evaluate and (lambda: evaluate(represent, linear=False)),
        validate_every=config.eval.knn_every,
    )
    state = restore(run, config, task)
    metrics = open_folder(run, config, task, state, {"timm_name": spec[0], "timm_kwargs": spec[1]})
    if evaluate is None and accelerator.is_main_process:
        console.print("There is no labelled test split beside the train split, so no kNN and no table.")
    if evaluate and config.eval.baselines and not state.report:
        state.report = {"raw pixels": evaluate(raw_pixels), "untrained": evaluate(represent)}

    closing = fit(run, config, task, state, metrics)
    if closing is None:  # asked to stop
        return

    # ---- what came out; the encoder first, since nothing after it is worth a lost run
    if accelerator.is_main_process:
        save_encoder(simclr.encoder, spec, run.out / "encoder.safetensors")
        save_head(simclr.head, run.out / "head.safetensors")
    if evaluate:
        state.report["trained"] = evaluate(represent)
    if accelerator.is_main_process:
        for name, scores in state.report.items():
            metrics.write(step=state.step if name == "trained" else 0, features=name, **scores)
        if state.report:
            console.print(report_table(state.report))
        finish(run, metrics, closing)


def fit(run: Run, config: Common, task: Task, state: State, metrics: MetricsFile | None) -> list[str] | None:
    """The loop: every step of a run that is still to come.

    Returns:
        Sentences for the end of the run; None if it was asked to stop before.
    """
    accelerator = run.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes
    loader, optimizers, means, guard = task.loader, task.optimizers, state.means, state.guard
    total_steps = config.epochs * len(loader)
    model = accelerator.prepare_model(task.module)
    clock, collapse, saved_at, replaced, leaving = StepClock(), CollapseWatch(task.chance), time.monotonic(), 0, False
    with progress_bar(total_steps, accelerator.is_main_process) as advance, checkpoint.StopSignal() as stop:
        while not leaving and state.step < total_steps:
            epoch = state.step // len(loader)
            for batch in clock.watch(loader):
                torch.manual_seed((config.seed << 32) + state.step * world_size + rank)  # of dropout: nothing to save
                lr = task.learning_rate(state.step)
                for group in optimizers[0].param_groups:
                    group["lr"] = lr
                guard.before_forward()
                figures = task.backpropagate(model, batch)
                taken, gradient_norm = guard.after_backward(state.step + 1)
                for each in optimizers:
                    each.step()  # leaves everything as it is if the step is not to be taken
                    each.zero_grad(set_to_none=True)
                means.add(taken, *figures, gradient_norm)
                state.step += 1
                epoch_ends = state.step % len(loader) == 0
                due = task.validate and epoch_ends and task.validate_every and (epoch + 1) % task.validate_every == 0
                leaving = stop.received and world_size == 1
                save_due = config.checkpoint.every_steps and state.step % config.checkpoint.every_steps == 0
                if state.step % config.log_every == 0 or state.step == total_steps or due:
                    # the one place where the host waits for the device, and where the ranks agree to stop or save
                    minutes = (time.monotonic() - saved_at) / 60
                    late = 0 < config.checkpoint.every_minutes <= minutes
                    sums = torch.cat([means.take(loader.quarantine.replaced, stop.received, late), guard.counts])
                    *averages, replaced, stopped, late, _, longest, skipped, last = accelerator.reduce(
                        sums, "mean"
                    ).tolist()
                    if longest > config.max_skipped:
                        raise diverged(run, task, round(longest), round(last))
                    row = {"step": state.step, "epoch": epoch + 1, "lr": lr}
                    row |= dict(zip((*task.figures, "gradient_norm"), averages, strict=True))
                    row |= clock.window(config.batch_size)
                    row |= {"replaced_images": round(replaced * world_size), "skipped_steps": round(skipped)}
                    collapsed = collapse.collapsed(state.step, row["loss"])
                    if accelerator.is_main_process:
                        metrics.write(**row)
                        advance(row)
                        if collapsed:
                            console.print(
                                f"The loss stands at {row['loss']:.4f}, which is what it is when the network tells no "
                                "image from another (collapse): lower --optim.lr or lengthen --optim.warmup-epochs."
                            )
                    leaving, save_due = stopped > 0, save_due or late > 0
                if (save_due or leaving) and not epoch_ends:
                    save(run, config, task, state)
                    saved_at = time.monotonic()
                if leaving:
                    break
            if not epoch_ends:
                break
            if due and state.step < total_steps:
                scores = task.validate()
                if accelerator.is_main_process:
                    metrics.write(step=state.step, epoch=epoch + 1, **scores)
                    shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
                    console.print(f"epoch {epoch + 1}: loss {row['loss']:.3f}, {shown}")
                clock.pause()
            save(run, config, task, state)
            saved_at = time.monotonic()
    loader.close()
    if leaving and state.step < total_steps:
        if accelerator.is_main_process:
            metrics.close()
            console.print(
                f"Stopped after step {state.step} of {total_steps}: the same command with --out {run.out} goes on."
            )
        return None
    closing = []
    if replaced:
        closing.append(
            f"{round(replaced * world_size)} times another image took a bad one's place: {run.out}/quarantine.jsonl"
        )
    if clock.total_steps:
        images_per_s, waiting = clock.summary(config.batch_size)
        communicating = communication_s(model) * clock.total_steps / clock.total_s
        faster = "--compile" if run.bf16 else "bf16 on hardware that computes in it, or --compile"
        faster = "a larger --batch-size or faster hardware" if config.compile else faster
        closing.append(f"{images_per_s:,.0f} images/s, {waiting:.1%} of the time waiting for data")
        closing.append(verdict(waiting, communicating, faster))
    return closing


def begin(config: Common, name: str) -> Run:
    """Processes, threads, seed and run folder."""
    accelerator = Accelerator(
        mixed_precision="no",  # the loop opens autocast itself, around the forward pass alone
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
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
    return Run(accelerator, cores, bf16, *run_folder(config.out, config.resume, name))


def loading_options(run: Run, config: Common) -> dict:
    """What loaders for training and for evaluation have in common."""
    device = run.accelerator.device
    return {
        "device": device,
        "backend": choose_backend(config.loading.backend, device),
        "workers": config.loading.workers or run.cores,
        "max_bad": config.loading.max_bad,
        "quarantine": run.out / "quarantine.jsonl",
        "cache": ShardCache(limit_bytes=round(config.loading.cache_gb * 1e9)),
    }


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
        module = synchronise_batchnorm(module, run.accelerator.device)
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
    """A new state, or that of the checkpoint to go on from, with the task's modules and optimisers put back."""
    device = run.accelerator.device
    guard = Guard(task.module, task.optimizers, device)
    state = State(0, RunningMeans((*task.figures, "gradient_norm"), device), guard)
    if run.begun_at is None:
        return state
    tensors, record = checkpoint.load(run.begun_at)
    check_same_run(config, record["config"])
    if record["data"] != identity(task.loader):
        raise UserError(f"{run.begun_at} was trained on other shards than {task.loader.shards.root}: give its --data.")
    checkpoint.unpack(tensors, task.module, task.optimizers)
    state.means.sums, guard.counts = tensors["means"].to(device), tensors["guard"].to(device)
    task.loader.load_state_dict(record["loader"])
    if run.accelerator.is_main_process:  # which counts for all that went before
        task.loader.quarantine.met, task.loader.quarantine.replaced = record["met"], record["replaced"]
    state.step, state.report = record["step"], record["report"]
    return state


def save(run: Run, config: Common, task: Task, state: State) -> None:
    """Write a checkpoint, unless the weights are not sound: the last good ones shall stay."""
    quarantine = task.loader.quarantine
    bad = torch.tensor([quarantine.met, quarantine.replaced], device=run.accelerator.device)
    met, replaced = run.accelerator.reduce(bad, "sum").tolist()
    if run.accelerator.is_main_process and state.guard.is_sound():
        tensors = checkpoint.pack(task.module, task.optimizers)
        tensors |= {"means": state.means.sums.cpu(), "guard": state.guard.counts.cpu()}
        record = {"loader": task.loader.state_dict(), "report": state.report, "data": identity(task.loader)}
        record |= {"met": met, "replaced": replaced, "config": dataclasses.asdict(config)}
        checkpoint.Checkpoints(run.out / "checkpoints", config.checkpoint.keep).save(state.step, tensors, record)


def identity(loader: ViewLoader) -> dict[str, int | str]:
    """What the samples of a run are known by: their number, and one checksum over those of all shards."""
    shards = loader.shards.manifest["shards"]
    checksum = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
    return {"samples": len(loader.shards), "shards": checksum}


def open_folder(run: Run, config: Common, task: Task, state: State, record: dict) -> MetricsFile | None:
    """Make the run folder, only now that every part stands, and say what is about to be done; None on other ranks."""
    accelerator, metrics = run.accelerator, None
    if accelerator.is_main_process:
        metrics = start_run(run.out, {**dataclasses.asdict(config), **record}, state.step)
        order, total_steps = task.loader.order, config.epochs * len(task.loader)
        console.print(
            f"{order.dropped + len(task.loader) * config.batch_size:,} images, batch {config.batch_size} "
            f"({order.dropped} left over each epoch), {total_steps:,} steps on {accelerator.num_processes} x "
            f"{accelerator.device.type} in {'bf16' if run.bf16 else 'fp32'}, "
            f"views by {choose_backend(config.loading.backend, accelerator.device)}, encoder {record['timm_name']} "
            f"{record['timm_kwargs']}" + (f"; going on from {run.begun_at}" if run.begun_at else "")
        )
    accelerator.wait_for_everyone()
    return metrics


def finish(run: Run, metrics: MetricsFile, closing: list[str]) -> None:
    """The last words of a run."""
    metrics.close()
    for sentence in closing:
        console.print(sentence)
    console.print(f"run folder: {run.out}")


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
        "--optim.warmup-epochs or use --precision fp32."
    )


def available_cores() -> int:
    """Cores this process may use; not every system knows an affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def probe_objective(scores: Tensor | None, label: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy () and top-1 () of the online probe, both as this part's share of the batch.

    Args:
        scores: (2b, classes), both views of b images; None without a probe.
        label: (b,) int64; images with -1, unlabelled ones, are left out.
        whole: (B,) labels of the whole batch of this process.
    """
    if scores is None:
        nothing = torch.zeros((), device=label.device)
        return nothing, nothing
    label = label.repeat(2)  # (2b,)
    known = 2 * (whole >= 0).sum().clamp_min(1)
    top1 = (scores.argmax(1) == label).sum() / known
    return cross_entropy(scores.float(), label, ignore_index=-1, reduction="sum") / known, top1


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


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["pretrain"]:
        arguments = arguments[1:]
    try:
        pretrain(parse(arguments))
        leave_process_group()
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's code for a run that was interrupted
    except Exception as error:
        if not is_first_to_fail():
            sys.exit(1)
        if isinstance(error, UserError | OSError):  # an unwritable folder, a full disk
            sys.exit(f"error: {error}")
        if was_left_alone(error):
            sys.exit(
                "error: Another process ended without a word, killed for want of memory perhaps: see the system log."
            )
        raise


if __name__ == "__main__":
    main()
