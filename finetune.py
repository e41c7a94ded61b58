"""Fine-tuning: a classifier from a pretrained encoder and few labels.

    accelerate launch finetune.py --start.run runs/NAME                     the built-in demonstration
    accelerate launch finetune.py --preset v2-1 --start.run runs/NAME       1 % of ImageNet's labels
    python finetune.py --help                                               every option

arXiv 2002.05709, appendix B.5, and arXiv 2006.10029, section 2. Without --start.run the same command trains the
supervised baseline from random weights.
"""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.nn.functional import cross_entropy

from common import UserError
from config import FinetuneConfig
from engine.loop import Instruments, TrainingLoop
from engine.optim import create_optimizer, parameter_groups
from engine.processes import ending_together
from engine.schedule import create_schedule
from engine.session import Session
from engine.trackers import view_sheet
from evaluation.classify import evaluate_classifier, labeled_test_samples
from evaluation.tables import report_table
from model import save_classifier, save_encoder, start_classifier, synchronize_batchnorm
from pipeline.data import open_data
from pipeline.loader import ViewLoader, center_crop_batches
from pipeline.loader.subsets import labeled_subset
from pipeline.pictures import to_pictures
from presets import FINETUNE, parse, pixels_of
from report import report_run


def finetune(config: FinetuneConfig, instruments: Instruments | None = None) -> None:
    """Train a classifier; write model.safetensors and encoder.safetensors into the run folder."""
    session = Session(config.precision, config.seed, config.compile, config.cuda_graph)
    config = session.from_rank_0(config)
    session.open_run(config.out, config.resume, name=f"finetune-{config.preset}", dry_run=config.dry_run)
    config = config.for_ranks(session.world_size)

    # Data: labeled images -> one augmented view each.
    train, test = open_data(config.data, config.loader)
    classes, channels = list(train.classes), train.pixel_format.channels
    if len(classes) < 2:
        raise UserError(f"Fine-tuning needs at least two classes, {train.root} has {len(classes)}; use another --data.")
    samples = labeled_subset(train, config.labels, config.seed)
    if config.start.run and train.pixel_format != (pixels := pixels_of(Path(config.start.run))):
        raise UserError(
            f"{config.start.run} was trained on other images ({pixels}) than those of {train.root} "
            f"({train.pixel_format}); use --data with images like the run's, or another --start.run."
        )
    classifier, spec = start_classifier(config.start, config.encoder, config.views.size, len(classes), channels)
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
        samples=samples,
        **reading,
    )

    # Model: view -> h, or a layer of the projection head -> logits.
    classifier = session.to_device(synchronize_batchnorm(classifier))
    model = session.distribute(classifier)

    # Optimization
    groups = parameter_groups([classifier.encoder, classifier.head], config.optim.weight_decay, classifier.fc)
    schedule = create_schedule(config.optim, config.batch_size, config.epochs, len(loader))
    optimizer = create_optimizer(config.optim, groups, schedule(0), session.dtype)

    # Evaluation: top-1 and top-5 on the test split, if it has labels of the same classes.
    batches = partial(center_crop_batches, test, config.views, config=config.loader, batch_size=256, **reading)
    tested = labeled_test_samples(test, classes)

    with TrainingLoop(
        session,
        config,
        model,
        loader,
        [optimizer],
        schedule,
        validate_every=config.validate_every if len(tested) else 0,
        collapse_loss=math.log(len(classes)),
        about={"timm_name": spec[0], "timm_kwargs": spec[1], "pixels": train.pixel_format._asdict()},
        draw_views=partial(view_sheet, draw=partial(to_pictures, pixel_format=train.pixel_format, augment=views)),
        instruments=instruments,
    ) as loop:
        if not len(tested):
            session.print("There is no labeled test split of the same classes next to the train split: no test scores.")
        for batch in loop:  # views (B, C, S, S), label (B,)
            with session.autocast():
                logits = model(batch.views)  # (B, classes)
            loss = cross_entropy(logits.float(), batch.label)
            loop.backward(loss)
            loop.step(loss=loss, train_top1=(logits.argmax(1) == batch.label).float().mean())
            if loop.validation_due:
                loop.log(**evaluate_classifier(classifier, batches, tested, session, config.loader.max_bad))
    if loop.stopped:
        return

    if session.is_main:
        save_classifier(classifier, spec, classes, session.out / "model.safetensors")
        save_encoder(classifier.encoder, spec, session.out / "encoder.safetensors")
    if len(tested):
        loop.add_result("finetune", **evaluate_classifier(classifier, batches, tested, session, config.loader.max_bad))
    loop.finish(report_table(loop.results) if loop.results else None)
    if config.report and session.is_main:
        report_run(session)


def main() -> None:
    with ending_together():
        finetune(parse(FINETUNE, sys.argv[1:], prog="finetune.py"))


if __name__ == "__main__":
    main()
