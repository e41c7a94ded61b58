"""Options of every stage: one dataclass per script, composed of the parts' own configurations.

Each part validates itself; a stage validates what depends on several of its parts.
"""

from dataclasses import dataclass, field, replace
from typing import Self

from common import UserError, check_range
from engine.checkpoint import MAY_CHANGE
from engine.grad_cache import check_micro_batch
from engine.loop import MANY, LoopConfig
from evaluation.evaluator import EvalConfig
from loss.ntxent import LossConfig
from model import EncoderConfig, HeadConfig, StartConfig
from pipeline.augment.config import AugmentConfig
from pipeline.loader.config import LoaderConfig
from pipeline.loader.subsets import LabelsConfig

try:
    from tyro.conf import Fixed, Suppress

    Hidden = Suppress[Fixed[dict]]
except ModuleNotFoundError:  # configurations that are built in Python do not need it
    Hidden = dict


@dataclass(frozen=True)
class StageConfig(LoopConfig):
    """Options that every stage has."""

    preset: str = "textures"
    """Settings to start from; an unknown name prints the list. Default: auto with --data, else textures."""
    config: str = field(default="", metadata=MAY_CHANGE)
    """Run folder, or its config.json, whose options to use in place of a preset's, except --out and --resume."""
    data: str = field(default="", metadata=MAY_CHANGE)
    """Images (a folder, zip or tar, in class folders or not), or shards (a folder or URL); textures renders its own."""
    loader: LoaderConfig = field(default_factory=LoaderConfig, metadata=MAY_CHANGE)
    views: AugmentConfig = field(default_factory=AugmentConfig)
    reasons: Hidden = field(default_factory=dict, metadata=MAY_CHANGE)
    """Not an option: why the auto preset chose each value, by option."""

    def check_complete(self) -> None:
        """Check what a preset leaves open; called once the command line has been read.

        Raises:
            UserError: a required option is missing, or options contradict each other.
        """
        if self.preset != "textures" and not self.data:
            raise UserError(f"--preset {self.preset} needs --data: shards written by `python -m pipeline.convert`.")

    def for_ranks(self, world_size: int) -> Self:
        """The configuration on `world_size` ranks: without --data, the batch is made divisible by them.

        The demonstration must run on any number of processes; for other data the loader refuses such a batch.
        """
        if self.data:
            return self
        return replace(self, batch_size=max(self.batch_size // world_size, 1) * world_size)


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """Train a SimCLR encoder on shards. A preset sets every option; options on the command line override it."""

    micro_batch: int = 0
    """Most images that a process encodes at a time, for batches larger than memory (one more forward pass); 0: all."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--micro-batch", self.micro_batch, 0, MANY)
        if self.cuda_graph and 0 < self.micro_batch < self.batch_size:
            raise UserError(
                f"--cuda-graph captures one forward and backward pass per step, but --micro-batch {self.micro_batch} "
                "takes several; omit one of the two options."
            )

    def for_ranks(self, world_size: int) -> Self:
        """As for every stage; a --micro-batch that encodes an image alone is refused."""
        config = super().for_ranks(world_size)
        check_micro_batch(config.micro_batch, config.batch_size, world_size)
        return config


@dataclass(frozen=True)
class FinetuneConfig(StageConfig):
    """Train a classifier on few labels, from a pretrained encoder or, as a baseline, from random weights."""

    start: StartConfig = field(default_factory=StartConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Architecture when training from scratch; ignored with --start.run."""
    validate_every: int = field(default=10, metadata=MAY_CHANGE)
    """Epochs between evaluations on the test split; 0 for the end only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--validate-every", self.validate_every, 0, MANY)
        if self.views.size_schedule:
            raise UserError("--views.size-schedule is for pretraining (train.py) only; omit the option.")

    def check_complete(self) -> None:
        super().check_complete()
        if self.start.from_layer and not self.start.run:
            raise UserError(
                f"--start.from-layer is {self.start.from_layer}, but random weights have no projection head; use "
                "--start.run or --start.from-layer 0."
            )


@dataclass(frozen=True)
class DistillConfig(FinetuneConfig):
    """Train a student to predict a fine-tuned teacher's probabilities, on images that need no labels."""

    teacher: str = field(default="", metadata=MAY_CHANGE)  # its weights are compared by their checksum
    """Run folder of a fine-tuning or a distillation."""
    temperature: float = 1.0
    """Temperature of both softmaxes: 0.1 for a student as large as its teacher, 1 for a smaller one."""
    labeled_share: float = 0.0
    """Weight of the cross-entropy with the labels of --labels; the teacher has the remaining weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--temperature", self.temperature, 0.001, 1000)
        check_range("--labeled-share", self.labeled_share, 0, 1)

    def check_complete(self) -> None:
        super().check_complete()
        if not self.teacher:
            raise UserError("There is no teacher; use --teacher with the run folder of a fine-tuning.")
        if not self.labeled_share and self.labels != LabelsConfig():
            raise UserError("--labels are set but --labeled-share is 0, so they would not be used; set it above 0.")
