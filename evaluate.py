"""Judge an encoder by what simple classifiers make of its frozen features.

    python evaluate.py knn RUN                                      weighted nearest neighbors
    python evaluate.py linear RUN --seeds 3                         a linear classifier on stored features
    accelerate launch evaluate.py linear RUN --protocol simclr      the paper's, on cropped and flipped views
    python evaluate.py embed RUN --data SHARDS --out FILE           the features themselves
    python evaluate.py knn --help                                   every option

RUN is the folder of a finished run, or an encoder.safetensors.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import model
import pipeline
from common import UserError, file_sha256, replacing, save_tensors
from engine.processes import ending_together
from engine.session import Session
from evaluation.cache import feature_name, load_features, save_features
from evaluation.features import embed
from evaluation.knn import check_k, knn_correct
from evaluation.linear import L2_PATH, fast_protocol
from evaluation.options import Embed, Knn, Linear, parse
from evaluation.report import over_seeds, scores, scores_table
from evaluation.sgd_probe import probe_correct, probe_layer, train_on_views
from evaluation.target import find_target
from model import feature_dim, load_encoder
from pipeline.augment.backend import choose_backend
from pipeline.augment.config import AugmentConfig
from pipeline.data import open_data
from pipeline.loader import LoaderConfig
from pipeline.loader.loader import ViewLoader, center_crop_batches
from pipeline.shards.cache import ShardCache
from pipeline.shards.dataset import ShardSet

EMBEDDED_AT_ONCE = 256
console = Console()


@dataclass(frozen=True)
class Parts:
    """What every command works with."""

    session: Session
    forward_features: Callable[[Tensor], Tensor]
    """(B, 3, S, S) -> h (B, D), by the frozen encoder."""
    width: int
    """D."""
    views: AugmentConfig
    splits: dict[str, ShardSet]
    """The train split first, then that of the test."""
    samples: dict[str, np.ndarray]
    """Of each split, those in use."""
    loader: LoaderConfig
    loading: dict[str, Any]
    """How images are read, for ViewLoader and center_crop_batches."""
    made_by: dict[str, Any]
    """What decides the features besides the images."""
    folder: Path
    """Where features are stored."""
    record: dict[str, Any]
    """What is written in the end."""

    @property
    def tolerant_loading(self) -> dict[str, Any]:
        """`loading` without the limit on bad images, which a rank would apply to its own share of the images alone."""
        return self.loading | {"config": replace(self.loader, max_bad=1.0)}

    @property
    def device(self) -> torch.device:
        return self.session.device

    @property
    def is_main(self) -> bool:
        return self.session.is_main

    @property
    def classes(self) -> int:
        return len(next(iter(self.splits.values())).classes)


def judge(options: Knn | Linear | Embed) -> None:
    """One evaluation, from shards to a table and a file."""
    begun = time.monotonic()
    session = Session(options.precision)
    device = session.device

    # ---- what is judged
    target = find_target(options)
    encoder, views = load_encoder(target.encoder), AugmentConfig(**target.views)
    width = width_of(encoder, views.size)
    encoder = encoder.eval().to(device, memory_format=torch.channels_last)

    def forward_features(images: Tensor) -> Tensor:
        with session.autocast():
            return encoder(images)

    # ---- on what
    loader = LoaderConfig(**asdict(options.loader))
    splits = named_splits(*open_data(target.data, loader))
    if isinstance(options, Embed):
        samples = {name: np.arange(len(split)) for name, split in splits.items()}
    else:
        samples = labeled_samples(splits)
    command = type(options).__name__.lower() + (f"-{options.protocol}" if isinstance(options, Linear) else "")
    if isinstance(options, Knn):
        check_k(options.k or (target.k,), len(next(iter(samples.values()))))
    out = Path(options.out) if options.out else target.folder / "evaluation" / f"{command}.json"
    prepare_out(out)
    backend = choose_backend(loader.backend, device)
    loading = {"config": loader, "device": device, "bad_samples_file": out.with_suffix(".bad_samples.jsonl")}

    # ---- and how
    made_by = {"encoder_sha256": file_sha256(target.encoder), "precision": "bf16" if session.bf16 else "fp32"}
    made_by |= {"size": views.size, "mean": views.mean, "std": views.std, "device": device.type, "backend": backend}
    made_by |= {"code_sha256": digest_of_code(), "torch": torch.__version__, "timm": timm.__version__}
    decoder = import_module({"opencv": "cv2", "dali": "nvidia.dali", "kornia": "kornia"}[backend])
    made_by |= {decoder.__name__: decoder.__version__}
    record = {"what": command, "arguments": sys.argv[1:], "options": asdict(options), **made_by}
    record |= {"encoder": str(target.encoder), "processes": session.world_size}
    with feature_folder(options.cache) as folder:
        parts = Parts(
            session, forward_features, width, views, splits, samples, loader, loading, made_by, folder, record
        )
        if isinstance(options, Embed):
            write_features(parts, out)
            return
        if isinstance(options, Knn):
            results = knn(parts, options.k or (target.k,), options.temperature)
        elif options.protocol == "fast":
            results = linear_fast(parts, options)
        else:
            results = linear_simclr(parts, options)
    if results is None:  # the main process has them
        return
    record |= {"classes": parts.classes, "results": results, "seconds": round(time.monotonic() - begun, 3)}
    if isinstance(options, Linear):
        record["over_seeds"] = over_seeds(results)
    replace_file(out, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    console.print(scores_table(record))
    console.print(f"written: {out}")


def knn(parts: Parts, k: tuple[int, ...], temperature: tuple[float, ...]) -> list[dict[str, Any]] | None:
    """A result for every k and temperature, on the main process."""
    train, test = (features_of(parts, split) for split in parts.splits)
    if not parts.is_main:
        return None
    right = knn_correct(*train, *test, k=k, temperature=temperature, classes=parts.classes, device=parts.device)
    return [{"k": k, "temperature": t, **scores(correct, len(test[0]))} for (k, t), correct in right.items()]


def linear_fast(parts: Parts, options: Linear) -> list[dict[str, Any]] | None:
    """A result for every seed, on the main process: logistic regression on stored features."""
    train, test = (features_of(parts, split) for split in parts.splits)
    if not parts.is_main:
        return None
    with progress_bar("fitting", options.seeds * (len(L2_PATH) + 1), shown=True) as advance:
        outcomes = fast_protocol(
            train,
            test,
            classes=parts.classes,
            seeds=options.seeds,
            held_out=options.held_out,
            max_iterations=options.max_iterations,
            device=parts.device,
            advance=advance,
        )
    return [outcome | scores(outcome.pop("hits"), len(test[0])) for outcome in outcomes]


def linear_simclr(parts: Parts, options: Linear) -> list[dict[str, Any]] | None:
    """A result for every seed, on the main process: SGD on random views, which all processes train together."""
    (train, split), (test, _) = parts.splits.items()
    tested = features_of(parts, test)
    world_size = parts.session.world_size
    batch_size = min(options.batch_size, len(parts.samples[train])) // world_size * world_size
    if not batch_size:
        raise UserError(
            f"A batch of at most {options.batch_size} of {len(parts.samples[train])} labeled training images does not "
            f"divide among {world_size} processes: use fewer processes or a larger --batch-size."
        )
    recipe = replace(parts.views, jitter_p=0.0, gray_p=0.0, blur_p=0.0)  # what is left is crop and flip
    parts.record.update({"batch_size": batch_size, "lr": 0.1 * batch_size / 256, "crop_area": recipe.crop_area})
    probes, results = [], []
    with progress_bar("training", options.seeds * options.epochs, parts.is_main) as advance:
        for seed in range(options.seeds):
            probe = probe_layer(parts.width, parts.classes, seed, parts.device)
            loader = ViewLoader(
                split,
                recipe,
                batch_size=batch_size,
                seed=seed,
                rank=parts.session.rank,
                world_size=world_size,
                epochs=options.epochs,
                views_per_image=1,
                samples=parts.samples[train],
                **parts.loading,
            )
            epoch_losses = train_on_views(
                probe,
                parts.forward_features,
                loader,
                batch_size=batch_size,
                epochs=options.epochs,
                mean_over_ranks=parts.session.mean,
            )
            try:
                for loss in epoch_losses:
                    last_loss = loss
                    advance(1)
            finally:
                loader.close()
            if not last_loss.isfinite():
                raise UserError(
                    f"The training of the classifier diverged (seed {seed}, mean loss {last_loss.item()} in the last "
                    "epoch): use a smaller --batch-size, which lowers the learning rate, or --precision fp32."
                )
            probes.append(probe)
            results.append({"seed": seed, "steps": options.epochs * len(loader), "train_loss": last_loss.item()})
    if not parts.is_main:
        return None
    return [
        result | scores(probe_correct(probe, *tested, parts.device), len(tested[0]))
        for result, probe in zip(results, probes, strict=True)
    ]


def write_features(parts: Parts, out: Path) -> None:
    """The features of every split in one file, mapped from one to the other instead of held in memory."""
    found = {split: features_of(parts, split, with_index=True) for split in parts.splits}
    if not parts.is_main:
        return
    tensors = {
        f"{split}.{name}": tensor
        for split, each in found.items()
        for name, tensor in zip(("features", "label", "index"), each, strict=True)
    }
    about = {"record": json.dumps(parts.record)}
    replace_file(out, lambda path: save_tensors(tensors, path, about))
    console.print(f"written: {out}")


def features_of(parts: Parts, name: str, with_index: bool = False) -> tuple[Tensor, ...] | None:
    """Features (N, D), labels (N,) and, if wanted, samples (N,) of a split, on the host of the main process alone.

    They are embedded by all processes together if they are not stored already.
    """
    split, samples, session = parts.splits[name], parts.samples[name], parts.session
    made_from = parts.made_by | {"shards": split.checksum}
    made_from["samples"] = sha256(samples.astype("<i8").tobytes()).hexdigest()
    path = parts.folder / feature_name(made_from)
    found = load_features(path) if parts.is_main else None
    if found and can_be_read_by_now(parts, name, found[1]):
        found = None
    # the main process decides: others may have another disk, or look a moment later
    stored = session.sum(torch.tensor(float(found is not None), device=parts.device)).item() > 0
    begun = time.monotonic()
    if not stored:
        batches = partial(
            center_crop_batches, split, parts.views, batch_size=EMBEDDED_AT_ONCE, **parts.tolerant_loading
        )
        with progress_bar(f"embedding {name}", len(samples), parts.is_main) as advance:
            embedded = embed(parts.forward_features, batches, samples, session)
            embedded = counted(embedded, parts, name, advance)
            if parts.is_main:
                save_features(path, embedded, made_from)
                found = load_features(path)
            else:
                for _ in embedded:
                    pass
    if not parts.is_main:
        return None
    features, index = found
    check_left_out(parts, name, len(samples) - len(index))
    about = {"root": split.root, "sha256": made_from["shards"], "images": len(index), "from_cache": stored}
    about["left_out"] = len(samples) - len(index)
    if stored:
        how = f"from the cache, {path}"
    else:
        about["embedding_s"] = round(time.monotonic() - begun, 3)
        about["images_per_s"] = round(len(samples) / about["embedding_s"], 1)
        how = f"in {parts.made_by['precision']} at {about['images_per_s']:,.0f} images/s"
    bad = f"; {about['left_out']} bad images left out: {parts.loading['bad_samples_file']}" if about["left_out"] else ""
    console.print(f"{name}: {len(index):,} features of width {features.shape[1]} {how}{bad}")
    parts.record.setdefault("data", {})[name] = about
    label = torch.from_numpy(split.index["label"][index.numpy()])
    return (features, label, index) if with_index else (features, label)


def check_left_out(parts: Parts, name: str, left_out: int) -> None:
    """Refuse a split of which more images can't be used than the options allow.

    Raises:
        UserError: they are too many.
    """
    split, total, max_bad = parts.splits[name], len(parts.samples[name]), parts.loader.max_bad
    if left_out > max_bad * total:
        raise UserError(
            f"{left_out} of {total} images of {split.root} can't be read, listed in {parts.loading['bad_samples_file']}, "
            f"more than --loader.max-bad {max_bad:g} allows: check the shards with `python -m pipeline.shards verify "
            f"{split.root}` or allow more."
        )


def can_be_read_by_now(parts: Parts, name: str, index: Tensor) -> bool:
    """Whether any image is usable that was left out when the features of the samples `index` were stored.

    The cause may have passed, such as a failing network, or a shard may have been repaired; its recorded checksum, by
    which the features are found, is the same. Images that still fail are listed in this command's quarantine file.
    """
    samples = parts.samples[name]
    missing = np.setdiff1d(samples, index.numpy())
    if not len(missing):
        return False
    # as many good ones with them: what takes the place of a bad image is drawn from all of these
    tried = np.union1d(missing, index[: max(len(missing), EMBEDDED_AT_ONCE)].numpy())
    batches = center_crop_batches(
        parts.splits[name], parts.views, tried, batch_size=EMBEDDED_AT_ONCE, **parts.tolerant_loading
    )
    begin = 0
    with suppress(UserError), closing(batches):  # the shards may be out of reach while their features are stored
        for batch in batches:
            due = tried[begin : begin + len(batch.index)]
            begin += len(due)
            if np.isin(due[batch.index.numpy() == due], missing).any():
                return True
    return False


def width_of(encoder: nn.Module, size: int) -> int:
    """Width of h for views of `size` pixels."""
    try:
        return feature_dim(encoder, size)
    except UserError as error:
        raise UserError(f"The encoder can't take views of {size} px: give another --size.") from error


def digest_of_code() -> str:
    """Checksum of the code that decides the features besides the encoder: how images are read and encoded."""
    files = sorted(path for package in (pipeline, model) for path in Path(package.__file__).parent.rglob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def named_splits(train: ShardSet, test: ShardSet | None) -> dict[str, ShardSet]:
    if test is None:
        return {train.manifest.get("split") or "data": train}
    return {"train": train, "test": test}


def labeled_samples(splits: dict[str, ShardSet]) -> dict[str, np.ndarray]:
    """The labeled samples of a train and a test split.

    Raises:
        UserError: one has none, or there is only one split.
    """
    if len(splits) == 1:
        (only,) = splits.values()
        raise UserError(f"There is no test split in {only.root}: give a folder with train/ and test/ or val/.")
    samples = {name: np.flatnonzero(split.index["label"] >= 0) for name, split in splits.items()}
    for name, split in splits.items():
        if not len(samples[name]):
            raise UserError(f"No image of {split.root} has a label: give labeled shards.")
    return samples


@contextmanager
def feature_folder(kept: bool) -> Iterator[Path]:
    """Where features are stored: the cache, or a folder that goes when the command ends."""
    if not kept:
        with TemporaryDirectory(prefix="streamclr-features-") as folder:
            yield Path(folder)
        return
    folder = ShardCache().folder / "features"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cure = "point $STREAMCLR_CACHE to a folder that can be written, or give --no-cache"
        raise UserError(f"{folder} can't keep features ({error}): {cure}.") from error
    yield folder


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Written aside and renamed, so that whoever finds the file finds all of it."""
    with replacing(path) as unfinished:
        write(unfinished)


def prepare_out(out: Path) -> None:
    """Create the folder of the result, before anything is computed.

    Raises:
        UserError: the result can't be written there, or would replace a file that is not an earlier result.
    """
    if out.exists() and not is_result(out):
        raise UserError(f"{out} exists and is not a result of evaluate.py: use another --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}): use another --out.") from error
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out} can't be written, since {out.parent} is read-only: use another --out.")


def is_result(path: Path) -> bool:
    """Whether a file was written by an evaluation, or is empty, and so may be replaced."""
    if not path.is_file():
        return False
    if path.stat().st_size == 0:
        return True
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})["record"])
    except (SafetensorError, OSError, ValueError, KeyError):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            return False
    return isinstance(record, dict) and {"what", "encoder_sha256"} <= record.keys()


@contextmanager
def progress_bar(text: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on the main process of a terminal; yields what advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield partial(progress.advance, task)


def counted(embedded: Iterable, parts: Parts, name: str, advance: Callable[[int], None]) -> Iterator:
    """The batches of `embed`, each of which advances the bar by its samples; all ranks stop at too many bad images."""
    due = kept = 0
    for batch in embedded:
        due = min(due + EMBEDDED_AT_ONCE * parts.session.world_size, len(parts.samples[name]))
        kept += len(batch[0])
        check_left_out(parts, name, due - kept)
        yield batch
        advance(len(batch[0]))


def main() -> None:
    with ending_together():
        judge(parse(sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
