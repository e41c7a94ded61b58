"""The command line of evaluate.py: one dataclass for each command."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from .common import UserError


@dataclass(frozen=True)
class Loading:
    backend: Literal["auto", "dali", "kornia", "opencv"] = "auto"
    """Who makes the views. auto: DALI on CUDA (Kornia where DALI is missing), OpenCV threads on a CPU."""
    workers: int = 0
    """Host threads per process for reading and decoding; 0 for this process's share of the cores."""
    max_bad: float = 0.01
    """Share of the images that may be unreadable before the evaluation stops; they are left out."""
    cache_gb: float = 50
    """Disk space for shards of a remote --data, in $STREAMCLR_CACHE or ~/.cache/streamclr."""


@dataclass(frozen=True)
class Options:
    """What all commands share."""

    encoder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of a finished run, or an encoder.safetensors."""
    data: str = ""
    """Shards: a folder or URL with train/ and test/ (or val/). Default: those of the run."""
    size: int | None = None
    """Side of the views in pixels. This, --mean and --std are those of the run unless given."""
    mean: tuple[float, float, float] | None = None
    """Subtracted per channel (RGB, image in 0..1)."""
    std: tuple[float, float, float] | None = None
    """Divided by per channel."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the encoder. auto: bf16 where the hardware computes in it."""
    cache: bool = True
    """Keep features in $STREAMCLR_CACHE/features or ~/.cache/streamclr/features, and use those that are there."""
    out: str = ""
    """The file to write. Default: evaluation/<command>.json in the run folder, or beside the encoder."""
    loader: Annotated[Loading, tyro.conf.arg(name="loader")] = field(default_factory=Loading)


@dataclass(frozen=True)
class Knn(Options):
    """Weighted nearest neighbors among the training images (arXiv 1805.01978, section 3.4)."""

    k: tuple[int, ...] = ()
    """Neighbors that vote. Default: as many as in the run's own evaluation, or 20."""
    temperature: tuple[float, ...] = (0.1,)
    """A neighbor's vote weighs exp(cosine / temperature). Every pair of k and temperature is reported."""


@dataclass(frozen=True)
class Linear(Options):
    """A linear classifier on frozen features."""

    protocol: Literal["fast", "simclr"] = "fast"
    """fast: logistic regression on stored features of central views, solved to convergence, its penalty chosen on a
    part of the training set. simclr: SGD on randomly cropped and flipped views (arXiv 2002.05709, appendix B.6)."""
    seeds: int = 1
    """Repetitions, by seeds 0, 1 and so on. fast: of the part kept apart. simclr: of weights, order and views."""
    held_out: float = 0.2
    """fast: the share of every class of the training set that is kept apart."""
    max_iterations: int = 1000
    """fast: of the solver, after which a fit is reported as not converged."""
    epochs: int = 90
    """simclr: passes over the training images; what is left over after the last full batch is skipped."""
    batch_size: int = 4096
    """simclr: the global batch, at most all of the training images; the learning rate is 0.1 for every 256 of it."""


@dataclass(frozen=True)
class Embed(Options):
    """Write the features of all splits to one safetensors file: <split>.features, .label (-1 for none) and .index."""


def parse(arguments: list[str], description: str) -> Knn | Linear | Embed:
    """Command line to options.

    Raises:
        UserError: a value can't work.
    """
    parsed = tyro.cli(
        Annotated[Knn, tyro.conf.subcommand("knn")]
        | Annotated[Linear, tyro.conf.subcommand("linear")]
        | Annotated[Embed, tyro.conf.subcommand("embed")],
        prog="evaluate.py",
        description=description,
        args=arguments,
    )
    _check(parsed)
    return parsed


def _check(options: Options) -> None:
    """Refuse values that would fail later, where the cause is no longer plain."""
    smallest = {"loader.workers": (options.loader.workers, 0), "loader.max-bad": (options.loader.max_bad, 0)}
    smallest["loader.cache-gb"] = (options.loader.cache_gb, 0)  # nor is nan at least 0
    finite = {"loader.cache-gb": (options.loader.cache_gb,), "mean": options.mean or (), "std": options.std or ()}
    if options.size is not None:
        smallest["size"] = (options.size, 8)
    if isinstance(options, Knn):
        smallest["k"] = (min(options.k, default=1), 1)
        smallest["temperature"] = (min(options.temperature, default=0), 0.001)
        finite["temperature"] = options.temperature
    if isinstance(options, Linear):
        smallest |= {"seeds": (options.seeds, 1), "epochs": (options.epochs, 1), "batch-size": (options.batch_size, 1)}
        smallest["max-iterations"] = (options.max_iterations, 1)
        if not 0 < options.held_out < 1:
            raise UserError(f"--held-out is {options.held_out}: give a share between 0 and 1.")
    for option, values in finite.items():  # first: whether nan is the least of several depends on their order
        if not all(map(math.isfinite, values)):
            raise UserError(f"--{option} is {' '.join(map(str, values))}: use finite numbers.")
    for option, (value, limit) in smallest.items():
        if not value >= limit:
            raise UserError(f"--{option} is {value}: give at least {limit}.")
    if options.std is not None and not min(options.std) > 0:
        raise UserError(f"--std is {' '.join(map(str, options.std))}: give three numbers above 0.")
    if isinstance(options, Embed) and not options.out:
        raise UserError("embed needs --out: give the safetensors file that it is to write.")
