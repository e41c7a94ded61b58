"""Distillation: a student that learns a fine-tuned teacher's probabilities on images without labels.

    accelerate launch distill.py --teacher runs/NAME                        the built-in demonstration
    accelerate launch distill.py --preset v2 --teacher runs/NAME            as in the paper
    python distill.py --help                                                every option

arXiv 2006.10029, section 2, equations 2 and 3.
"""

import hashlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import UserError, file_sha256
from config import DistillConfig
from engine.loop import Instruments, TrainingLoop
from engine.optim import create_optimizer, parameter_groups
from engine.processes import ending_together
from engine.schedule import create_schedule
from engine.session import Session
from engine.trackers import view_sheet
from evaluation.classify import evaluate_classifier, labeled_test_samples
from evaluation.tables import report_table
from loss import distillation, labeled_cross_entropy
from model import (
    feature_dim,
    load_classifier,
    save_classifier,
    save_encoder,
    start_classifier,
    synchronize_batchnorm,
)
from pipeline.data import open_data
from pipeline.loader import ViewLoader, center_crop_batches
from pipeline.loader.subsets import labeled_subset
from pipeline.pictures import to_pictures
from presets import DISTILL, images_of, parse, pixels_of
from report import report_run


def distill(config: DistillConfig, instruments: Instruments | None = None) -> None:
    """Train a student; write model.safetensors and encoder.safetensors into the run folder."""
    session = Session(config.precision, config.seed, config.compile, config.cuda_graph)
    config = session.from_rank_0(config)
    session.open_run(config.out, config.resume, name=f"distill-{config.preset}", dry_run=config.dry_run)
    config = config.for_ranks(session.world_size)

    # Teacher: frozen and in evaluation mode, on the images it was trained on.
    check_normalization(config)
    weights = Path(config.teacher) / "model.safetensors"
    teacher, classes = load_classifier(weights)
    pixels = pixels_of(Path(config.teacher))
    feature_dim(teacher.encoder, config.views.size, pixels.channels)  # refuses a view size that the teacher cannot take
    teacher = teacher.eval().requires_grad_(False).to(session.device, memory_format=torch.channels_last)

    # Data: all images -> one augmented view each, and which of their labels may be used.
    train, test = open_data(config.data, config.loader)
    if train.pixel_format != pixels:
        raise UserError(
            f"The teacher in {config.teacher} was trained on other images ({pixels}) than those of {train.root} "
            f"({train.pixel_format}); use --data with images like the teacher's."
        )
    views = session.from_rank_0(config.views.for_images(train.pixel_format, train.manifest.get("statistics", {})))
    config = replace(config, views=views)
    reading = {"device": session.device, "dtype": session.dtype, "bad_samples_file": session.out / "bad_samples.jsonl"}
    loader = ViewLoader(
        train,
        config.views,
        config.loader,
        batch_size=config.batch_size,
        seed=config.seed,
        epochs=config.epochs,
        rank=session.rank,
        world_size=session.world_size,
        views_per_image=1,
        **reading,
    )
    uses_label = np.zeros(len(train), dtype=bool)
    if config.labeled_share:
        if list(train.classes) != classes:
            raise UserError(f"The classes of {train.root} are not the teacher's; omit --labeled-share.")
        uses_label[labeled_subset(train, config.labels, config.seed)] = True
    uses_label = torch.from_numpy(uses_label)

    # Student
    student, spec = start_classifier(config.start, config.encoder, config.views.size, len(classes), pixels.channels)
    student = session.to_device(synchronize_batchnorm(student))
    model = session.distribute(student)

    # Optimization
    groups = parameter_groups([student.encoder, student.head], config.optim.weight_decay, student.fc)
    schedule = create_schedule(config.optim, config.batch_size, config.epochs, len(loader))
    optimizer = create_optimizer(config.optim, groups, schedule(0), session.dtype)

    # Evaluation: top-1 and top-5 on the test split, if it has labels of the same classes.
    batches = partial(center_crop_batches, test, config.views, config=config.loader, batch_size=256, **reading)
    tested = labeled_test_samples(test, classes)

    used_labels = hashlib.sha256(uses_label.numpy().tobytes()).hexdigest()
    with TrainingLoop(
        session,
        config,
        model,
        loader,
        [optimizer],
        schedule,
        validate_every=config.validate_every if len(tested) else 0,
        inputs={"--teacher": file_sha256(weights), "--labels": used_labels},
        about={"timm_name": spec[0], "timm_kwargs": spec[1], "pixels": train.pixel_format._asdict()},
        draw_views=partial(view_sheet, draw=partial(to_pictures, pixel_format=train.pixel_format, augment=views)),
        instruments=instruments,
    ) as loop:
        if not len(tested):
            session.print("There is no labeled test split of the same classes next to the train split: no test scores.")
        elif not loop.results and not config.dry_run:
            loop.add_result("teacher", **evaluate_classifier(teacher, batches, tested, session, config.loader.max_bad))
        for batch in loop:  # views (B, C, S, S), label (B,), index (B,)
            with session.autocast():
                with torch.no_grad():
                    target = teacher(batch.views)  # (B, classes), for the views that the student sees
                logits = model(batch.views)  # (B, classes)
            loss = (1 - config.labeled_share) * distillation(logits, target, config.temperature)
            if config.labeled_share:
                label = batch.label.where(session.copy_to_device(uses_label[batch.index]), -1)
                loss = loss + config.labeled_share * labeled_cross_entropy(logits, label)
            loop.backward(loss)
            loop.step(loss=loss, agreement=(logits.argmax(1) == target.argmax(1)).float().mean())
            if loop.validation_due:
                loop.log(**evaluate_classifier(student, batches, tested, session, config.loader.max_bad))
    if loop.stopped:
        return

    if session.is_main:
        save_classifier(student, spec, classes, session.out / "model.safetensors")
        save_encoder(student.encoder, spec, session.out / "encoder.safetensors")
    if len(tested):
        loop.add_result("distill", **evaluate_classifier(student, batches, tested, session, config.loader.max_bad))
    loop.finish(report_table(loop.results) if loop.results else None)
    if config.report and session.is_main:
        report_run(session)


def check_normalization(config: DistillConfig) -> None:
    """Refuse a normalization other than the teacher's, because the frozen teacher would classify such views wrongly.

    A single number stands for all channels.
    """
    for name, value in images_of(Path(config.teacher))[1].items():
        if name != "size" and (own := getattr(config.views, name)) != value and (own or ()) * len(value) != value:
            shown = " ".join(map(str, value))
            raise UserError(f"The teacher in {config.teacher} was trained with --views.{name} {shown}; use the same.")


def main() -> None:
    with ending_together():
        distill(parse(DISTILL, sys.argv[1:], prog="distill.py"))


if __name__ == "__main__":
    main()
