"""StreamCLR: train a SimCLR encoder from shards.

    accelerate launch train.py                                          the built-in demonstration
    accelerate launch train.py --preset imagenet --data /data/imagenet  a real run
    python train.py --help                                              every option

Read `pretrain` from top to bottom: the parts, one loop, the report.
"""

import dataclasses
import gc
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy

from config import Config, check_same_run, parse
from engine import checkpoint
from engine.metrics import MetricsFile, RunningMeans, StepClock
from engine.optim import create_optimizer, parameter_groups
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
    synchronise_batchnorm,
)
from pipeline.cache import ShardCache
from pipeline.convert import ensure_textures
from pipeline.loader import ViewLoader, central_batches, choose_backend
from pipeline.shards import ShardSet, open_splits

TEXTURES = "data/textures"
console = Console()


def pretrain(config: Config) -> None:
    """One run, from shards to `encoder.safetensors`."""
    accelerator = Accelerator(
        mixed_precision="no",  # the loop opens autocast itself, around the forward pass alone
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    cores = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cpu":
        torch.set_num_threads(cores)  # the launcher leaves one thread to each process
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    bf16 = config.precision == "bf16" or (config.precision == "auto" and computes_in_bf16(device))
    set_seed(config.seed)
    out, begun_at = run_folder(config)

    # ---- data: shards -> two views of every image
    if config.preset == "textures" and not config.data:
        ensure_textures(Path(TEXTURES))
        # the demonstration must run on any number of processes
        config = dataclasses.replace(config, batch_size=config.batch_size // world_size * world_size)
    cache = ShardCache(limit_bytes=round(config.loading.cache_gb * 1e9))
    train, test = open_splits(config.data or TEXTURES, cache)
    backend = choose_backend(config.loading.backend, device)
    loading = {"device": device, "backend": backend, "workers": config.loading.workers or cores}
    loading |= {"max_bad": config.loading.max_bad, "quarantine": out / "quarantine.jsonl", "cache": cache}
    loader = ViewLoader(
        train,
        config.views,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        node_groups=config.loading.node_groups,
        prefetch=config.loading.prefetch,
        epochs=config.epochs,
        **loading,
    )

    # ---- model: views -> h -> z
    spec = encoder_spec(config.encoder.name, config.views.size, config.encoder.stem, config.encoder.width)
    encoder = create_encoder(spec)
    width = representation_width(encoder, config.views.size)
    head = projection_head(config.head.version, width, config.head.hidden, config.head.out)
    simclr = SimCLR(encoder, head, width, classes=len(train.classes))
    if world_size > 1:
        simclr = synchronise_batchnorm(simclr, device)
    simclr = simclr.to(device, memory_format=torch.channels_last)

    # ---- optimisation; epochs become steps here and nowhere else
    total_steps = config.epochs * len(loader)
    warmup_steps = round(min(config.optim.warmup_epochs, config.epochs / 10) * len(loader))
    peak = peak_learning_rate(config.optim.lr, config.batch_size, config.optim.scaling)
    groups = parameter_groups([simclr.encoder, simclr.head], config.optim.weight_decay)
    optimizer = create_optimizer(config.optim.name, groups, peak, config.optim.momentum)
    optimizers = [optimizer]
    if simclr.probe is not None:  # it has its own, so that no setting of the encoder's touches the yardstick
        optimizers.append(torch.optim.AdamW(simclr.probe.parameters(), 1e-3))

    # ---- where an earlier part of the run stopped
    step, report, means = 0, {}, RunningMeans()
    sampled = {"samples": len(train), "shards": checksum_of(train)}
    if begun_at is not None:
        tensors, record = checkpoint.load(begun_at)
        check_same_run(config, record["config"])
        if record["data"] != sampled:
            raise UserError(f"{begun_at} was trained on other shards than {train.root}: give the same --data.")
        checkpoint.unpack(tensors, simclr, optimizers)
        means.load_state_dict({name: tensors[f"means/{name}"] for name in record["means"]}, device)
        loader.load_state_dict(record["loader"])
        if rank == 0:  # which counts for all that went before
            loader.quarantine.met, loader.quarantine.replaced = record["met"], record["replaced"]
        step, report = record["step"], record["report"]
    checkpoints = checkpoint.Checkpoints(out / "checkpoints", config.checkpoint.keep)
    model = accelerator.prepare_model(simclr)

    def save() -> None:
        bad = torch.tensor([loader.quarantine.met, loader.quarantine.replaced], device=device)
        met, replaced = accelerator.reduce(bad, "sum").tolist()
        if accelerator.is_main_process:
            own = means.state_dict()
            if own:  # or the last good checkpoint would be followed by a bad one
                check_finite(own["sums"][0].item(), step)
            tensors = checkpoint.pack(simclr, optimizers) | {f"means/{name}": own[name].cpu() for name in own}
            record = {"loader": loader.state_dict(), "means": list(own), "report": report, "data": sampled}
            record |= {"met": met, "replaced": replaced, "config": dataclasses.asdict(config)}
            checkpoints.save(step, tensors, record)

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
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            h = simclr.encoder(views)
        simclr.train()
        return h

    # ---- the run folder, made only now that every part stands
    if accelerator.is_main_process:
        metrics = start_run(out, config, spec, step)
        console.print(
            f"{len(train):,} images, batch {config.batch_size} ({loader.order.dropped} left over each epoch), "
            f"{total_steps:,} steps on {world_size} x {device.type} in {'bf16' if bf16 else 'fp32'}, "
            f"views by {backend}, encoder {spec[0]} {spec[1]}"
            + ("" if evaluate else "; no labelled test split beside the train split, so no kNN and no table")
            + (f"; going on from {begun_at}" if begun_at else "")
        )
    accelerator.wait_for_everyone()
    if evaluate and config.eval.baselines and not report:
        report = {"raw pixels": evaluate(raw_pixels), "untrained": evaluate(represent)}

    # ---- the loop
    clock, saved_at, replaced, leaving = StepClock(), time.monotonic(), 0, False
    with progress_bar(total_steps, accelerator.is_main_process) as advance, checkpoint.StopSignal() as stop:
        while not leaving and step < total_steps:
            epoch = step // len(loader)
            for batch in clock.watch(loader):
                torch.manual_seed((config.seed << 32) + step * world_size + rank)  # of dropout: nothing to be saved
                lr = warmup_cosine(step, warmup_steps, total_steps, peak)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    z, scores = model(batch.views)  # (2B, out), (2B, classes)
                loss = nt_xent(z, config.loss.temperature, impl=config.loss.impl)
                probe_loss, probe_top1 = probe_objective(scores, batch.label, loss)
                accelerator.backward(loss + probe_loss)
                for each in optimizers:
                    each.step()
                    each.zero_grad(set_to_none=True)
                means.add(loss, probe_top1)
                step += 1
                epoch_ends = step % len(loader) == 0
                knn_due = evaluate and epoch_ends and config.eval.knn_every and (epoch + 1) % config.eval.knn_every == 0
                leaving = stop.received and world_size == 1
                save_due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
                if step % config.log_every == 0 or step == total_steps or knn_due:
                    # the one place where the host waits for the device, and where the ranks agree to stop or save
                    minutes = (time.monotonic() - saved_at) / 60
                    late = 0 < config.checkpoint.every_minutes <= minutes
                    figures = accelerator.reduce(means.take(loader.quarantine.replaced, stop.received, late), "mean")
                    mean_loss, mean_top1, replaced, stopped, late = figures.tolist()
                    check_finite(mean_loss, step)
                    row = {"step": step, "epoch": epoch + 1, "loss": mean_loss, "lr": lr, "probe_top1": mean_top1}
                    row |= clock.window(config.batch_size) | {"replaced_images": round(replaced * world_size)}
                    if accelerator.is_main_process:
                        metrics.write(**row)
                        advance(row)
                    leaving, save_due = stopped > 0, save_due or late > 0
                if (save_due or leaving) and not epoch_ends:
                    save()
                    saved_at = time.monotonic()
                if leaving:
                    break
            if not epoch_ends:
                break
            if knn_due and step < total_steps:
                knn = evaluate(represent, linear=False)
                if accelerator.is_main_process:
                    metrics.write(step=step, epoch=epoch + 1, **knn)
                    console.print(f"epoch {epoch + 1}: loss {row['loss']:.3f}, kNN top-1 {knn['knn_top1']:.3f}")
                clock.pause()
            save()
            saved_at = time.monotonic()
    loader.close()
    if leaving and step < total_steps:
        if accelerator.is_main_process:
            metrics.close()
            console.print(f"Stopped after step {step} of {total_steps}: the same command with --out {out} goes on.")
        return

    # ---- what came out; the encoder first, since nothing after it is worth a lost run
    if accelerator.is_main_process:
        save_encoder(simclr.encoder, spec, out / "encoder.safetensors")
    if evaluate:
        report["trained"] = evaluate(represent)
    if accelerator.is_main_process:
        for name, figures in report.items():
            metrics.write(step=step if name == "trained" else 0, features=name, **figures)
        metrics.close()
        if report:
            console.print(report_table(report))
        if replaced:
            console.print(
                f"{round(replaced * world_size)} times another image took a bad one's place: {out}/quarantine.jsonl"
            )
        if clock.total_steps:
            images_per_s, waiting = clock.summary(config.batch_size)
            console.print(f"{images_per_s:,.0f} images/s, {waiting:.1%} of the time waiting for data")
        console.print(f"run folder: {out}")


def run_folder(config: Config) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to go on from if there is one.

    Raises:
        UserError: the folder holds something else than a run that can go on.
    """
    if config.resume not in ("auto", "none"):
        begun_at = checkpoint.find(Path(config.resume).resolve())
        out = Path(config.out or begun_at.parents[1])
        if is_new(out) or out.resolve() == begun_at.parents[1]:
            return out, begun_at
        raise UserError(f"{out} holds other files than the run that --resume names: choose another --out.")
    out = Path(config.out or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    if is_new(out):
        return out, None
    begun_at = checkpoint.Checkpoints(out / "checkpoints", keep=1).latest()
    names = set(os.listdir(out))
    hardly_begun = "config.json" in names <= {"config.json", "metrics.jsonl", "quarantine.jsonl", "checkpoints"}
    if config.resume == "none" or (begun_at is None and not hardly_begun):
        raise UserError(f"{out} holds a run or other files already: choose another --out or delete it.")
    return out, begun_at


def is_new(out: Path) -> bool:
    """Whether nothing is at `out` yet.

    Raises:
        UserError: a file is.
    """
    if out.is_file():
        raise UserError(f"{out} is a file: choose another --out.")
    return not (out.is_dir() and any(out.iterdir()))


def checksum_of(shards: ShardSet) -> str:
    """One checksum over those of all shards."""
    return hashlib.sha256("".join(shard["sha256"] for shard in shards.manifest["shards"]).encode()).hexdigest()


def leave_process_group() -> None:
    """End gloo's threads, which would abort the process if they outlived the interpreter."""
    gc.collect()  # they end with the last reference to their group, and modules refer to it in cycles
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def available_cores() -> int:
    """Cores this process may use; not every system knows an affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def check_finite(loss: float, step: int) -> None:
    """Stop a run that has diverged."""
    if not math.isfinite(loss):
        raise UserError(
            f"The loss became {loss} by step {step}: lower --optim.lr, lengthen --optim.warmup-epochs or use "
            "--precision fp32."
        )


def probe_objective(scores: Tensor | None, label: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy () and top-1 () of the online probe on both views (2B, classes), unlabelled images left out."""
    if scores is None:
        return torch.zeros_like(like), torch.zeros_like(like)
    label = label.repeat(2)  # (2B,)
    known = (label >= 0).sum().clamp_min(1)
    top1 = (scores.argmax(1) == label).sum() / known
    return cross_entropy(scores.float(), label, ignore_index=-1, reduction="sum") / known, top1


def start_run(out: Path, config: Config, spec: tuple[str, dict], step: int) -> MetricsFile:
    """Make the run folder with its config.json and open its metrics, those of an earlier part until `step`."""
    out.mkdir(parents=True, exist_ok=True)
    record = {**dataclasses.asdict(config), "timm_name": spec[0], "timm_kwargs": spec[1]}
    (out / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    return MetricsFile(out / "metrics.jsonl", step)


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
    except (UserError, OSError) as error:  # an unwritable folder, a full disk
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's code for a run that was interrupted


if __name__ == "__main__":
    main()
