"""StreamCLR: train a SimCLR encoder from shards, fine-tune it on few labels, distil it into a student.

    accelerate launch train.py                                          the built-in demonstration
    accelerate launch train.py --preset imagenet --data /data/imagenet  a real run
    accelerate launch train.py finetune --start.run runs/NAME           a classifier from its encoder
    accelerate launch train.py distill --teacher runs/NAME              a student from the classifier
    python train.py [finetune|distill] --help                           every option

Read `pretrain` from top to bottom, then `fit`: the parts, one loop, the report. `finetune` and `distill` go through the
same loop. What surrounds it (run folder, checkpoints, loaders) is in run.py.
"""

import contextlib
import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common import UserError
from config import Common, Config, Distill, FineTune, Labels
from engine import checkpoint
from engine.grad_cache import cached_backward, equal_slices
from engine.metrics import MetricsFile, RunningMeans, StepTimer, communication_s, verdict
from engine.nonfinite import CollapseWatch
from engine.optim import create_optimizer, parameter_groups
from engine.processes import ending_together
from evaluation.classify import classification
from evaluation.features import raw_pixels
from evaluation.report import Evaluator, report_table
from loss import distillation, labeled_cross_entropy, nt_xent
from model import (
    Classifier,
    SimCLR,
    create_encoder,
    encoder_spec,
    feature_dim,
    fine_tuned,
    load_classifier,
    load_encoder,
    load_head,
    projection_head,
    read_spec,
    save_classifier,
    save_encoder,
    save_head,
)
from pipeline.loader.loader import Batch, ViewLoader, center_crop_batches
from pipeline.loader.subsets import keys_subset, label_subset
from pipeline.shards.dataset import ShardSet
from presets import images_of, parse
from run import (
    Run,
    State,
    Task,
    begin,
    console,
    digest_of,
    diverged,
    finish,
    open_data,
    open_folder,
    progress_bar,
    restore,
    save,
    schedule,
    to_device,
    view_loader,
)


def pretrain(config: Config) -> None:
    """SimCLR, from shards to `encoder.safetensors`."""
    run = begin(config, config.preset)
    accelerator = run.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes
    check_slices(config, world_size)

    # ---- encoder: before the data, which may have to be fetched or rendered first
    spec = encoder_spec(image_size=config.views.size, **dataclasses.asdict(config.encoder))
    encoder = create_encoder(spec)
    width = feature_dim(encoder, config.views.size)

    # ---- data: shards -> two views of every image
    config, train, test, loading = open_data(run, config)
    loader = view_loader(run, config, train, loading)

    # ---- model: views -> h -> z
    head = projection_head(config.head.version, width, config.head.hidden, config.head.out)
    simclr = to_device(run, config, SimCLR(encoder, head, width, classes=len(train.classes)))

    # ---- optimization
    groups = parameter_groups([simclr.encoder, simclr.head], config.optim.weight_decay)
    learning_rate = schedule(config, len(loader))
    optimizers = [create_optimizer(config.optim.name, groups, learning_rate(0), config.optim.momentum)]
    if simclr.probe is not None:  # it has its own, so that no setting of the encoder's touches the yardstick
        optimizers.append(torch.optim.AdamW(simclr.probe.parameters(), 1e-3, fused=True))

    def encode(views: Tensor, through: nn.Module) -> tuple[Tensor, Tensor | None]:
        with run.autocast():
            return through(views)  # (2B, out), (2B, classes)

    def forward_backward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        contrast = partial(nt_xent, temperature=config.loss.temperature, impl=config.loss.impl)
        images = len(batch.label)
        if not 0 < config.micro_batch < images:
            z, scores = encode(batch.views, model)
            loss = contrast(z)
            probe_loss, *probe = probe_objective(scores, batch.label, images)
            accelerator.backward(loss + probe_loss)
            return loss, *probe
        probes = []

        def probe_loss_of(scores: Tensor | None, part: slice) -> Tensor:
            loss, *probe = probe_objective(scores, batch.label[part], images)
            probes.append(torch.stack(probe))
            return loss

        loss = cached_backward(
            lambda views: encode(views, model if torch.is_grad_enabled() else simclr),
            simclr,
            batch.views,
            config.micro_batch,
            contrast,
            probe_loss_of,
            no_sync=lambda: accelerator.no_sync(model),
        )
        return loss, *sum(probes)

    # ---- evaluation on frozen features, before, during and after
    evaluate = None
    labeled = [(split, np.flatnonzero(split.index["label"] >= 0)) for split in (train, test) if split is not None]
    if len(labeled) == 2 and all(len(samples) for _, samples in labeled):
        evaluate = Evaluator(
            *labeled,
            lambda split, samples: center_crop_batches(split, config.views, samples, batch_size=256, **loading),
            accelerator.gather,
            rank,
            world_size,
            config.eval.k,
            config.eval.max_bank,
        )

    def forward_features(views: Tensor) -> Tensor:
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
        forward_backward,
        figures=("loss", "probe_top1", "probe_labeled"),
        collapse_loss=math.log(2 * config.batch_size - 1),
        validate=evaluate and (lambda: evaluate(forward_features, linear=False)),
        validate_every=config.eval.knn_every,
    )
    state = restore(run, config, task)
    if len(state.means.sums) != len(task.figures) + 2:  # of version 1, whose open row lacked the labeled share
        state.means = RunningMeans((*task.figures, "gradient_norm"), accelerator.device)
    metrics = open_folder(run, config, task, state, {"timm_name": spec[0], "timm_kwargs": spec[1]})
    if evaluate is None and accelerator.is_main_process:
        console.print("There is no labeled test split beside the train split, so no kNN and no table.")
    if evaluate and config.eval.baselines and not state.step:  # later it is untrained no more
        state.report = {"raw pixels": evaluate(raw_pixels), "untrained": evaluate(forward_features)}

    summary = fit(run, config, task, state, metrics)
    if summary is None:  # asked to stop
        return

    # ---- what came out; the encoder first, since nothing after it is worth a lost run
    if accelerator.is_main_process:
        save_encoder(simclr.encoder, spec, run.out / "encoder.safetensors")
        save_head(simclr.head, run.out / "head.safetensors")
    if evaluate:
        state.report["trained"] = evaluate(forward_features)
    if accelerator.is_main_process:
        for name, scores in state.report.items():
            metrics.write(step=state.step if name == "trained" else 0, features=name, **scores)
        if state.report:
            console.print(report_table(state.report))
        finish(run, metrics, summary)


def check_slices(config: Config, world_size: int) -> None:
    """Refuse slices of one image: batch norm over its two views alone turns them into opposites, z1 = -z2."""
    images = config.batch_size // world_size  # of this process
    if not 0 < config.micro_batch < images:
        return
    slices = equal_slices(images, config.micro_batch)
    if world_size * min(part.stop - part.start for part in slices) < 2:
        raise UserError(
            f"--micro-batch {config.micro_batch} encodes an image of the batch of {config.batch_size} alone, and batch "
            f"norm needs more than one: use --micro-batch {min(3, images)} or more."
        )


def probe_objective(scores: Tensor | None, label: Tensor, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the online probe and its top-1, as sums over some views divided by all views of the process's batch.

    Slices of a batch add up to the batch, and the mean over ranks is that of the global batch, however the labels are
    distributed over them: dividing by the number of labeled views of each would weigh those of a rank that has few of
    them more.

    Args:
        scores: (2b, classes), both views of b images; None without a probe.
        label: (b,) int64; images with -1, unlabeled ones, are left out.
        images: B, how many the process's whole batch has.

    Returns:
        cross-entropy (), views whose label is the most likely class (), and views that have a label ().
    """
    if scores is None:
        nothing = torch.zeros((), device=label.device)
        return nothing, nothing, nothing
    label = label.repeat(2)  # (2b,)
    loss = cross_entropy(scores.float(), label, ignore_index=-1, reduction="sum")
    correct, labeled = (scores.argmax(1) == label).sum(), (label >= 0).sum()
    return loss / (2 * images), correct / (2 * images), labeled / (2 * images)


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
    clock, collapse, saved_at, replaced, leaving = (
        StepTimer(),
        CollapseWatch(task.collapse_loss),
        time.monotonic(),
        0,
        False,
    )
    progress = progress_bar(total_steps, accelerator.is_main_process)
    with progress as advance, checkpoint.StopSignal() as stop, contextlib.summary(loader):
        while not leaving and state.step < total_steps:
            epoch = state.step // len(loader)
            for batch in clock.watch(loader):
                torch.manual_seed((config.seed << 32) + state.step * world_size + rank)  # of dropout: nothing to save
                lr = task.learning_rate(state.step)
                for group in optimizers[0].param_groups:
                    group["lr"] = lr
                guard.before_forward()
                figures = task.forward_backward(model, batch)
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
                    sums = torch.cat([means.take(loader.bad_samples.replaced, stop.received, late), guard.counts])
                    *averages, replaced, stopped, late, _, longest, skipped, last = accelerator.reduce(
                        sums, "mean"
                    ).tolist()
                    loader.bad_samples.check(round(replaced * world_size), epoch)  # on all ranks alike
                    if longest > config.max_skipped:
                        raise diverged(run, task, round(longest), round(last))
                    row = {"step": state.step, "epoch": epoch + 1, "lr": lr}
                    row |= dict(zip((*task.figures, "gradient_norm"), averages, strict=True))
                    if "probe_labeled" in row:  # top-1 of the labeled views, null if there were none
                        labeled = row.pop("probe_labeled")
                        row["probe_top1"] = row["probe_top1"] / labeled if labeled else math.nan
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
            if leaving:  # who asked may not wait for the scores
                save(run, config, task, state)
            if due and state.step < total_steps:
                scores = task.validate()
                if accelerator.is_main_process:
                    metrics.write(step=state.step, epoch=epoch + 1, **scores)
                    shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
                    console.print(f"epoch {epoch + 1}: loss {row['loss']:.3f}, {shown}")
                clock.pause()
            save(run, config, task, state)
            saved_at = time.monotonic()
    if leaving and state.step < total_steps:
        if accelerator.is_main_process:
            metrics.close()
            console.print(
                f"Stopped after step {state.step} of {total_steps}: the same command with --out {run.out}"
                f"{'' if config.resume == 'auto' else ' --resume auto'} goes on."
            )
        return None
    if not guard.is_sound():  # within the last --max-skipped steps, or by the last one
        raise UserError(
            "The weights are not finite at the end of the run, so no encoder is written; use a lower --optim.lr, "
            "longer --optim.warmup-epochs or --precision fp32, and a new --out."
        )
    summary = []
    if replaced:
        summary.append(
            f"{round(replaced * world_size)} times another image took a bad one's place: {run.out}/bad_samples.jsonl"
        )
    if clock.total_steps:
        images_per_s, waiting = clock.summary(config.batch_size)
        communicating = communication_s(model) * clock.total_steps / clock.total_s
        faster = "faster hardware" if run.bf16 else "bf16 on hardware that computes in it"
        if accelerator.device.type == "cuda" and not config.compile:
            faster = "--compile"  # on CPUs it was slower in bf16 wherever it was tried
        decimals = 0 if images_per_s >= 10 else 1  # a large network on a CPU encodes a few
        summary.append(f"{images_per_s:,.{decimals}f} images/s, {waiting:.1%} of the time waiting for data")
        summary.append(verdict(waiting, communicating, faster))
    return summary


def finetune(config: FineTune) -> None:
    """A classifier on labeled images: a pretrained encoder, some layers of its head, and a new linear layer."""
    run = begin(config, f"finetune-{config.preset}")
    config, train, test, loading = open_data(run, config)
    if len(train.classes) < 2:
        raise UserError(
            f"Fine-tuning needs two classes or more, but {train.root} has {len(train.classes)}: use another --data."
        )
    samples = labeled_samples(config.labels, config.seed, train)
    loader = view_loader(run, config, train, loading, samples=samples, views_per_image=1)
    classifier, spec = classifier_from(config, len(train.classes))
    classifier = to_device(run, config, classifier)

    def forward_backward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with run.autocast():
            logits = model(batch.views)  # (B, classes)
        loss = cross_entropy(logits.float(), batch.label)
        run.accelerator.backward(loss)
        return loss, (logits.argmax(1) == batch.label).float().mean()

    figures, classes = ("loss", "train_top1"), list(train.classes)
    collapse_loss = math.log(len(classes))
    train_classifier(
        run, config, classifier, spec, classes, loader, test, loading, forward_backward, figures, collapse_loss
    )


def distill(config: Distill) -> None:
    """A student that learns from a teacher's probabilities, on all images, and from the labels of some if wanted."""
    run = begin(config, f"distill-{config.preset}")
    for option, value in images_of(Path(config.teacher))[1].items():
        # the student could learn other inputs, the frozen teacher would only be wrong about them
        if option != "size" and tuple(getattr(config.views, option)) != value:
            raise UserError(
                f"The teacher in {config.teacher} was trained with --views.{option} {' '.join(map(str, value))}: use "
                "the same."
            )
    weights = Path(config.teacher) / "model.safetensors"
    teacher, classes = load_classifier(weights)
    feature_dim(teacher.encoder, config.views.size)  # can it take these views?
    config, train, test, loading = open_data(run, config)
    loader = view_loader(run, config, train, loading, views_per_image=1)
    teacher = teacher.eval().requires_grad_(False).to(run.accelerator.device, memory_format=torch.channels_last)
    student, spec = classifier_from(config, len(classes))
    student = to_device(run, config, student)
    used = np.zeros(len(train), dtype=bool)  # whose labels may be looked at
    if config.labeled_share:
        if list(train.classes) != classes:
            raise UserError(f"The classes of {train.root} are not those of the teacher: leave out --labeled-share.")
        used[labeled_samples(config.labels, config.seed, train)] = True
    used = torch.from_numpy(used)

    def forward_backward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with run.autocast():
            with torch.no_grad():
                taught = teacher(batch.views)  # (B, classes), of the very views that the student sees
            logits = model(batch.views)
        loss = (1 - config.labeled_share) * distillation(logits, taught, config.temperature)
        if config.labeled_share:
            known = used[batch.index]  # on the host, as the index is
            known = (known.pin_memory() if batch.label.is_cuda else known).to(batch.label.device, non_blocking=True)
            loss = loss + config.labeled_share * labeled_cross_entropy(logits, batch.label.where(known, -1))
        run.accelerator.backward(loss)
        return loss, (logits.argmax(1) == taught.argmax(1)).float().mean()

    inputs = {"--teacher": digest_of(weights), "--labels": hashlib.sha256(used.numpy().tobytes()).hexdigest()}
    train_classifier(
        run,
        config,
        student,
        spec,
        classes,
        loader,
        test,
        loading,
        forward_backward,
        figures=("loss", "agreement"),
        collapse_loss=math.nan,  # a teacher that is unsure teaches just that
        others={"teacher": teacher},
        inputs=inputs,
    )


def classifier_from(config: FineTune | Distill, classes: int) -> tuple[Classifier, tuple[str, dict]]:
    """(classifier in training mode, spec of its encoder) of what the configuration begins with."""
    size, start = config.views.size, config.start
    if not start.run:
        spec = encoder_spec(image_size=size, **dataclasses.asdict(config.encoder))
        encoder, head = create_encoder(spec), None
    else:
        file = Path(start.run) / "encoder.safetensors"
        spec, encoder = read_spec(file), load_encoder(file)
        head = load_head(Path(start.run) / "head.safetensors") if start.from_layer else None
    return fine_tuned(encoder, head, start.from_layer, feature_dim(encoder, size), classes), spec


def labeled_samples(labels: Labels, seed: int, train: ShardSet) -> np.ndarray:
    """(n,) int64, ascending: the samples whose labels are used."""
    if labels.keys:
        samples = keys_subset(train, Path(labels.keys))
        if bare := int((train.index["label"][samples] < 0).sum()):
            raise UserError(f"{labels.keys} names {bare} images of {train.root} that have no label: leave them out.")
        return samples
    return label_subset(train.index["label"], labels.fraction, seed)


def train_classifier(
    run: Run,
    config: FineTune | Distill,
    classifier: Classifier,
    spec: tuple[str, dict],
    classes: list[str],
    loader: ViewLoader,
    test: ShardSet | None,
    loading: dict,
    forward_backward: Callable[[nn.Module, Batch], tuple[Tensor, ...]],
    figures: tuple[str, ...],
    collapse_loss: float,
    others: dict[str, Classifier] | None = None,
    inputs: dict[str, str] | None = None,
) -> None:
    """What fine-tuning and distillation share: optimizer, loop, scores on the test split, `model.safetensors`.

    Args:
        chance, inputs: see `Task`.
        others: classifiers to be scored beside it, by the name of their row.
    """
    accelerator, others = run.accelerator, others or {}
    groups = parameter_groups([classifier.encoder, classifier.head], config.optim.weight_decay)
    # as the official code has it, the new layer decays and does not adapt
    groups.append({"params": [classifier.fc.weight], "weight_decay": config.optim.weight_decay, "adapt": False})
    groups.append({"params": [classifier.fc.bias], "weight_decay": 0.0, "adapt": False})
    learning_rate = schedule(config, len(loader))
    optimizer = create_optimizer(config.optim.name, groups, learning_rate(0), config.optim.momentum)

    def score(target: Classifier) -> dict[str, float]:
        training = target.training
        target.eval()
        with run.autocast():
            found = classification(
                target,
                lambda samples: center_crop_batches(test, config.views, samples, batch_size=256, **loading),
                np.flatnonzero(test.index["label"] >= 0),
                accelerator.gather,
                accelerator.process_index,
                accelerator.num_processes,
            )
        target.train(training)
        return found

    known = test is not None and list(test.classes) == classes and bool((test.index["label"] >= 0).any())
    task = Task(
        classifier,
        loader,
        [optimizer],
        learning_rate,
        forward_backward,
        figures,
        collapse_loss=collapse_loss,
        validate=(lambda: score(classifier)) if known else None,
        validate_every=config.validate_every,
        inputs=inputs or {},
    )
    state = restore(run, config, task)
    metrics = open_folder(run, config, task, state, {"timm_name": spec[0], "timm_kwargs": spec[1]})
    if not known and accelerator.is_main_process:
        console.print("There is no labeled test split of the same classes beside the train split, so no scores.")
    if known and not state.report:
        state.report = {name: score(other) for name, other in others.items()}
    summary = fit(run, config, task, state, metrics)
    if summary is None:
        return
    if accelerator.is_main_process:
        save_classifier(classifier, spec, classes, run.out / "model.safetensors")
        save_encoder(classifier.encoder, spec, run.out / "encoder.safetensors")
    if known:
        state.report[type(config).__name__.lower()] = score(classifier)
    if accelerator.is_main_process:
        for name, scores in state.report.items():
            metrics.write(step=0 if name in others else state.step, features=name, **scores)
        if state.report:
            console.print(report_table(state.report))
        finish(run, metrics, summary)


def main() -> None:
    with ending_together():
        config = parse(sys.argv[1:])
        try:
            {Config: pretrain, FineTune: finetune, Distill: distill}[type(config)](config)
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            sliced = ", a --micro-batch of fewer images" if isinstance(config, Config) else ""
            raise UserError(
                f"Out of memory ({' '.join(str(error).split())[:200]}); use a smaller --batch-size{sliced}, smaller "
                "views, or a smaller encoder or head."
            ) from error


def ran_out_of_memory(error: Exception) -> bool:
    """Whether the host or a device had no memory left; torch has no type of its own for the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


if __name__ == "__main__":
    main()
