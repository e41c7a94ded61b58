"""The training loop's surroundings: resume, learning rate, non-finite guard, metrics, checkpoints, stop signals.

A stage keeps its forward pass and its loss visible and leaves everything else to `TrainingLoop`:

    with TrainingLoop(session, config, model, loader, optimizers, schedule) as loop:
        for batch in loop:  # every batch still to come, across epochs
            loss = loss_fn(model(batch.views), batch.label)
            loop.backward(loss)
            loop.step(loss=loss)  # optimizer, metrics row
            if loop.validation_due:
                loop.log(**validate())
"""

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import checkpoint, run_lock
from .checkpoint import MAY_CHANGE, CheckpointConfig, Checkpoints, StopSignal
from .common import UserError, check_range, progress_bar, replacing
from .dry_run import DryRun
from .environment import environment
from .metrics import RunningMeans, StepTimer, communication_s, divide_pairs, verdict
from .nonfinite import CollapseWatch, NonFiniteGuard
from .optim import OptimConfig
from .run_folder import start_run
from .session import Session, computes_in_bf16
from .trackers import Trackers, choose_trackers, scalars

PROGRESS = "epoch {task.fields[epoch]}{task.fields[row]}"
"""Fields of the progress bar; `row` shows the newest metrics row and is empty before the first."""
MANY = 10**9
"""Upper bound of counts: larger than any that makes sense, small enough for every library it reaches."""


@dataclass(frozen=True)
class LoopConfig:
    """Options of the training loop, the same for every stage."""

    out: str = field(default="", metadata=MAY_CHANGE)
    """Run folder; default runs/<preset>-<time>, prefixed by the stage unless that is pretraining."""
    resume: str = field(default="auto", metadata=MAY_CHANGE)
    """auto: continue what --out holds, if anything. none: --out must be new. Otherwise a run folder or a checkpoint."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 4096
    """Global batch size in images, over all processes."""
    seed: int = 0
    """Seed of initial weights, sample order and views."""
    precision: Literal["auto", "bf16", "fp32"] = field(default="auto", metadata=MAY_CHANGE)
    """Precision of the networks. auto: bf16 where the hardware multiplies in it. fp32 excludes TF32."""
    compile: bool = False
    """Compile the networks with torch.compile; the first steps then take minutes."""
    cuda_graph: bool = field(default=False, metadata=MAY_CHANGE)
    """Replay the network's passes as CUDA graphs, for networks whose kernels outrun the host. One process on a GPU."""
    max_skipped: int = field(default=5, metadata=MAY_CHANGE)
    """Consecutive steps that may be skipped because of a non-finite gradient before the run stops."""
    log_every: int = field(default=10, metadata=MAY_CHANGE)
    """Steps between rows of metrics.jsonl."""
    dry_run: bool = field(default=False, metadata=MAY_CHANGE)
    """Print the configuration, the number of parameters, and memory and time measured on a few steps, and stop."""
    report: bool = field(default=True, metadata=MAY_CHANGE)
    """Write report.html into the run folder at the end."""
    trackers: tuple[str, ...] = field(default=("auto",), metadata=MAY_CHANGE)
    """Any of tensorboard, wandb and mlflow; auto: tensorboard if installed; none."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        check_range("--epochs", self.epochs, 1, MANY)
        check_range("--batch-size", self.batch_size, 2, MANY)
        check_range("--seed", self.seed, 0, 2**32 - 1)
        check_range("--max-skipped", self.max_skipped, 0, MANY)
        check_range("--log-every", self.log_every, 1, MANY)
        choose_trackers(self.trackers)
        if not self.resume:
            raise UserError("--resume is empty; use auto, none, or the path of a run folder or checkpoint.")


class Instruments(Protocol):
    """Hooks of a run for benchmarks."""

    def mark(self, part: str) -> None:
        """Note that a part of the step starts: "forward", "loss", "backward", "optimizer" or "other"."""

    def batches(self, loader: Iterable) -> Iterable:
        """Return the batches of one epoch: all of the loader's, or others such as one batch repeated."""


class TrainingLoop:
    """Iterator over every batch of a run still to come, with all that surrounds the forward pass.

    Entering the context opens the run folder; leaving it closes the loader.

    Args:
        session: device, ranks, precision and run folder.
        config: configuration of the stage.
        model: what `session.distribute` returned; a resumed run loads its weights.
        loader: batches of this rank, len(loader) steps per epoch.
        optimizers: optimizers that together own all trainable parameters; the schedule drives the first one.
        schedule: step -> learning rate of the first optimizer.
        validate_every: epochs between validations; 0 for none.
        collapse_loss: loss of a network that maps all images to the same output; nan where there is none.
        inputs: option -> checksum of what else the result depends on; a resumed run must have the same.
        memory: state of the run outside of the network that checkpoints hold, such as a queue of past projections.
        about: what config.json states in addition to the configuration.
        draw_views: batch -> picture of its views for trackers, (H, W, 3) uint8 on the device; None for no picture.
        instruments: hooks for benchmarks.

    Attributes:
        global_step: number of completed steps.
        validation_due: whether the caller should validate before the next batch.
        stopped: whether a stop signal ended the run before its last step.
        results: rows of the final table, by name; kept in checkpoints.

    Raises:
        UserError: the checkpoint to resume from belongs to another run.
    """

    def __init__(
        self,
        session: Session,
        config: LoopConfig,
        model: nn.Module,
        loader: Any,
        optimizers: list[Optimizer],
        schedule: Callable[[int], float],
        *,
        validate_every: int = 0,
        collapse_loss: float = math.nan,
        inputs: dict[str, str] | None = None,
        memory: nn.Module | None = None,
        about: dict[str, Any] | None = None,
        draw_views: Callable[[Any], Tensor] | None = None,
        instruments: Instruments | None = None,
    ):
        self.session, self.config, self.model, self.loader = session, config, model, loader
        self.module = model.module if isinstance(model, DistributedDataParallel) else model
        self.optimizers, self.schedule, self.validate_every = optimizers, schedule, validate_every
        self.inputs, self.about, self.instruments = inputs or {}, about or {}, instruments
        self.memory = memory
        self.trackers, self.draw_views, self.views = Trackers(session), draw_views, None
        self.mark = instruments.mark if instruments else lambda part: None
        self.guard = NonFiniteGuard(self.module, optimizers, session.device)
        self.means, self.timer, self.collapse = RunningMeans(), StepTimer(), CollapseWatch(collapse_loss)
        self.total_steps = config.epochs * len(loader)
        self.dry_run = DryRun(self.module, session.device, len(loader), config.epochs) if config.dry_run else None
        self.global_step, self.results, self.replaced_images = 0, {}, 0
        self.scores, self.announced_epoch = "", 0
        self.validation_due = self.save_due = self.stopping = self.stopped = False
        self.saved_at_s = time.monotonic()
        if session.resume_from is not None:
            self._restore(session.resume_from)

    def __enter__(self) -> "TrainingLoop":
        session = self.session
        with ExitStack() as contexts:  # closes the loader if anything below fails
            contexts.callback(self.loader.close)
            record = {**asdict(self.config), **self.about}
            self.metrics = start_run(session.out, record, self.global_step) if session.is_main else None
            session.barrier()  # the run folder exists before any rank writes into it
            self._announce()
            self.signal = contexts.enter_context(StopSignal())
            bar = progress_bar(self.total_steps, fields=PROGRESS, shown=session.is_main, epoch=1, row="")
            self.update_progress = contexts.enter_context(bar)
            if self.instruments:
                hooks = self.module.register_forward_pre_hook, self.module.register_forward_hook
                for register, part in zip(hooks, ("forward", "loss"), strict=True):
                    contexts.callback(register(lambda *_, part=part: self.mark(part)).remove)
            if session.is_main and not self.dry_run:
                names = choose_trackers(self.config.trackers)
                self.trackers.start(names, self.global_step, record, self.metrics.dropped)
            self.contexts = contexts.pop_all()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error or self.stopped:  # otherwise the final scores are still to come
            self.trackers.close(failed=error is not None)
        self.contexts.close()

    def __iter__(self) -> Iterator[Any]:
        """Yield every batch still to come; for each, the caller calls `backward` and then `step`."""
        epoch_ends = True
        self.timer.pause()  # start and baselines are not part of the training speed
        while epoch_ends and self.global_step < self.total_steps and not self.stopping:
            batches = self.instruments.batches(self.loader) if self.instruments else self.loader
            for batch in self.timer.watch(batches):
                self._before_forward()
                if self.draw_views and self.trackers.lack_views and self.views is None:
                    self.views = self.global_step, self.draw_views(batch)
                yield batch
                epoch_ends = self.global_step % len(self.loader) == 0
                if (epoch_ends or self.save_due or self.stopping) and not self.dry_run:
                    self._save()
                if self.stopping:
                    break
        if self.dry_run:
            self.stopped = True
            self.session.print_json(asdict(self.config))
            self.session.print(self.dry_run.table(self.config.batch_size))
            return
        self.stopped = self.stopping and self.global_step < self.total_steps
        if not self.stopped and not self.guard.weights_are_finite():  # overflow in one of the last --max-skipped steps
            raise UserError(
                "The weights are not finite at the end of the run, so no encoder is written; use a lower --optim.lr, a "
                "longer --optim.warmup-epochs or --precision fp32, and a new --out."
            )
        if self.stopped:
            self.session.log(
                f"Stopped after step {self.global_step} of {self.total_steps}; continue with: {self._command()}"
            )

    def _before_forward(self) -> None:
        config, session = self.config, self.session
        # Dropout is reseeded in every step, so that checkpoints need not hold random states.
        torch.manual_seed((config.seed << 32) + self.global_step * session.world_size + session.rank)
        self.learning_rate = self.schedule(self.global_step)
        for group in self.optimizers[0].param_groups:
            group["lr"] = self.learning_rate
        self.guard.before_forward()

    def backward(self, loss: Tensor) -> None:
        """Backpropagate a loss (); gradients are averaged over ranks."""
        self.mark("backward")
        loss.backward()
        self.mark("other")

    def step(self, **metrics: Tensor | tuple[Tensor, Tensor]) -> None:
        """Take the optimizer step, unless the gradient is not finite, and write a metrics row every `log_every` steps.

        Between rows the host does not wait for the device, neither here nor in `backward`.

        Args:
            metrics: scalars () on the device, `loss` among them, or pairs of scalars to be divided, see `RunningMeans`;
                a row holds their means over its steps.
        """
        taken, gradient_norm = self.guard.after_backward(self.global_step + 1)
        self.mark("optimizer")
        for optimizer in self.optimizers:
            optimizer.step()  # changes nothing where the guard rejected the gradient
            optimizer.zero_grad(set_to_none=True)
        self.mark("other")
        self.means.add(taken, **metrics, gradient_norm=gradient_norm)

        self.global_step += 1
        config, step = self.config, self.global_step
        self.epoch = -(-step // len(self.loader))
        epoch_ends, every_steps = step % len(self.loader) == 0, config.checkpoint.every_steps
        validates = bool(epoch_ends and self.validate_every and self.epoch % self.validate_every == 0)
        self.validation_due = validates and step < self.total_steps
        self.save_due = bool(every_steps and step % every_steps == 0)
        self.stopping = self.signal.received and self.session.world_size == 1  # several ranks agree in `_write_row`
        if step % config.log_every == 0 or step == self.total_steps or validates:
            self._write_row()
        self.update_progress(completed=step, epoch=self.epoch)
        if self.dry_run:
            self.stopping, self.validation_due = self.dry_run.step() or self.stopping, False
        elif self.stopping and self.validation_due:
            self._save()  # whoever asked to stop may not wait for the validation

    def _write_row(self) -> None:
        """Write a metrics row of all ranks: the one place where the host waits for the device, and ranks agree."""
        config, session, bad_samples = self.config, self.session, self.loader.bad_samples
        save_late = 0 < config.checkpoint.every_minutes <= (time.monotonic() - self.saved_at_s) / 60
        flags = {"replaced": bad_samples.replaced, "stop": self.signal.received, "save": save_late}
        mean = session.mean_of(self.means.compute_and_reset() | flags | self.guard.counts_by_name())
        if self.views is not None:  # the device is idle now: copying the picture adds no wait
            self.trackers.draw_views(*self.views)
            self.views = None
        self.replaced_images = round(mean.pop("replaced") * session.world_size)
        self.stopping, self.save_due = mean.pop("stop") > 0, mean.pop("save") > 0 or self.save_due
        skipped = {name: round(mean.pop(name)) for name in self.guard.counts_by_name()}
        bad_samples.check(self.replaced_images, self.epoch - 1)
        if skipped["longest_skipped"] > config.max_skipped:
            raise self._diverged(skipped["longest_skipped"], skipped["last_skipped"])

        self.row = {"step": self.global_step, "epoch": self.epoch, "lr": self.learning_rate, **divide_pairs(mean)}
        self.row |= self.timer.window(config.batch_size)
        self.row |= {"replaced_images": self.replaced_images, "skipped_steps": skipped["skipped"]}
        if session.is_main:
            self.metrics.write(**self.row)
            self.trackers.log(self.global_step, scalars(self.row))
            self._show_row()
        if self.collapse.collapsed(self.global_step, self.row["loss"]):
            session.log(
                f"The loss stays at {self.row['loss']:.4f}, its value when the network maps all images to the same "
                "output (collapse); lower --optim.lr or raise --optim.warmup-epochs."
            )

    def _show_row(self) -> None:
        """Show the row in the progress bar; where there is no terminal for it, print the first row of each epoch."""
        loss, speed = f"loss {self.row['loss']:.3f}", f"{self.row['images_per_s']:,.0f} images/s"
        self.update_progress(row=f"  {loss}{self.scores}  {speed}  {self.loader.filling}")
        hidden = not (self.session.console.is_terminal or self.dry_run or self.validation_due)
        if hidden and self.epoch > self.announced_epoch:
            self.announced_epoch = self.epoch
            self.session.log(f"epoch {self.epoch}, step {self.global_step} of {self.total_steps}: {loss}, {speed}")

    def log(self, **scores: float) -> None:
        """Write the scores of a validation to metrics.jsonl and print them."""
        if self.session.is_main:
            self.metrics.write(step=self.global_step, epoch=self.epoch, **scores)
            self.trackers.log(self.global_step, scores)
        shown = [f"{name.removesuffix('_top1')} {score:.3f}" for name, score in scores.items()]
        self.scores = "".join(f"  {score}" for score in shown)
        self.session.log(f"epoch {self.epoch}: loss {self.row['loss']:.3f}, {', '.join(shown)}")
        self.timer.pause()  # validation is not part of the training speed

    def finish(self, table: Any = None) -> None:
        """Write the rows of the final table and print it with a summary of the run.

        Args:
            table: printable form of `results`.
        """
        if not self.session.is_main:
            return
        for name, scores in self.results.items():
            self.metrics.write(features=name, **scores)
        self.metrics.close()
        if table is not None:
            self.session.print(table)
        summary, file = self._summary(), self.session.out / "summary.json"
        if self.timer.total_steps or not file.exists():  # or the run had ended before, with its speed
            summary |= environment(self.session.device, self.session.world_size)
            summary["precision"] = "bf16" if self.session.bf16 else "fp32"
            with replacing(file) as path:
                path.write_text(json.dumps(summary, indent=2))
        for sentence in summary["sentences"]:
            self.session.print(sentence)
        self.trackers.close()
        self.session.print(f"run folder: {self.session.out}")
        run_lock.release(self.session.out)

    def add_result(self, name: str, **scores: float) -> None:
        """Add a row to the final table, with the step at which it was measured."""
        self.results[name] = {"step": self.global_step, **scores}
        self.trackers.log(self.global_step, scalars({"features": name, **scores}))

    def _summary(self) -> dict[str, Any]:
        """Speed of this part of the run, and sentences on unreadable images, speed and what limited it."""
        config, session, timer = self.config, self.session, self.timer
        summary = {"replaced_images": self.replaced_images, "sentences": []}
        if self.replaced_images:
            listing = session.out / "bad_samples.jsonl"
            summary["sentences"].append(f"Replacements of unreadable images: {self.replaced_images}; see {listing}")
        if timer.total_steps:
            images_per_s, waiting = timer.summary(config.batch_size)
            communicating = communication_s(self.model) * timer.total_steps / timer.total_s
            faster = "faster hardware" if session.bf16 else "hardware that computes in bf16"
            if not session.bf16 and computes_in_bf16(session.device):
                faster = "--precision auto"
            elif session.device.type == "cuda" and not config.compile:
                faster = "--compile"  # on CPUs it was slower in bf16 in every measurement
            decimals = 0 if images_per_s >= 10 else 1  # a large network on a CPU encodes a few images per second
            speed = f"{images_per_s:,.{decimals}f} images/s, {waiting:.1%} of the time waiting for data"
            summary["sentences"] += [speed, verdict(waiting, communicating, faster)]
            summary |= {"images_per_s": images_per_s, "data_wait_share": waiting, "train_s": timer.total_s}
        return summary

    def _command(self) -> str:
        """The command that continues this run."""
        arguments = sys.argv[:]
        for option in ("--out", "--resume"):
            while option in arguments:
                at = arguments.index(option)
                del arguments[at : at + 2]
            arguments = [argument for argument in arguments if not argument.startswith(f"{option}=")]
        ranks, cpu = self.session.world_size, self.session.device.type == "cpu"
        launcher = ["accelerate", "launch"]
        if ranks > 1:  # without --multi_gpu, the launcher starts one process where there is no GPU
            launcher = ["env", "ACCELERATE_USE_CPU=true"] * cpu + [*launcher, "--multi_gpu", f"--num_processes={ranks}"]
        command = shlex.join([*launcher, *arguments, "--out", str(self.session.out)])
        several_nodes = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) < ranks
        return command + (", with the launcher's options for several machines" if several_nodes else "")

    def _announce(self) -> None:
        """Print what the run is about to do."""
        if self.metrics is not None and self.metrics.damaged:
            self.session.print(f"{self.metrics.damaged} damaged rows of metrics.jsonl were dropped.")
        session, config, dropped = self.session, self.config, self.loader.sampler.dropped
        images = len(self.loader) * config.batch_size + dropped
        resumed = f"; resumes from {session.resume_from}" if session.resume_from else ""
        session.print(
            f"{images:,} images, batch {config.batch_size} ({dropped} left over each epoch), {self.total_steps:,} "
            f"steps on {session.world_size} x {session.device.type} in {'bf16' if session.bf16 else 'fp32'}, "
            f"views by {self.loader.backend_name}, encoder {self.about.get('timm_name')} "
            f"{self.about.get('timm_kwargs')}{resumed}"
        )

    def _restore(self, path: Any) -> None:
        """Load a checkpoint into model, optimizers, loader and counters."""
        session, loader, device = self.session, self.loader, self.session.device
        tensors, record = checkpoint.load(path)
        checkpoint.check_same_run(self.config, record["config"])
        if record["data"] != self._data():
            raise UserError(
                f"{path} was trained on other shards than {loader.shards.root}; use the same --data, unchanged, or "
                "start again with another --out."
            )
        if changed := [name for name, digest in self.inputs.items() if record["inputs"].get(name) != digest]:
            raise UserError(
                f"{' and '.join(changed)} changed since {path} was written; start a new run with another --out."
            )
        if record["bf16"] != session.bf16:
            before = "bf16" if record["bf16"] else "fp32"
            raise UserError(f"{path} was trained in {before}; resume it on such hardware or with --precision {before}.")
        checkpoint.load_state_tensors(tensors, self.module, self.optimizers, self.memory)
        self.means.load(record["metrics"], tensors["means"].to(device))
        self.guard.load(tensors["guard"].to(device))
        loader.load_state_dict(record["loader"])
        loader.bad_samples.replaced = record["replaced"] if session.is_main else 0  # rank 0 counts for all before
        self.global_step, self.results = record["step"], record["results"]

    def _save(self) -> None:
        """Write a checkpoint, unless a weight is not finite, so that the last good checkpoint survives."""
        session, loader = self.session, self.loader
        replaced = torch.tensor(loader.bad_samples.replaced, device=session.device)
        replaced, means = int(session.sum(replaced)), session.mean(self.means.sums)
        if session.is_main and self.guard.weights_are_finite():
            run_lock.check(session.out)
            tensors = checkpoint.state_tensors(self.module, self.optimizers, self.memory)
            tensors |= {"means": means.cpu(), "guard": self.guard.counts.cpu()}
            record = {"loader": loader.state_dict(), "results": self.results, "data": self._data()}
            record |= {"inputs": self.inputs, "bf16": session.bf16, "metrics": self.means.names}
            record |= {"replaced": replaced, "config": asdict(self.config)}
            Checkpoints(session.out / "checkpoints", self.config.checkpoint.keep).save(
                self.global_step, tensors, record
            )
        if self.stopping:  # who leaves early may end the job of rank 0, which still writes
            session.barrier()
        self.saved_at_s = time.monotonic()

    def _data(self) -> dict[str, Any]:
        """What the shards of a run are recognized by."""
        return {"samples": len(self.loader.shards), "shards": self.loader.shards.checksum}

    def _diverged(self, in_a_row: int, step: int) -> UserError:
        """The error of a run with too many non-finite gradients; lists the images of the last such step."""
        epoch, position = divmod(step - 1, len(self.loader))
        ranks = self.session.world_size
        parts = [self.loader.sampler.batch(epoch, position, rank, ranks) for rank in range(ranks)]
        samples = np.sort(np.concatenate(parts))
        keys = [key.decode(errors="replace") for key in self.loader.shards.index["key"][samples]]
        listing = self.session.out / "diverged.json"
        if self.session.is_main:
            listing.write_text(json.dumps({"step": step, "images": keys}, indent=1) + "\n")
        return UserError(
            f"The gradient was not finite in {in_a_row} consecutive steps, the last of them step {step} (images "
            f"{', '.join(keys[:3])} and more, listed in {listing}); lower --optim.lr, raise --optim.warmup-epochs or "
            "use --precision fp32, each with a new --out, or raise --max-skipped."
        )
