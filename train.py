"""SimCLR pretraining (arXiv 2002.05709): an encoder from unlabeled images in shards.

    accelerate launch train.py                                          the built-in demonstration
    accelerate launch train.py --preset imagenet --data /data/imagenet  a real run
    python train.py --help                                              every option

`pretrain` is the whole program: the parts, then the loop. finetune.py and distill.py have the same shape.
"""

import math
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from config import PretrainConfig
from engine.grad_cache import cached_backward
from engine.loop import Instruments, TrainingLoop
from engine.optim import create_optimizer, parameter_groups
from engine.processes import ending_together
from engine.schedule import create_schedule
from engine.session import Session
from engine.trackers import view_sheet
from evaluation.evaluator import Evaluator
from evaluation.features import raw_pixels
from evaluation.tables import report_table
from loss import Temperature, create_queue, nt_xent_and_append
from model import (
    SimCLR,
    create_encoder,
    encoder_spec,
    feature_dim,
    projection_head,
    save_encoder,
    save_head,
    synchronize_batchnorm,
)
from pipeline.data import open_data
from pipeline.loader import ViewLoader, center_crop_batches
from pipeline.pictures import to_pictures
from presets import PRETRAIN, parse
from report import report_run


def pretrain(config: PretrainConfig, instruments: Instruments | None = None) -> None:
    """Train an encoder and a projection head; write encoder.safetensors and head.safetensors into the run folder."""
    session = Session(config.precision, config.seed, config.compile, config.cuda_graph)
    config = session.from_rank_0(config)
    session.open_run(config.out, config.resume, name=config.preset, dry_run=config.dry_run)
    config = config.for_ranks(session.world_size)
    config.loss.check_device(session.device, session.dtype)

    # Encoder: built first, because a wrong option should be refused before data is fetched or rendered.
    spec = encoder_spec(config.encoder, config.views.size)
    encoder = create_encoder(spec)
    features = feature_dim(encoder, config.views.size)
    config.views.check_epochs(config.epochs)
    for size, _ in config.views.phases:
        feature_dim(encoder, size, option="--views.size-schedule")

    # Data: shards -> two augmented views of every image, on the device.
    train, test = open_data(config.data, config.loader)
    views = session.from_rank_0(config.views.for_images(train.pixel_format, train.manifest.get("statistics", {})))
    config = replace(config, views=views)
    reading = {"device": session.device, "dtype": session.dtype, "bad_samples_file": session.out / "bad_samples.jsonl"}
    loader = ViewLoader(
        train,
        views.full_size if config.dry_run else views,  # what the run costs at most
        config.loader,
        batch_size=config.batch_size,
        seed=config.seed,
        epochs=config.epochs,
        rank=session.rank,
        world_size=session.world_size,
        **reading,
    )

    # Model: views -> h -> z, and a linear probe on detached h. The temperature of the loss may be a parameter.
    if (channels := train.pixel_format.channels) != 3:
        spec = encoder_spec(config.encoder, config.views.size, channels)
        encoder = create_encoder(spec)
    head = projection_head(config.head, features)
    simclr = SimCLR(encoder, head, features, classes=len(train.classes))
    simclr.temperature = Temperature(config.loss)
    simclr = session.to_device(synchronize_batchnorm(simclr), view_sizes=1 + len(views.phases))
    model = session.distribute(simclr)
    queue = create_queue(config.loss.queue, config.head.out, config.epochs * len(loader), session.device)

    # Optimization: the probe has an optimizer of its own, so that the encoder's settings do not change the yardstick.
    groups = parameter_groups([simclr.encoder, simclr.head], config.optim.weight_decay)
    schedule = create_schedule(config.optim, config.batch_size, config.epochs, len(loader))
    optimizers = [create_optimizer(config.optim, groups, schedule(0), session.dtype)]
    if simclr.probe is not None:
        optimizers.append(torch.optim.AdamW(simclr.probe.parameters(), 1e-3, fused=True))
    if config.loss.learn_temperature:
        optimizers.append(simclr.temperature.optimizer())

    # Evaluation: kNN and a linear classifier on frozen features, where both splits have labels.
    evaluate = None
    labeled = [(split, np.flatnonzero(split.index["label"] >= 0)) for split in (train, test) if split is not None]
    if len(labeled) == 2 and all(len(samples) for _, samples in labeled):
        batches = partial(center_crop_batches, augment=config.views, config=config.loader, batch_size=256, **reading)
        evaluate = Evaluator(*labeled, batches, session, config.eval, config.loader.max_bad)

    def forward_features(views: Tensor) -> Tensor:
        """(B, C, S, S) -> h (B, features), in evaluation mode."""
        simclr.eval()
        with session.autocast():
            h = simclr.encoder(views)
        simclr.train()
        return h

    contrast = partial(nt_xent_and_append, impl=config.loss.impl, decoupled=config.loss.decoupled, queue=queue)
    with TrainingLoop(
        session,
        config,
        model,
        loader,
        optimizers,
        schedule,
        validate_every=config.eval.knn_every if evaluate else 0,
        # all candidates are equally similar: 2B - 1, or 2B - 2 without the positive, and those of a full queue
        collapse_loss=math.log(2 * config.batch_size - 1 - config.loss.decoupled + config.loss.queue),
        memory=queue,
        about={"timm_name": spec[0], "timm_kwargs": spec[1], "pixels": train.pixel_format._asdict()},
        draw_views=partial(view_sheet, draw=partial(to_pictures, pixel_format=train.pixel_format, augment=views)),
        instruments=instruments,
    ) as loop:
        if evaluate is None:
            session.print("There is no labeled test split next to the train split, so there are no kNN scores.")
        elif config.eval.baselines and loop.global_step == 0 and not config.dry_run:
            loop.add_result("raw pixels", **evaluate(raw_pixels))
            loop.add_result("untrained", **evaluate(forward_features))

        for batch in loop:  # views (2B, C, S, S), label (B,)
            temperature = simclr.temperature()  # a number, or () if it is learned
            contrast_with = partial(contrast, sample=session.copy_to_device(batch.index) if queue else None)
            probe = partial(probe_objective, label=batch.label)
            if 0 < config.micro_batch < len(batch.label):
                loss, top1 = cached_backward(
                    session, model, batch.views, config.micro_batch, contrast_with, probe, temperature, mark=loop.mark
                )
            else:
                with session.autocast():
                    z, logits = model(batch.views)  # (2B, out), (2B, classes)
                loss = contrast_with(z, temperature)
                probe_loss, *top1 = probe(logits)
                loop.backward(loss + probe_loss)
            learned = {"temperature": temperature} if config.loss.learn_temperature else {}
            loop.step(loss=loss, probe_top1=tuple(top1), **learned)
            z = logits = loss = probe_loss = None  # their graph may not live on when --cuda-graph records another size
            if loop.validation_due:
                loop.log(**evaluate(forward_features, linear=False))
    if loop.stopped:
        return

    if session.is_main:  # the encoder first: nothing after this is worth a lost run
        save_encoder(simclr.encoder, spec, session.out / "encoder.safetensors")
        save_head(simclr.head, session.out / "head.safetensors")
    if evaluate:
        loop.add_result("trained", **evaluate(forward_features))
    loop.finish(report_table(loop.results) if loop.results else None)
    if config.report and session.is_main:
        report_run(session)


def probe_objective(
    logits: Tensor | None, part: slice = slice(None), *, label: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and accuracy of the online probe, as sums over some views divided by all views of the batch.

    Slices of a batch add up to the batch, and the mean over ranks is that of the global batch, however the labels are
    distributed over them.

    Args:
        logits: (2b, classes), both views of b images; None without a probe.
        part: the b images of the batch that the logits belong to.
        label: (B,) int64 of this rank's batch; -1 for unlabeled images, which are ignored.

    Returns:
        Cross-entropy (), share of views whose label is the most likely class (), share of labeled views ().
    """
    if logits is None:
        return (torch.zeros((), device=label.device),) * 3
    views, label = 2 * len(label), label[part].repeat(2)  # (2b,)
    loss = cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum")
    return loss / views, (logits.argmax(1) == label).sum() / views, (label >= 0).sum() / views


def main() -> None:
    with ending_together():
        pretrain(parse(PRETRAIN, sys.argv[1:], prog="train.py"))


if __name__ == "__main__":
    main()
