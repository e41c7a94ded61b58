"""What a run is: dataclasses for the options of every stage, and which values can't work."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import tyro

from common import UserError
from pipeline.augment.config import AugmentConfig


@dataclass(frozen=True)
class Data:
    backend: Literal["auto", "dali", "kornia", "opencv"] = "auto"
    """Who makes the views. auto: DALI on CUDA (Kornia where DALI is missing), OpenCV threads on a CPU."""
    workers: int = 0
    """Host threads per process for reading and augmenting; 0 for this process's share of the cores."""
    prefetch: int = 2
    """Batches prepared ahead of the training step."""
    max_bad: float = 0.01
    """Share of the images that may be unreadable and be replaced by others before the run stops."""
    node_groups: int = 1
    """Groups of nodes, each of which reads its own part of the shards in an epoch; for remote data and many nodes."""
    cache_gb: float = 50
    """Disk space for shards of a remote --data, in $STREAMCLR_CACHE or ~/.cache/streamclr, shared by all ranks."""


@dataclass(frozen=True)
class Encoder:
    name: str = "resnet50"
    """Any timm model."""
    stem: Literal["auto", "small", "standard"] = "auto"
    """Of a ResNet. small: 3x3, stride 1, no max-pool. auto: small for views of 64 px or less. standard: 7x7 (three 3x3
    with selective kernels), stride 2, max-pool."""
    width: float = 1.0
    """Multiplies all channel counts of a ResNet."""
    selective_kernels: bool = False
    """SimCLR v2's blocks in a ResNet of 50 layers or more, and with them ResNet-D's stem and shortcuts."""


@dataclass(frozen=True)
class Head:
    version: Literal["v1", "v2"] = "v1"
    """v1: two layers (arXiv 2002.05709). v2: three (arXiv 2006.10029)."""
    hidden: int = 2048
    """Width between the layers."""
    out: int = 128
    """Width of z."""


@dataclass(frozen=True)
class Loss:
    temperature: float = 0.1
    """The tau of NT-Xent."""
    impl: Literal["auto", "triton", "blockwise", "reference"] = "auto"
    """Which implementation. auto: triton on NVIDIA GPUs that can run it, blockwise elsewhere."""


@dataclass(frozen=True)
class Optim:
    name: Literal["lars", "sgd", "nesterov", "adamw"] = "lars"
    lr: float = 0.3
    """Base learning rate: times B / 256 if linear, times sqrt(B) if sqrt, as it is if none."""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    momentum: float = 0.9
    """Of LARS and SGD; AdamW's first beta."""
    weight_decay: float = 1e-6
    """Not for biases and normalization parameters."""
    warmup_epochs: float = 10
    """Linear warm-up, of at most a tenth of the run; then a cosine to 0."""


@dataclass(frozen=True)
class Evaluation:
    knn_every: int = 10
    """Epochs between kNN evaluations; 0 for the end only."""
    k: int = 20
    """Neighbors that vote."""
    max_bank: int = 50_000
    """At most so many training images serve as neighbors and train the final linear probe."""
    baselines: bool = True
    """Also evaluate raw pixels and the untrained encoder."""


@dataclass(frozen=True)
class Checkpointing:
    every_steps: int = 0
    """Steps between checkpoints, besides those at the end of every epoch; 0 for none."""
    every_minutes: float = 10
    """Minutes between checkpoints, looked at when a metrics row is written; 0 for none."""
    keep: int = 3
    """So many are kept; older ones are deleted."""


@dataclass(frozen=True)
class Common:
    """What every kind of run has."""

    data: str = ""
    """Shards: a folder or URL with train/ (and test/ or val/), or one shard set. The textures preset makes its own."""
    out: str = ""
    """Run folder; default runs/<preset>-<time>, after the stage's name if that is not pretraining."""
    resume: str = "auto"
    """auto: go on where --out stopped, if it did. none: --out must be new. Else a run folder or a checkpoint."""
    epochs: int = 100
    """Times that every image is seen."""
    batch_size: int = 4096
    """Global batch in images, over all processes."""
    seed: int = 0
    """Of initial weights, order and views."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware computes in it."""
    compile: bool = False
    """Let torch.compile fuse the networks; the first steps take minutes."""
    max_skipped: int = 5
    """Steps in a row that may be skipped because a gradient is not finite; one more stops the run."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    loading: Annotated[Data, tyro.conf.arg(name="data")] = field(default_factory=Data)
    views: AugmentConfig = field(default_factory=AugmentConfig)
    optim: Optim = field(default_factory=Optim)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)


@dataclass(frozen=True)
class Config(Common):
    """Train a SimCLR encoder on shards. A preset sets every option; what is given beside it wins."""

    preset: str = "textures"
    """textures (needs no data), cifar10, stl10 or imagenet."""
    micro_batch: int = 0
    """Images that a process encodes at a time, for batches larger than memory; 0 for all. Twice the forward passes."""
    encoder: Encoder = field(default_factory=Encoder)
    head: Head = field(default_factory=Head)
    loss: Loss = field(default_factory=Loss)
    eval: Evaluation = field(default_factory=Evaluation)


@dataclass(frozen=True)
class Labels:
    """Which images are used with their labels."""

    fraction: float = 1.0
    """Share of the labeled images, as many of every class, drawn by --seed; 0.01 is part of 0.1."""
    keys: str = ""
    """A file that names the images instead, a line each, such as SimCLR's own lists of 1 % and 10 % of ImageNet."""


@dataclass(frozen=True)
class Start:
    """What the weights begin with."""

    run: str = ""
    """Run folder of a finished pretraining; empty for random weights."""
    from_layer: int = 0
    """Layers of its projection head to be kept below the new one: 0 goes on from h; SimCLR v2 keeps 1."""


@dataclass(frozen=True)
class FineTune(Common):
    """Train a classifier on few labels, from a pretrained encoder or, as a baseline, from random weights."""

    preset: str = "textures"
    """textures (needs no data), or the papers' for ImageNet: v1-1, v1-10, v2-1, v2-10 (percent of the labels)."""
    start: Start = field(default_factory=Start)
    labels: Labels = field(default_factory=Labels)
    encoder: Encoder = field(default_factory=Encoder)
    """Of random weights; a pretrained one is what it is."""
    validate_every: int = 10
    """Epochs between scores on the test split; 0 for the end only."""


@dataclass(frozen=True)
class Distill(Common):
    """Train a student to say what a fine-tuned teacher says, on images that need no labels."""

    preset: str = "textures"
    """textures (needs no data) or v2."""
    teacher: str = ""
    """Run folder of a fine-tuning or a distillation."""
    temperature: float = 1.0
    """The tau of both softmaxes: 0.1 for a student as large as its teacher, 1 for a smaller one."""
    labeled_share: float = 0.0
    """Weight of the cross-entropy with the labels of --labels; the teacher has the rest."""
    start: Start = field(default_factory=Start)
    labels: Labels = field(default_factory=Labels)
    encoder: Encoder = field(default_factory=Encoder)
    """The student's, if it begins with random weights."""
    validate_every: int = 10
    """Epochs between scores on the test split; 0 for the end only."""


def check_same_run(config: Config, begun: dict[str, Any]) -> None:
    """Refuse to go on with a run under other options than it was begun with, but for those that change no result.

    Args:
        config: what is asked for.
        begun: `dataclasses.asdict` of the configuration in the checkpoint.

    Raises:
        UserError: names every option that differs, with both values.
    """
    free = {"out", "resume", "data", "log_every", "loading", "eval", "checkpoint", "validate_every", "max_skipped"}
    free |= {"precision", "teacher"}  # the checkpoint holds what they led to: bf16 or not, the teacher's checksum
    now = json.loads(json.dumps(asdict(config)))  # tuples become lists, as in the file
    differing = [
        f"--{name.replace('_', '-')} {before} (now {after})"
        for part in sorted((now.keys() | begun.keys()) - free)
        for name, before, after in _differences(part, begun.get(part), now.get(part))
    ]
    if differing:
        raise UserError(
            f"The run was started with {', '.join(differing)}; use the same values, or start again with another --out."
        )


def _differences(name: str, before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            difference
            for part in sorted(before.keys() | after.keys())
            for difference in _differences(f"{name}.{part}", before.get(part), after.get(part))
        ]
    return [] if before == after else [(name, before, after)]


MANY = 10**9
"""Larger than any count that makes sense, and small enough for every library that it reaches."""
LIMITS: dict[str, tuple[float, float]] = {
    "epochs": (1, MANY),
    "batch_size": (2, MANY),
    "seed": (0, 2**32 - 1),
    "micro_batch": (0, MANY),
    "max_skipped": (0, MANY),
    "log_every": (1, MANY),
    "validate_every": (0, MANY),
    "temperature": (0.001, 1000),
    "labeled_share": (0, 1),
    "loading.workers": (0, 1024),
    "loading.prefetch": (1, 1024),
    "loading.max_bad": (0, 1),
    "loading.node_groups": (1, MANY),
    "loading.cache_gb": (0, MANY),
    "views.size": (8, 8192),
    "encoder.width": (0.05, 32),
    "head.hidden": (1, 2**17),
    "head.out": (1, 2**17),
    "loss.temperature": (0.001, 1000),
    "start.from_layer": (0, MANY),
    "optim.lr": (0, 1e30),
    "optim.momentum": (0, 0.9999),
    "optim.weight_decay": (0, 1000),
    "optim.warmup_epochs": (0, MANY),
    "eval.knn_every": (0, MANY),
    "eval.k": (1, MANY),
    "eval.max_bank": (1, MANY),
    "checkpoint.every_steps": (0, MANY),
    "checkpoint.every_minutes": (0, MANY),
    "checkpoint.keep": (1, MANY),
}
"""Smallest and largest value of every number that an option takes; nan and infinity lie outside all of them."""


def flag(field: str) -> str:
    """The option that sets a field: "loading.max_bad" -> "--loader.max-bad"."""
    return "--" + field.replace("_", "-").replace("loading.", "data.")


def check_values(config: Config | FineTune | Distill) -> None:
    """Refuse values that would fail later, where the cause is no longer plain."""
    for name, (smallest, largest) in LIMITS.items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, smallest)  # not every stage has every option
        if not value >= smallest:
            raise UserError(f"{flag(name)} is {value}; it must be at least {smallest}.")
        if value > largest:
            raise UserError(f"{flag(name)} is {value}; it must be at most {largest}.")
    if not config.resume:
        raise UserError("--resume is empty; use auto, none, or the path of a run folder or checkpoint.")
    if config.optim.name == "nesterov" and not config.optim.momentum:
        raise UserError("--optim.momentum is 0.0; it must be above 0 for nesterov.")
    if not all(0 < std < math.inf for std in config.views.std):
        raise UserError(f"--views.std is {' '.join(map(str, config.views.std))}; use three numbers above 0.")
    low, high = config.views.crop_area
    if not 0 < low <= high <= 1:
        raise UserError(
            f"--views.crop-area is {low} {high}; use two fractions of the image, 0 < smallest <= largest <= 1."
        )
    if config.preset != "textures" and not config.data:
        raise UserError(
            f"--preset {config.preset} needs shards; use --data with a set made by `python -m pipeline.convert`."
        )
    if isinstance(config, FineTune | Distill) and not 0 < config.labels.fraction <= 1:
        raise UserError(f"--labels.fraction is {config.labels.fraction}; use a fraction above 0 and at most 1.")
    if isinstance(config, FineTune | Distill) and config.start.from_layer and not config.start.run:
        raise UserError(
            f"--start.from-layer is {config.start.from_layer}, but random weights have no projection head; use "
            "--start.run or --start.from-layer 0."
        )
    if isinstance(config, Distill) and not config.teacher:
        raise UserError("There is no teacher; use --teacher with the run folder of a fine-tuning.")
    if isinstance(config, Distill) and not config.labeled_share and config.labels != Labels():
        raise UserError("--labels are set but --labeled-share is 0, so they would not be used; set it above 0.")
