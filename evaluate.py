"""Evaluation of a frozen encoder: kNN, linear classifiers, or its features in a file.

    python evaluate.py knn RUN                                      weighted nearest neighbors
    python evaluate.py linear RUN --seeds 3                         logistic regression on stored features
    accelerate launch evaluate.py linear RUN --protocol simclr      SGD on cropped and flipped views, as in the paper
    python evaluate.py embed RUN --data SHARDS --out FILE           features of all splits
    python evaluate.py report RUN RUN                               report.html of one run, or of several side by side
    python evaluate.py COMMAND --help                               every option of a command

RUN is the folder of a finished run, or an encoder.safetensors.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import timm
import torch
import tyro
from torch import Tensor

import model
import pipeline
from common import UserError, check_range, file_sha256, replacing, save_tensors
from engine.processes import ending_together
from engine.session import Session
from evaluation.accuracy import over_seeds, scores
from evaluation.cache import code_checksum, feature_folder
from evaluation.knn import knn_correct
from evaluation.linear import fast_protocol
from evaluation.results import prepare_out
from evaluation.sgd_probe import base_learning_rate, global_batch_size, simclr_protocol
from evaluation.store import FeatureStore, eval_splits
from evaluation.tables import scores_table
from evaluation.target import find_target
from options import nearest, parse_options
from pipeline.augment import AugmentConfig
from pipeline.augment.backend import choose_backend
from pipeline.augment.config import SMALLEST_STD
from pipeline.data import open_data
from pipeline.images.pixel_format import PixelFormat
from pipeline.loader import LoaderConfig, ViewLoader, center_crop_batches
from pipeline.shards.cache import ShardCache
from report import write_report

BATCH_SIZE = 256
"""Images per process that are embedded at a time."""
MANY = 10**9


@dataclass(frozen=True)
class EvalOptions:
    """Options of all commands."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a finished run, or an encoder.safetensors."""
    data: str = ""
    """Shards: a folder or URL with train/ and test/ (or val/). Default: those of the run."""
    size: int | None = None
    """Side of the views in pixels. Default of this, --mean and --std: those of the run."""
    mean: tuple[float, ...] | None = None
    """Subtracted, per channel or one for all (image in 0..1)."""
    std: tuple[float, ...] | None = None
    """Divided by, per channel or one for all."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the encoder. auto: bf16 where the hardware supports it."""
    cache: bool = True
    """Keep features in $STREAMCLR_CACHE/features or ~/.cache/streamclr/features, and reuse those stored there."""
    out: str = ""
    """File to write. Default: evaluation/<command>.json in the run folder, or next to the encoder."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if self.size is not None:
            check_range("--size", self.size, 8, 65_536)
        for value in self.mean or ():
            check_range("--mean", value, 0, 1)
        for value in self.std or ():
            check_range("--std", value, SMALLEST_STD, 1)


@dataclass(frozen=True)
class Knn(EvalOptions):
    """Weighted nearest neighbors among the training images (arXiv 1805.01978, section 3.4)."""

    k: tuple[int, ...] = ()
    """Numbers of neighbors that vote. Default: that of the run's own evaluation, or 20, at most all images."""
    temperature: tuple[float, ...] = (0.1,)
    """A neighbor's vote weighs exp(cosine / temperature). Every pair of k and temperature is reported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in self.k:
            check_range("--k", value, 1, MANY)
        for value in self.temperature or (0,):  # an option without values is refused, too
            check_range("--temperature", value, 0.001, 1000)


@dataclass(frozen=True)
class Linear(EvalOptions):
    """A linear classifier on frozen features."""

    protocol: Literal["fast", "simclr"] = "fast"
    """fast: logistic regression on stored features of center crops, solved to convergence, its penalty chosen on a
    held-out part of the training set. simclr: SGD on randomly cropped and flipped views (arXiv 2002.05709, appendix
    B.6)."""
    seeds: int = 1
    """Repetitions, with seeds 0, 1 and so on. fast: of the held-out part. simclr: of weights, order and views."""
    held_out: float = 0.2
    """fast: share of every class of the training set that is held out."""
    max_iterations: int = 1000
    """fast: iterations of the solver, after which a fit is reported as not converged."""
    epochs: int = 90
    """simclr: passes over the training images; those left over after the last full batch are skipped."""
    batch_size: int = 4096
    """simclr: global batch size, at most all training images; the learning rate is 0.1 x batch / 256."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "max_iterations", "epochs", "batch_size"):
            check_range(f"--{name.replace('_', '-')}", getattr(self, name), 1, MANY)
        if not 0 < self.held_out < 1:
            raise UserError(f"--held-out is {self.held_out}; it must be above 0 and below 1.")


@dataclass(frozen=True)
class Embed(EvalOptions):
    """Write the features of all splits to one safetensors file: <split>.features, .label (-1 for none) and .index."""


@dataclass(frozen=True)
class Report:
    """Write one page with the curves, scores, views, neighbors and maps of one run, or of several that are compared."""

    run: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Folders of finished runs of one stage on the same data."""
    out: str = ""
    """File to write. Default: report.html in the run folder, or in the current folder for several runs."""


COMMANDS = {"knn": Knn, "linear": Linear, "embed": Embed, "report": Report}


def evaluate(options: Knn | Linear | Embed) -> None:
    """Run one evaluation, from shards to a table and a file."""
    start_s = time.monotonic()
    session = Session(options.precision)
    name = type(options).__name__.lower() + (f"-{options.protocol}" if isinstance(options, Linear) else "")

    # Encoder: views (B, C, S, S) -> h (B, D), frozen.
    target = find_target(options.run, options.data, size=options.size, mean=options.mean, std=options.std)
    encoder, views = model.load_encoder(target.encoder), AugmentConfig(**target.views)
    channels = model.read_spec(target.encoder).channels
    for option in ("mean", "std"):
        if len(getattr(views, option)) not in (1, channels):
            several = f", or {channels}: one for each channel of the encoder" if channels > 1 else ""
            raise UserError(f"--{option} must be one number{several}.")
    try:
        width = model.feature_dim(encoder, views.size, channels)
    except UserError as error:  # which names the option of train.py
        raise UserError(f"The encoder can't take views of {views.size} px; use another --size.") from error
    encoder = session.to_device(encoder.eval())

    def forward_features(images: Tensor) -> Tensor:
        with session.autocast():
            return encoder(images)

    # Data: the images of each split, as center crops.
    train, test = open_data(target.data, options.loader)
    expected = PixelFormat(**target.pixels) if target.pixels else train.pixel_format._replace(channels=channels)
    if train.pixel_format != expected:
        raise UserError(
            f"The images of {train.root} are {train.pixel_format}, but those that the encoder takes are {expected}; "
            "use --data with such images."
        )
    views = views.for_images(expected, {})
    splits = eval_splits(train, test, labeled=not isinstance(options, Embed))
    classes, bank = len(train.classes), len(splits[0].samples)
    k = getattr(options, "k", ()) or (min(target.k, bank),)
    if max(k) > bank:
        raise UserError(f"--k {max(k)} exceeds the {bank} labeled training images; use a smaller --k.")
    out = Path(options.out) if options.out else target.folder / "evaluation" / f"{name}.json"
    prepare_out(out)
    reading = {"device": session.device, "dtype": session.dtype}
    reading["bad_samples_file"] = out.with_suffix(".bad_samples.jsonl")
    batches = partial(center_crop_batches, augment=views, config=options.loader, batch_size=BATCH_SIZE, **reading)

    # Record: what is evaluated and how; `made_from` is everything besides the images that determines the features.
    made_from = {"encoder_sha256": file_sha256(target.encoder), "precision": "bf16" if session.bf16 else "fp32"}
    made_from |= {"size": views.size, "mean": views.mean, "std": views.std, "device": session.device.type}
    made_from["pixels"] = expected  # the shards of a conversion with --bits 8 may be the same files
    backend, threads = options.loader.backend, options.loader.threads
    backend = choose_backend(backend, session.device, views.size, threads, expected).name
    try:
        decoder = import_module({"opencv": "cv2", "dali": "nvidia.dali"}.get(backend, backend))
    except ImportError as error:
        raise UserError(f"--loader.backend {backend} can't be imported ({error}); use auto.") from error
    made_from |= {"backend": backend, decoder.__name__: decoder.__version__, "torch": torch.__version__}
    made_from |= {"timm": timm.__version__, "code_sha256": code_checksum(pipeline, model)}
    record = {"what": name, "arguments": sys.argv[1:], "options": asdict(options), **made_from}
    record |= {"encoder": str(target.encoder), "processes": session.world_size, "source": target.data, "data": {}}

    with feature_folder(ShardCache().folder / "features" if options.cache else None) as folder:
        store = FeatureStore(
            session=session,
            forward_features=forward_features,
            batches=batches,
            batch_size=BATCH_SIZE,
            made_from=made_from,
            folder=folder,
            max_bad=options.loader.max_bad,
            bad_samples_file=reading["bad_samples_file"],
        )
        found, labeled = {}, {}  # by split, on rank 0; empty on other ranks
        for split in splits[1:] if name == "linear-simclr" else splits:  # the former trains on views
            if features := store.load_or_embed(split):
                found[split.name], labeled[split.name] = features, (features.features, features.label)
                record["data"][split.name] = features.about

        if name == "linear-simclr":
            batch_size = global_batch_size(options.batch_size, len(splits[0].samples), session.world_size)
            record |= {"batch_size": batch_size, "lr": base_learning_rate(batch_size), "crop_area": views.crop_area}
            loader = partial(
                ViewLoader,
                splits[0].shards,
                replace(views, jitter_p=0.0, gray_p=0.0, blur_p=0.0),  # only crops and flips
                options.loader,
                batch_size=batch_size,
                rank=session.rank,
                world_size=session.world_size,
                epochs=options.epochs,
                views_per_image=1,
                samples=splits[0].samples,
                **reading,
            )
            results = simclr_protocol(
                forward_features,
                loader,
                labeled.get("test"),
                session,
                feature_dim=width,
                classes=classes,
                batch_size=batch_size,
                epochs=options.epochs,
                seeds=options.seeds,
            )
        if not session.is_main:
            return
        sizes = {"classes": classes, "device": session.device}
        if name == "knn":
            knn = knn_correct(*labeled["train"], *labeled["test"], k=k, temperature=options.temperature, **sizes)
            total = len(found["test"].label)
            results = [{"k": each, "temperature": t, **scores(correct, total)} for (each, t), correct in knn.items()]
        elif name == "linear-fast":
            solver = {option: getattr(options, option) for option in ("seeds", "held_out", "max_iterations")}
            results = fast_protocol(labeled["train"], labeled["test"], **solver, **sizes)
        with replacing(out) as temporary:
            if name == "embed":
                parts = ("features", "label", "index")
                tensors = {f"{split}.{part}": getattr(found[split], part) for split in found for part in parts}
                save_tensors(tensors, temporary, {"record": json.dumps(record)})  # mapped from file to file
            else:
                record |= {"classes": classes, "results": results, "seconds": round(time.monotonic() - start_s, 3)}
                if isinstance(options, Linear):
                    record["over_seeds"] = over_seeds(results)
                temporary.write_text(json.dumps(record, indent=2) + "\n")
        if name != "embed":
            session.print(scores_table(record))
        session.print(f"written: {out}")


def parse(arguments: list[str]) -> Knn | Linear | Embed | Report:
    """Read a command line: the command first, then RUN and the options.

    Raises:
        UserError: unknown command or option, or a value that is out of range.
    """
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    if command not in COMMANDS:
        raise UserError(
            f"There is no command {command!r}{nearest(command, COMMANDS)}; use one of {', '.join(COMMANDS)}."
        )
    options = parse_options(COMMANDS[command](), arguments[1:], prog=f"evaluate.py {command}")
    if not options.run:
        raise UserError(f"There is no run to evaluate; use evaluate.py {command} RUN, where RUN is a run folder.")
    if command == "embed" and not options.out:
        raise UserError("embed has no file to write; use --out with the name of a safetensors file.")
    return options


def report(options: Report) -> None:
    """Write the page and name it."""
    session = Session()
    out = Path(options.out or (Path(options.run[0]) if len(options.run) == 1 else Path()) / "report.html")
    if session.is_main:
        if options.out or len(options.run) > 1:  # RUN/report.html is a report, perhaps of a version without its mark
            prepare_out(out)
        write_report([Path(run) for run in options.run], out, session.device)
        session.print(f"written: {out}")


def main() -> None:
    with ending_together():
        options = parse(sys.argv[1:])
        (report if isinstance(options, Report) else evaluate)(options)


if __name__ == "__main__":
    main()
