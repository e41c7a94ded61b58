"""Presets as plain functions, and the command line that starts from one of them."""

import argparse
import json
import os
import re
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from auto_preset import OTHER_STUDENT, choices_table, choose_classifier, choose_pretraining, read_facts
from common import UserError
from config import DistillConfig, FinetuneConfig, PretrainConfig, StageConfig
from engine import checkpoint
from engine.optim import OptimConfig
from evaluation.evaluator import EvalConfig
from loss import LossConfig
from model import EncoderConfig, HeadConfig, StartConfig
from options import as_arguments, nearest, option_names, parse_options
from pipeline.augment import AugmentConfig
from pipeline.images.pixel_format import PixelFormat
from pipeline.loader.subsets import LabelsConfig

NOT_REUSED = {"out", "resume", "config", "reasons", "timm_name", "timm_kwargs", "pixels"}
"""Entries of a config.json that belong to one run only, or are not options."""


def auto() -> PretrainConfig:
    """Settings chosen for the images and the machine; every run prints them with their reasons.

    Command: `accelerate launch train.py --data SHARDS`. Cost: on CPUs about an hour, or ten epochs; the run states the
    time that it expects. Accuracy: see docs/settings.md.
    """
    return PretrainConfig(preset="auto")


def textures() -> PretrainConfig:
    """Built-in textures on a laptop: ResNet-10 at a quarter of its width, standard stem, 32 px.

    Command: `accelerate launch train.py`. Cost: 44 s on two cores of an EPYC. Accuracy: 0.991 kNN, 0.999 linear
    (bench/results/demo.csv). Jitter has full strength, because otherwise the colors would identify an image more
    easily than its pattern.
    """
    return PretrainConfig(
        preset="textures",
        epochs=20,
        batch_size=128,
        views=AugmentConfig(size=32, crop_area=(0.2, 1.0), gray_p=0.3, blur_p=0.0, mean=(0.5,) * 3, std=(0.25,) * 3),
        encoder=EncoderConfig("resnet10t", stem="standard", width=0.25),
        head=HeadConfig("v1", hidden=128, out=64),
        loss=LossConfig(temperature=0.2),
        optim=OptimConfig("muon", lr=0.02, scaling="none", momentum=0.95, weight_decay=1e-4, warmup_epochs=2),
        eval=EvalConfig(knn_every=5, k=20),
    )


def cifar10() -> PretrainConfig:
    """CIFAR-10 by the best published recipe for small images (github.com/dkobak/simclr-cifar10): SGD, 1000 epochs.

    Command: `accelerate launch train.py --preset cifar10 --data CIFAR`. Cost and accuracy here: not measured. Published
    with this recipe and ResNet-18: 91.4 % kNN and 91.9 % linear after 1000 epochs, 90.0 % kNN after 500 (1 h 39 min on
    an A100), 83.2 % kNN after 100 with --optim.lr 0.06. Differences: batch norm in the head, whose layers have none
    there, and no decay of biases and normalization parameters.
    """
    return PretrainConfig(
        preset="cifar10",
        epochs=1000,
        batch_size=512,
        views=AugmentConfig(size=32, crop_area=(0.2, 1.0), jitter_strength=0.5, gray_p=0.1, blur_p=0.0),
        encoder=EncoderConfig("resnet18"),
        head=HeadConfig("v1", hidden=1024, out=128),
        loss=LossConfig(temperature=0.5),
        optim=OptimConfig("sgd", lr=0.03, scaling="linear", weight_decay=5e-4, warmup_epochs=0),
        eval=EvalConfig(knn_every=20, k=20),
    )


def cifar10_cpu() -> PretrainConfig:
    """CIFAR-10 in about an hour on two CPU cores: ResNet-10 at half of its width, views of 16, 20, then 24 px.

    Command: `accelerate launch train.py --preset cifar10-cpu --data CIFAR`. Cost: 57 minutes of training on two cores
    of an EPYC (Zen 5); on Zen 4, 49 epochs take an hour. Accuracy: 0.7575 kNN, 0.7665 linear
    (bench/results/presets.csv).
    """
    return PretrainConfig(
        preset="cifar10-cpu",
        epochs=80,
        batch_size=256,
        views=AugmentConfig(
            size=32,
            size_schedule=("16:16", "20:54", "24:10"),
            crop_area=(0.25, 1.0),
            jitter_strength=0.5,
            gray_p=0.1,
            blur_p=0.0,
        ),
        encoder=EncoderConfig("resnet10t", width=0.5),
        head=HeadConfig("v1", hidden=512, out=64),
        loss=LossConfig(temperature=0.2),
        optim=OptimConfig("muon", lr=0.05, scaling="none", momentum=0.95, weight_decay=0.01, warmup_epochs=3),
        eval=EvalConfig(knn_every=20, k=20),
    )


def stl10() -> PretrainConfig:
    """STL-10 at 96 px with ResNet-18 and AdamW, as small-scale SimCLR is usually run (github.com/sthalles/SimCLR).

    Command: `accelerate launch train.py --preset stl10 --data STL`. Cost and accuracy here: not measured. Published
    there, with Adam and a logistic regression: 74.45 % after 100 epochs.
    """
    return PretrainConfig(
        preset="stl10",
        epochs=200,
        batch_size=256,
        views=AugmentConfig(size=96),
        encoder=EncoderConfig("resnet18"),
        head=HeadConfig("v1", hidden=512, out=128),
        loss=LossConfig(temperature=0.07),
        optim=OptimConfig("adamw", lr=3e-4, scaling="none", weight_decay=1e-4, warmup_epochs=10),
        eval=EvalConfig(knn_every=20, k=20),
    )


def imagenet() -> PretrainConfig:
    """ImageNet as in arXiv 2002.05709: ResNet-50, batch 4096, LARS 4.8, 100 epochs.

    Command: `accelerate launch train.py --preset imagenet --data IMAGENET`, on as many GPUs as hold 4096 images at
    224 px. Cost and accuracy here: not measured. Published (table B.1): 64.6 % linear, 66.6 % after 200 epochs, 68.2 %
    after 400; with batch 256 and --optim.scaling sqrt --optim.lr 0.075, 62.8 % after 100.
    """
    return PretrainConfig(
        preset="imagenet",
        epochs=100,
        batch_size=4096,
        views=AugmentConfig(size=224),
        encoder=EncoderConfig("resnet50"),
        head=HeadConfig("v1", hidden=2048, out=128),
        loss=LossConfig(temperature=0.1),
        optim=OptimConfig("lars", lr=0.3, scaling="linear", weight_decay=1e-6, warmup_epochs=10),
        eval=EvalConfig(knn_every=10, k=200, baselines=False),
    )


def crop_and_flip(size: int, crop_area: tuple[float, float] = (0.08, 1.0)) -> AugmentConfig:
    """Augmentation of labeled images in both papers: crop and horizontal flip."""
    return AugmentConfig(size, crop_area, jitter_p=0.0, gray_p=0.0, blur_p=0.0)


def auto_fine_tune() -> FinetuneConfig:
    """Settings chosen for the labels and the machine, with the views and the encoder of the run to start from.

    Command: `accelerate launch finetune.py --start.run RUN`. Cost and accuracy: not measured.
    """
    return FinetuneConfig(preset="auto", views=crop_and_flip(224))


def fine_tune_textures() -> FinetuneConfig:
    """2 % of the labels of the built-in textures, eight per class.

    Command: `accelerate launch finetune.py --start.run RUN`. Accuracy: 0.898 top-1 (bench/results/demo_v2.csv).
    """
    start = textures()
    return FinetuneConfig(
        epochs=200,
        batch_size=16,
        views=replace(crop_and_flip(32, (0.2, 1.0)), mean=start.views.mean, std=start.views.std),
        optim=OptimConfig("muon", lr=0.02, scaling="none", momentum=0.95, weight_decay=1e-4, warmup_epochs=3),
        labels=LabelsConfig(0.02),
        encoder=start.encoder,
        validate_every=40,
    )


def fine_tune_v1(percent: int) -> FinetuneConfig:
    """ImageNet as in arXiv 2002.05709, appendix B.5: SGD with Nesterov momentum.

    Command: `accelerate launch finetune.py --preset v1-1 --start.run RUN`. Cost and accuracy: not measured; the paper
    reports 48.3 % (1 % of the labels) and 65.6 % (10 %) for ResNet-50 after 1000 epochs of pretraining.
    """
    return FinetuneConfig(
        preset=f"v1-{percent}",
        epochs={1: 60, 10: 30}[percent],
        batch_size=4096,
        views=crop_and_flip(224),
        optim=OptimConfig("nesterov", lr=0.05, scaling="linear", weight_decay=0.0, warmup_epochs=0),
        labels=LabelsConfig(percent / 100),
    )


def fine_tune_v2(percent: int) -> FinetuneConfig:
    """ImageNet as in arXiv 2006.10029, section 3: LARS, from the first layer of the head.

    Command: `accelerate launch finetune.py --preset v2-1 --start.run RUN`. Cost and accuracy: not measured; the paper
    reports 57.9 % (1 % of the labels) and 68.4 % (10 %) for ResNet-50.

    The learning rate is that of standard ResNets; for wider ones and for selective kernels the paper uses --optim.lr
    0.002. With all labels it fine-tunes from h: --labels.fraction 1 --start.from-layer 0, 30 epochs.
    """
    return FinetuneConfig(
        preset=f"v2-{percent}",
        epochs={1: 60, 10: 30}[percent],
        batch_size=1024,
        views=crop_and_flip(224),
        optim=OptimConfig("lars", lr=0.005, scaling="sqrt", weight_decay=0.0, warmup_epochs=0),
        start=StartConfig(from_layer=1),
        labels=LabelsConfig(percent / 100),
    )


def auto_distill() -> DistillConfig:
    """Settings chosen for the images and the machine; the student has the teacher's architecture.

    Command: `accelerate launch distill.py --teacher RUN`. Cost and accuracy: not measured.
    """
    return DistillConfig(preset="auto", views=crop_and_flip(224))


def distill_textures() -> DistillConfig:
    """All images of the built-in textures, without labels.

    Command: `accelerate launch distill.py --teacher RUN`. Accuracy: 0.926 top-1 (bench/results/demo_v2.csv).
    """
    start = fine_tune_textures()
    return DistillConfig(
        epochs=25,
        batch_size=128,
        temperature=0.1,
        views=start.views,
        optim=OptimConfig("muon", lr=0.02, scaling="none", momentum=0.95, weight_decay=1e-4, warmup_epochs=2),
        encoder=start.encoder,
        validate_every=10,
    )


def distill_v2() -> DistillConfig:
    """ImageNet with the schedule, decay and batch of pretraining in arXiv 2006.10029, section 3, for 400 epochs.

    Command: `accelerate launch distill.py --preset v2 --teacher RUN`. Cost and accuracy: not measured. The learning
    rate peaks at 6.4 after 5 % of the epochs. The temperature is that for a student smaller than its teacher; for one
    of the same size the paper uses --temperature 0.1.
    """
    return DistillConfig(
        preset="v2",
        epochs=400,
        batch_size=4096,
        views=crop_and_flip(224),
        optim=OptimConfig("lars", lr=0.1, scaling="sqrt", weight_decay=1e-4, warmup_epochs=20),
    )


PRETRAIN = {
    "auto": auto,
    "textures": textures,
    "cifar10": cifar10,
    "cifar10-cpu": cifar10_cpu,
    "stl10": stl10,
    "imagenet": imagenet,
}
FINETUNE = {
    "auto": auto_fine_tune,
    "textures": fine_tune_textures,
    "v1-1": partial(fine_tune_v1, 1),
    "v1-10": partial(fine_tune_v1, 10),
    "v2-1": partial(fine_tune_v2, 1),
    "v2-10": partial(fine_tune_v2, 10),
}
DISTILL = {"auto": auto_distill, "textures": distill_textures, "v2": distill_v2}


def parse(presets: dict[str, Callable[[], StageConfig]], arguments: list[str], prog: str) -> Any:
    """Read a command line: the preset or the configuration of another run, then the options that override it.

    A stage that starts from another run sees the same images: that run's --data and --views.size, mean and std are the
    defaults. The preset "auto", the default with --data, reads the index of the data to choose the other options; a run
    that continues keeps what was chosen at its start.

    Args:
        presets: name -> preset of the stage.
        arguments: what follows the script's name.
        prog: name of the script.

    Returns:
        The configuration, of the type that the presets return.

    Raises:
        UserError: unknown preset or option, a value that is out of range, or data that "auto" cannot read.
    """
    chosen = first_options(arguments)
    if chosen["config"] and chosen["preset"] is not None:
        raise UserError("--preset and --config both set every option; use one of them.")
    given, continued = dict.fromkeys(named_options(arguments), "given"), continued_run(chosen)
    if source := chosen["config"] or continued:
        other_data = chosen["data"] if chosen["config"] else ""
        remedy = "use another --config" if chosen["config"] else "choose another --out"
        arguments = [*config_arguments(Path(source), presets, prog, other_data, remedy), *arguments]
        chosen = first_options(arguments)
    default, inherited = default_options(presets, chosen)
    config = parse_options(default, arguments, prog, f"{type(default).__doc__}\n\n{describe(presets)}")
    config.check_complete()
    if continued:
        reasons = read_options(continued).get("reasons", {})
        config = replace(config, reasons=reasons | {name: given[name] for name in reasons if name in given})
    elif config.preset == "auto" and not source:
        choose = choose_pretraining if presets is PRETRAIN else choose_classifier
        config = choose(config, read_facts(config), inherited | given)
    if config.reasons and os.environ.get("RANK", "0") == "0":
        Console().print(choices_table(config))
    return config


def default_options(
    presets: dict[str, Callable[[], StageConfig]], chosen: dict[str, str | None]
) -> tuple[StageConfig, dict[str, str]]:
    """The preset with the images of the run to start from, and why the preset "auto" keeps some of its options."""
    before = "" if presets is PRETRAIN else chosen["teacher"] or chosen["start.run"]
    data, views = images_of(Path(before)) if before else ("", {})
    name = chosen["preset"]
    if name is None:
        name = "auto" if chosen["data"] or data else "textures"
    if name not in presets:
        raise UserError(f"There is no preset {name!r}{nearest(name, presets)}; use one of {', '.join(presets)}.")
    default = presets[name]()
    if not before:
        return default, {}
    default = replace(default, data=data, views=replace(default.views, **views))
    if name != "auto":
        return default, {}
    inherited = dict.fromkeys(["views.size", "views.mean", "views.std"], "as in the run to start from")
    encoder = encoder_of(Path(chosen["start.run"] or before))
    why = "as in the run to start from" if encoder == encoder_of(Path(before)) else OTHER_STUDENT
    return replace(default, encoder=encoder), inherited | dict.fromkeys(["encoder.name", "encoder.width"], why)


def first_options(arguments: list[str]) -> dict[str, str | None]:
    """Options that decide about the defaults of all others."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    defaults = {"preset": None, "config": "", "teacher": "", "start.run": "", "data": "", "out": "", "resume": "auto"}
    for option, default in defaults.items():
        first.add_argument(f"--{option}", default=default, nargs="?", const="")
    return vars(first.parse_known_args(arguments)[0])


def named_options(arguments: list[str]) -> list[str]:
    """Options that a command line sets, as in "views.size"."""
    names = (argument.partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--"))
    return [re.sub(r"(^|\.)no_", r"\1", name.removeprefix("__")) for name in names]


def continued_run(chosen: dict[str, str | None]) -> Path | None:
    """Options of the run that this command continues, if the preset "auto" chose them and no other preset is set.

    Raises:
        UserError: --resume names something other than a run or a checkpoint.
    """
    out, resume = chosen["out"], chosen["resume"]
    if chosen["preset"] not in (None, "auto") or chosen["config"] or resume in ("", "none"):
        return None
    if resume != "auto":
        file = checkpoint.find(Path(resume)) / "record.json"
    elif out:
        file = Path(out) / "config.json"
        if checkpoint.Checkpoints(Path(out) / "checkpoints", keep=1).latest() is None:
            return None  # it starts again, perhaps on other images
    else:
        return None
    return file if read_options(file).get("preset") == "auto" else None


def read_options(file: Path) -> dict[str, Any]:
    """Options in the config.json of a run or in the record.json of a checkpoint; empty if it holds none."""
    try:
        record = json.loads(file.read_text())
        return dict(record["config"] if file.name == "record.json" else record)
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def config_arguments(
    path: Path,
    presets: dict[str, Callable[[], StageConfig]],
    prog: str,
    data: str | None = "",
    remedy: str = "use another --config",
) -> list[str]:
    """Command line with the options of another run of the same stage.

    Args:
        path: run folder, its config.json, or the record.json of a checkpoint.
        presets, prog: see `parse`.
        data: --data on the command line, if any. Other images than the run's are not normalized by what was measured on
            those of the run.
        remedy: end of an error message.

    Raises:
        UserError: the file can't be read, or belongs to another stage or version.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        record = json.loads(path.read_text())
        record = record["config"] if path.name == "record.json" else record
        stored = {name: value for name, value in record.items() if name not in NOT_REUSED}
        if stored["preset"] not in presets:
            raise KeyError("preset")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or repr(error)
        raise UserError(f"{path} is not the configuration of a run of {prog} ({reason}); {remedy}.") from error
    known = set(option_names(asdict(presets[stored["preset"]]())))
    if foreign := [name for name in option_names(stored) if name not in known]:
        raise UserError(f"{path} belongs to another script or version: {prog} has no option {foreign[0]}; {remedy}.")
    if data and data != stored.get("data") and "views" in stored:
        stored["views"] = {name: value for name, value in stored["views"].items() if name not in ("mean", "std")}
    return as_arguments(stored)


def describe(presets: dict[str, Callable[[], StageConfig]]) -> str:
    """Presets for --help, with what each is for, what it costs and what it reached."""
    names: dict[str, list[str]] = {}
    for name, preset in presets.items():
        names.setdefault(getattr(preset, "func", preset).__doc__, []).append(name)
    wrapped = textwrap.TextWrapper(
        shutil.get_terminal_size().columns, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
    )
    lines = [wrapped.fill(f"{', '.join(each)}: {' '.join(doc.split())}") for doc, each in names.items()]
    return "\n".join(["Presets:", *lines])


def images_of(run: Path) -> tuple[str, dict[str, Any]]:
    """--data of a run, and size, mean and std of its views.

    Raises:
        UserError: it is not the folder of a run.
    """
    try:
        record = json.loads((run / "config.json").read_text())
        data, views = record["data"], record["views"]
        return data, {"size": views["size"], "mean": tuple(views["mean"]), "std": tuple(views["std"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{run} is not the folder of a run ({reason}); use the folder that a run ended with."
        ) from error


def pixels_of(run: Path) -> PixelFormat:
    """Format of the images of a run; 8-bit RGB in runs of versions that knew no others."""
    return PixelFormat(**read_options(run / "config.json").get("pixels", {}))


def encoder_of(run: Path) -> EncoderConfig:
    """Encoder of a run, which the options of a fine-tuning need not state.

    Raises:
        UserError: its config.json does not name one.
    """
    try:
        record = json.loads((run / "config.json").read_text())
        name, kwargs = record["timm_name"].removeprefix("simclr_"), record["timm_kwargs"]
        stem = "small" if kwargs.get("small_stem") else "standard"
        return EncoderConfig(name, stem, kwargs.get("width", 1.0), kwargs.get("selective_kernels", False))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{run} is not the folder of a run that names its encoder ({error!r}); use another, or --preset."
        ) from error
