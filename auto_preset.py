"""The preset "auto": settings for a data set and a machine, each with the reason for it.

The rules are the functions `choose_pretraining` and `choose_classifier`, which depend on nothing but their arguments.
`read_facts` collects what they are based on. docs/settings.md explains them.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table

from common import UserError, available_cores
from config import DistillConfig, FinetuneConfig, PretrainConfig, StageConfig
from engine.session import computes_in_bf16
from pipeline.data import open_data
from pipeline.images.pixel_format import RGB8, PixelFormat
from pipeline.loader.resident import machine_memory
from pipeline.loader.subsets import keys_subset
from pipeline.shards.dataset import ShardSet

SMALL_PX = 64
"""Largest views that get the small stem and the augmentation of small images."""
CPU_TIME_S, LEAST_EPOCHS = 3600, 10
"""Time that a run on CPUs should take, unless so many epochs need more."""
CPU_CORE_GMACS = {True: 90, False: 55}
"""Multiply-adds of convolutions per second and core in 1e9, in bf16 and fp32: ResNet-18 on an EPYC (Zen 5)."""
NETWORKS = {  # of one view of 224 px, counted: GMAC of a forward pass, and MB in bf16 that autograd keeps of it
    "resnet10t": (0.89, 9.1),  # with the plain stem
    "resnet18": (1.81, 11.9),
    "resnet34": (3.66, 17.0),
    "resnet50": (4.09, 43.9),
    "resnet101": (7.80, 64.5),
    "resnet152": (11.51, 90.0),
}
PROGRESSIVE = ((0.5, 0.2), (0.625, 0.8), (0.75, 1.0))
"""Sizes of views on CPUs relative to the images, and the share of the epochs at which each ends (docs/training.md)."""
DEEP = ("resnet50", "resnet101", "resnet152")
"""Encoders that are trained as in the papers."""


class Rate(NamedTuple):
    """Learning rate and weight decay of an optimizer; AdamW's rate is divided by the width of the encoder."""

    scaling: str
    lr: float
    weight_decay: float
    why: str


PRETRAINING_RATES = {
    "lars": Rate("sqrt", 0.075, 1e-6, "as in the paper, better than linear below a batch of 2048 (table B.1)"),
    "adamw": Rate("none", 1.5e-3, 1e-4, "measured on CIFAR-10 and the textures"),
    "muon": Rate("none", 0.05, 0.01, "measured on CIFAR-10; it does not depend on the width"),
    "sgd": Rate("linear", 0.03, 5e-4, "as in the preset cifar10"),
    "nesterov": Rate("linear", 0.03, 5e-4, "that of SGD in the preset cifar10"),
}
FINETUNING_RATES = {
    "muon": Rate("none", 0.02, 1e-4, "as in the textures preset; it does not depend on the width"),
    "adamw": Rate("none", 7.5e-4, 1e-4, "measured on the textures"),
    "nesterov": Rate("linear", 0.05, 0.0, "as in the paper"),
    "sgd": Rate("linear", 0.05, 0.0, "that of Nesterov's momentum in the paper"),
    "lars": Rate("sqrt", 0.005, 0.0, "as in the preset v2-1"),
}
DISTILLATION_RATES = {
    "muon": FINETUNING_RATES["muon"],
    "adamw": Rate("none", 5e-4, 1e-4, "measured on the textures"),
    "lars": Rate("sqrt", 0.1, 1e-4, "as in the paper"),
}
PASSES = ((10_000, 1000), (100_000, 500), (1_000_000, 200), (math.inf, 100))
"""Epochs of pretraining for fewer than so many images, where time does not limit them; 100 as in arXiv 2002.05709."""
DATA, TIME = "data set", "expected time"
"""Rows of the table that are not options."""
OTHER_STUDENT = "as in --start.run"
"""Why a student's encoder stays, if it is not the teacher's."""
BLOCK = 4096
"""Rows of the index that are read at a time for the facts; large indexes are memory-mapped."""


@dataclass(frozen=True)
class Facts:
    """What the settings depend on."""

    images: int
    """Number of training images."""
    side_px: int
    """Median of the images' shorter sides."""
    megapixels: float
    """Median of the images' areas."""
    labeled: int
    """Number of training images with a label, or of those that --labels.keys lists."""
    classes: int
    device: str
    """"cuda" or "cpu"."""
    memory_gb: float
    """Memory of the smallest GPU, or of the host divided by its processes."""
    bf16: bool
    """Whether networks are computed in bf16."""
    cores: int = 1
    """CPU cores per process."""
    processes: int = 1
    pixels: PixelFormat = RGB8
    """Channels and bits of the images."""

    @property
    def machine(self) -> str:
        """Device and memory for a person."""
        one = f"{self.memory_gb:.0f} GB GPU" if self.device == "cuda" else f"{self.cores} CPU cores"
        return f"{self.processes} x {one}" if self.processes > 1 else one


def read_facts(config: StageConfig) -> Facts:
    """Facts about the train split of `config.data`, of which only the index is read, and about this machine.

    Raises:
        UserError: the data is missing, damaged or can't be converted, or --labels.keys does not fit it.
    """
    train, _ = open_data(config.data, config.loader)
    rows = spread_rows(train)
    height, width = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    labeled = round(float((rows["label"] >= 0).mean()) * len(train))
    if isinstance(config, FinetuneConfig) and config.labels.keys:
        labeled = len(keys_subset(train, Path(config.labels.keys)))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes"):
        device = torch.device("cuda")
        gpus = range(min(ranks_here, torch.cuda.device_count()))
        memory = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
    else:
        device = torch.device("cpu")
        memory = machine_memory() / ranks_here
    return Facts(
        images=len(train),
        side_px=int(np.median(np.minimum(height, width))),
        megapixels=float(np.median(height * width)) / 1e6,
        labeled=labeled,
        classes=len(train.classes),
        device=device.type,
        memory_gb=memory / 1e9,
        bf16=config.precision == "bf16" or (config.precision == "auto" and computes_in_bf16(device)),
        cores=available_cores(),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        pixels=train.pixel_format,
    )


def spread_rows(train: ShardSet) -> np.ndarray:
    """Rows of the index: all of a small set, else sixteen blocks spread over it, because it may be ordered by class."""
    if len(train) <= 16 * BLOCK:
        return train.index
    starts = np.linspace(0, len(train) - BLOCK, 16).astype(np.int64)
    return np.concatenate([train.index[start : start + BLOCK] for start in starts])


class Choices:
    """A configuration under construction: calling it chooses an option, unless the option is fixed.

    Args:
        config: configuration with the values of the fixed options.
        fixed: option -> why its value stays, such as {"views.size": "given"}.
    """

    def __init__(self, config: StageConfig, fixed: Mapping[str, str]):
        self.config, self.fixed, self.reasons = config, fixed, {}

    def __call__(self, option: str, value: Any, reason: str) -> Any:
        """Choose a value, and return the value that the run will have, on which later choices are based."""
        if option not in self.fixed:
            self.config = with_option(self.config, option, value)
        self.reasons[option] = self.fixed.get(option, reason)
        return attrgetter(option)(self.config)

    def result(self) -> Any:
        """The configuration with its reasons."""
        return replace(self.config, reasons=self.reasons)


def with_option(config: Any, option: str, value: Any) -> Any:
    """Copy of a configuration with another value of an option such as "views.size"."""
    part, _, rest = option.partition(".")
    return replace(config, **{part: with_option(getattr(config, part), rest, value) if rest else value})


# ---- the rules


def choose_pretraining(config: PretrainConfig, facts: Facts, fixed: Mapping[str, str]) -> PretrainConfig:
    """Settings of pretraining.

    Sources: arXiv 2002.05709 for ResNet-50 (augmentation, LARS, temperature, table B.1 on batch sizes and its appendix
    B.9 for small images); short runs on the textures and on CIFAR-10 for AdamW, temperature 0.2, grayscale 0.2 and
    crops from 0.2 of the area, and on CIFAR-10 for Muon, growing views and ResNet-10; arXiv 2203.03466 for a learning
    rate of Adam in inverse proportion to the width. Sizes, batches and times on GPUs are estimates.

    Args:
        config: configuration with the values of the fixed options.
        facts: images and machine.
        fixed: option -> why its value stays; the other choices respect it.
    """
    choose = Choices(config, fixed)
    gpu = facts.device == "cuda"
    describe_data(choose, facts)
    size = choose_view_size(choose, facts)
    small = size <= SMALL_PX
    limit, epochs = next((limit, epochs) for limit, epochs in PASSES if facts.images < limit)
    known = network(config.encoder.name) in NETWORKS
    shrinks = 32 <= size <= SMALL_PX and not gpu and known
    if shrinks:  # of as many epochs as are wanted; below, of as many as there is time for
        choose_size_schedule(choose, epochs)
    choose_encoder(choose, facts, epochs, max(epochs / 20, LEAST_EPOCHS), views=2)
    encoder = choose.config.encoder
    deep = network(encoder.name) in DEEP

    fits = images_that_fit(choose.config, facts, views=2)
    memory = f"{facts.memory_gb:.0f} GB hold an estimated {fits} images"
    if not gpu:
        many = small and facts.images >= 10_000
        largest, why = (256, "faster than 128 on CIFAR-10") if many else (128, "as measured on the textures")
    elif deep:
        largest, why = 1024, "0.3 points below 4096 in the paper (table B.1), with a fraction of the memory"
    else:
        largest, why = 512, "as commonly used for small images"
    least = 256 if gpu else 2  # below, --micro-batch is better than fewer negatives
    if largest > max(fits * facts.processes, least):
        largest, why = max(fits * facts.processes, least), memory
    if largest > facts.images / 20:
        largest, why = max(facts.images / 20, 2), "20 steps an epoch"
    batch = choose("batch_size", divisible(largest, facts.processes), why)
    if gpu and batch > fits * facts.processes:
        choose("micro_batch", max(fits // 8 * 8, 2), f"{memory}; the loss still sees the whole batch")
    why = "as in the paper" if epochs == 100 else f"fewer than {limit:,} images"
    epochs = choose_epochs(choose, facts, epochs, why, views=2)
    if shrinks:
        choose_size_schedule(choose, epochs)
    state_time(choose, facts, views=2)

    if small:
        choose("views.crop_area", (0.2, 1.0), "small images; used in all measurements on CIFAR-10 and the textures")
        choose("views.gray_p", 0.2, "as good as 0.1 on CIFAR-10, better on the textures")
        choose("views.jitter_strength", 0.5, "small images (paper, appendix B.9); better than 1 on CIFAR-10")
        choose("views.blur_p", 0.0, "small images, as in the paper (appendix B.9)")
    else:
        choose("views.crop_area", (0.08, 1.0), "as in the paper")
        choose("views.gray_p", 0.2, "as in the paper")
        choose("views.jitter_strength", 1.0, "as in the paper")
        choose("views.blur_p", 0.5, "as in the paper")
    if facts.pixels.channels != 3:
        choose("views.gray_p", 0.0, f"{facts.pixels}: no colors, so jitter changes brightness and contrast only")

    features = round((2048 if deep else 512) * encoder.width)
    choose("head.hidden", features, "width of the encoder's features" if known else "as for ResNet-18")
    choose("head.out", min(128, features // 2), "128 as in the paper, 64 for a quarter of ResNet-18's width")
    if deep:
        choose("loss.temperature", 0.1, "as in the paper")
        choose("optim.name", "lars", "as in the paper")
    else:
        choose("loss.temperature", 0.2, "used in all measurements on CIFAR-10 and the textures")
        short = small and not gpu
        why = "better than AdamW" if short else "better than the paper's LARS"
        choose("optim.name", "muon" if short else "adamw", f"{why} in short runs on CIFAR-10")
    choose_rate(choose, PRETRAINING_RATES)

    if facts.classes < 2 or not facts.labeled:
        choose("eval.knn_every", 0, "no two labeled classes")
        choose("eval.baselines", False, "no two labeled classes")
    else:
        many = facts.labeled >= 1000 * facts.classes
        choose("eval.k", 200 if many else 20, f"{'at least' if many else 'fewer than'} 1,000 labeled images per class")
        choose("eval.knn_every", max(choose.config.epochs // 10, 1), "ten times in the run")
    return choose.result()


def choose_classifier(config: FinetuneConfig, facts: Facts, fixed: Mapping[str, str]) -> FinetuneConfig:
    """Settings of fine-tuning and, for a `DistillConfig`, of distillation.

    Sources: the textures presets for Muon, those of earlier versions, at a quarter of ResNet-18's width, for AdamW;
    arXiv 2002.05709, appendix B.5, and 2006.10029, section 3, for ResNets of 50 layers and more.
    """
    choose = Choices(config, fixed)
    distills = isinstance(config, DistillConfig)
    describe_data(choose, facts)
    size = choose_view_size(choose, facts)
    small = size <= SMALL_PX
    choose("views.crop_area", (0.2, 1.0) if small else (0.08, 1.0), "small views" if small else "as in the paper")
    if distills:
        epochs = 50 if facts.images < 100_000 else 100
    else:
        images = facts.labeled
        if not config.labels.keys:
            images = round(images * choose("labels.fraction", 1.0, "all labels of the data set"))
        facts, epochs = replace(facts, images=max(images, 1)), 100 if images < 10_000 else 30
    images = facts.images  # to train on
    choose_encoder(choose, facts, epochs, max(epochs / 5, LEAST_EPOCHS), views=1)
    encoder = choose.config.encoder
    deep = network(encoder.name) in DEEP

    if images >= 10_000:
        largest, why = 256, "at least 10,000 images"
    else:
        largest, why = (128, "as in the textures preset") if distills else (64, "fewer than 10,000 images")
    fits = images_that_fit(choose.config, facts, views=1)
    if largest > fits * facts.processes:
        largest, why = fits * facts.processes, f"{facts.memory_gb:.0f} GB hold an estimated {fits} images"
    if largest > images / 4:
        largest, why = max(images / 4, 2), "four steps an epoch"
    choose("batch_size", divisible(largest, facts.processes), why)
    choose_epochs(choose, facts, epochs, f"{'at least' if images >= 10_000 else 'fewer than'} 10,000 images", views=1)
    state_time(choose, facts, views=1)

    if not deep:
        short = small and facts.device != "cuda"
        why = "better than AdamW on the textures" if short else "measured on the textures"
        choose("optim.name", "muon" if short else "adamw", why)
        choose("optim.warmup_epochs", 2 if distills else 3, "as in the textures preset")
    elif distills:
        choose("optim.name", "lars", "as in the paper")
        choose("optim.warmup_epochs", choose.config.epochs / 20, "5 % of the epochs, as in the paper")
    else:
        choose("optim.name", "nesterov", "as in the paper")
        choose("optim.warmup_epochs", 0, "as in the paper")
    choose_rate(choose, DISTILLATION_RATES if distills else FINETUNING_RATES)
    if distills:
        same = not {"given", OTHER_STUDENT} & {why for option, why in fixed.items() if option.startswith("encoder.")}
        why = "the teacher's architecture" if same else "an architecture other than the teacher's"
        choose("temperature", 0.1 if same else 1.0, f"{why}, as in the paper")
    choose("validate_every", max(choose.config.epochs // 5, 1), "five times in the run")
    return choose.result()


def describe_data(choose: Choices, facts: Facts) -> None:
    """State the facts in the first row of the table."""
    labels = f"labels: {facts.labeled:,}, classes: {facts.classes}"
    choose.reasons[DATA] = f"{facts.images:,} images of {facts.side_px} px ({facts.pixels}), {labels}; {facts.machine}"


def choose_view_size(choose: Choices, facts: Facts) -> int:
    """Side of a view: that of most images, at most what the device can train on."""
    largest, why = (224, "as in the paper") if facts.device == "cuda" else (96, "larger views take too long on a CPU")
    size = min(facts.side_px, largest)
    size = size // 32 * 32 if size > SMALL_PX else max(size // 8 * 8, 32)
    return choose("views.size", size, why if size == largest else f"the images have {facts.side_px} px")


def choose_encoder(choose: Choices, facts: Facts, epochs: int, least_epochs: float, views: int) -> None:
    """Encoder: by images and memory on a GPU; the largest that `CPU_TIME_S` allows for `least_epochs` on a CPU.

    Args:
        epochs: as many as are wanted.
        least_epochs: as many as an encoder must be trained for at least.
        views: number of views of an image.
    """
    if facts.device == "cuda":
        many, memory = facts.images >= 100_000 and choose.config.views.size > SMALL_PX, f"{facts.memory_gb:.0f} GB"
        if many and facts.memory_gb >= 12:
            choose("encoder.name", "resnet50", "at least 100,000 images above 64 px: the encoder of the paper")
        else:
            choose("encoder.name", "resnet18", f"for a GPU of {memory}" if many else "few or small images")
    else:
        choose("encoder.name", "resnet10t", "better than ResNet-18 in the same time on CIFAR-10 and the textures")
    if part := [option for option in ("encoder.name", "encoder.width", "encoder.stem") if option in choose.fixed]:
        for option in part:  # what is not given keeps its default, because it may not suit a given encoder
            choose(option, None, "")
    elif facts.device != "cuda":
        choose_width(choose, facts, epochs, least_epochs, views)


def choose_width(choose: Choices, facts: Facts, epochs: int, least_epochs: float, views: int) -> None:
    """The widest ResNet-10 that `CPU_TIME_S` allows for `least_epochs`; the last resort is the standard stem."""

    def seen(width: float, stem: str) -> float:
        encoder = replace(choose.config.encoder, width=width, stem=stem)
        return fitting_epochs(replace(choose.config, encoder=encoder, epochs=epochs), facts, views)

    networks = [(1.0, "auto"), (0.5, "auto"), (0.25, "auto")]
    networks += [(0.25, "standard")] if choose.config.views.size <= SMALL_PX else []
    *larger, smallest = networks
    width, stem = next((each for each in larger if seen(*each) >= least_epochs), smallest)
    why = f"the largest that sees each image {least_epochs:.0f} times in {rounded(CPU_TIME_S)}"
    choose("encoder.width", width, "the smallest" if (width, stem) == smallest else why)
    choose("encoder.stem", stem, "small for views of up to 64 px" if stem == "auto" else "the faster one")


def choose_size_schedule(choose: Choices, epochs: int) -> None:
    """Views that are smaller than the images and grow, see `PROGRESSIVE`."""
    schedule, before = [], 0
    for factor, end in PROGRESSIVE:
        until = round(end * epochs)
        schedule += [f"{round(factor * choose.config.views.size)}:{until - before}"] if until > before else []
        before = until
    choose("views.size_schedule", tuple(schedule), "faster on CIFAR-10, and more accurate by kNN")


def choose_rate(choose: Choices, rates: Mapping[str, Rate]) -> None:
    """Learning rate and weight decay of the optimizer, which may be fixed.

    Raises:
        UserError: there is no rate for this optimizer.
    """
    name, width = choose.config.optim.name, choose.config.encoder.width
    if name not in rates:
        if "optim.lr" not in choose.fixed:
            raise UserError(
                f"--preset auto has no learning rate for --optim.name {name} in this stage; set --optim.lr and "
                "--optim.scaling, too."
            )
        return
    scaling, lr, weight_decay, why = rates[name]
    choose("optim.scaling", scaling, why)
    if name == "adamw":
        choose("optim.lr", lr / width, f"{lr:g} / width; measured at a quarter of the width")
    else:
        choose("optim.lr", lr, why)
    if name == "muon":
        choose("optim.momentum", 0.95, "as in its source")
    choose("optim.weight_decay", weight_decay, why)


def choose_epochs(choose: Choices, facts: Facts, wanted: int, why: str, views: int) -> int:
    """Epochs; on a CPU at most as many as fit into `CPU_TIME_S`, but at least ten."""
    if facts.device != "cuda":
        fitting = int(fitting_epochs(replace(choose.config, epochs=wanted), facts, views))
        if LEAST_EPOCHS <= fitting < wanted:
            wanted, why = fitting, f"as many as take {rounded(CPU_TIME_S)} on this CPU"
        elif fitting < LEAST_EPOCHS < wanted:
            wanted, why = LEAST_EPOCHS, "the fewest that are worth training"
    return choose("epochs", wanted, why)


def state_time(choose: Choices, facts: Facts, views: int) -> None:
    """State the expected time in a row of the table."""
    if facts.device == "cuda":
        choose.reasons[TIME] = "not measured on a GPU yet; --dry-run measures it"
        return
    rate = images_per_s(choose.config, facts, views)
    time = f"about {rounded(choose.config.epochs * facts.images / rate)} of training at {rate:,.0f} images/s"
    choose.reasons[TIME] = f"{time}, estimated from an EPYC (Zen 5); --dry-run measures it"


def divisible(largest: float, processes: int) -> int:
    """Power of two up to `largest`, reduced to a multiple of `processes`."""
    return max(2 ** int(math.log2(largest)) // processes, 1) * processes


# ---- estimates


def network(name: str) -> str:
    """Name in `NETWORKS` of an encoder, if it is one of them: a ResNet-D costs hardly more than the plain ResNet."""
    return name.removesuffix("d")


def network_cost(config: StageConfig) -> tuple[float, float]:
    """GMAC of a forward pass, and MB that autograd keeps in bf16, of one view; ResNet-50's for encoders not listed."""
    encoder, size = config.encoder, config.views.size
    gmac, mb = NETWORKS.get(network(encoder.name), NETWORKS["resnet50"])
    pixels = (size / 224) ** 2
    if encoder.stem == "small" or (encoder.stem == "auto" and size <= SMALL_PX):
        pixels *= 16  # the small stem omits two halvings of both sides
    return gmac * pixels * encoder.width**2, mb * pixels * encoder.width


def images_that_fit(config: StageConfig, facts: Facts, views: int) -> int:
    """Images that a process can encode at a time, with room for as much again as autograd keeps."""
    _, mb = network_cost(config)
    mb *= 1 if facts.bf16 else 2
    free_gb = 0.9 * facts.memory_gb - 1 if facts.device == "cuda" else facts.memory_gb / 2
    return max(int(1000 * free_gb / (2 * views * mb)), 2)


def images_per_s(config: StageConfig, facts: Facts, views: int) -> float:
    """Training speed on all cores of a CPU, from rows of bench/results/train_step.csv and pipeline.csv."""
    gmac, _ = network_cost(config)
    scheduled = sum(epochs for _, epochs in config.views.phases)
    phases = [*config.views.phases, (config.views.size, max(config.epochs - scheduled, 0))]
    decode_ms = 0.1 + 6.5 * facts.megapixels
    ms = 0.0  # of an image on one core, over all epochs
    for size, epochs in phases:
        view_ms = 0.1 + 0.6 * (size / 224) ** 2
        passes = 3 * gmac * (size / config.views.size) ** 2  # a backward pass costs as much as two forward
        step_ms = 0.15 + 1000 * passes / CPU_CORE_GMACS[facts.bf16]
        ms += epochs * (decode_ms + views * (view_ms + step_ms))
    return 1000 * facts.cores * facts.processes * sum(epochs for _, epochs in phases) / ms


def rounded(seconds: float) -> str:
    """An estimated time, such as "8 min", "3.5 h" or "2.0 days"."""
    if seconds < 2 * 3600:
        return f"{max(math.ceil(seconds / 60), 1)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def fitting_epochs(config: StageConfig, facts: Facts, views: int) -> float:
    """Epochs that fit into `CPU_TIME_S`."""
    return CPU_TIME_S * images_per_s(config, facts, views) / facts.images


# ---- the table


def choices_table(config: StageConfig) -> Table:
    """Every choice of `config` with its value and reason, to be printed."""
    table = Table("option", "value", "reason", title="--preset auto", title_justify="left", box=box.SIMPLE)
    for option, reason in config.reasons.items():
        if option in (DATA, TIME):
            table.add_row(option, "", reason)
            continue
        value = attrgetter(option)(config)
        values = value if isinstance(value, tuple) else (value,)
        shown = " ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values)
        table.add_row("--" + option.replace("_", "-"), shown, reason)
    return table
