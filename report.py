"""report.html of finished runs: what they wrote, and what their encoders show on images.

`report_run` is the last call of every stage; `python evaluate.py report RUN [RUN ...]` calls `write_report`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import UserError
from engine.session import Session
from evaluation.features import ALONE, embed
from evaluation.knn import nearest
from evaluation.report.page import Neighbor, RunPictures, write_page
from evaluation.report.pictures import data_uri
from evaluation.report.record import RunRecord, read_run
from evaluation.report.representation import plane, rankme
from evaluation.sgd_probe import linear_predictions
from model import load_classifier, load_encoder
from pipeline.augment.config import AugmentConfig
from pipeline.data import open_data
from pipeline.images.pixel_format import PixelFormat, decode_pixels
from pipeline.loader import LoaderConfig, ViewLoader, center_crop_batches
from pipeline.pictures import to_pictures
from pipeline.shards.dataset import ShardSet
from pipeline.shards.reader import Reader

BANK, QUERIES, ROWS, NEIGHBORS = 5000, 1000, 8, 8
"""Most training images that are embedded, test images on the maps of a page, images shown with views or neighbors, and
neighbors of each."""
VIEW_SIDE, PICTURE_SIDE = 160, 48
"""Longer side in pixels of views, and of all other pictures."""
MANY_CLASSES = 1000
"""Above this number, the confusion matrix has only the classes that occur."""
MOST_RUNS = 20
"""Runs on a page, which keeps it below 10 MB."""


def write_report(folders: Sequence[Path], out: Path, device: torch.device) -> None:
    """Write one page about a run, or about several that are compared; call it on one rank.

    Args:
        folders: folders of finished runs.
        out: HTML file to write.
        device: device that computes the features.

    Raises:
        UserError: a run is damaged or unfinished, the runs cannot be compared, or the file cannot be written.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs do not fit a page; use at most {MOST_RUNS}.")
    runs = [read_run(folder) for folder in folders]
    check_comparable(runs)
    pictures = [draw(run, folder, len(runs), device) for run, folder in zip(runs, folders, strict=True)]
    write_page(runs, pictures, out)


def report_run(session: Session) -> None:
    """Write report.html into the folder of the run that just ended; a report that fails does not fail the run."""
    out = session.out / "report.html"
    try:
        write_report([session.out], out, session.device)
        session.print(f"report: {out}")
    except Exception as error:  # of any kind: nothing after the training is worth a lost run
        session.print(f"There is no report: {str(error) or repr(error)}")


def check_comparable(runs: Sequence[RunRecord]) -> None:
    """Refuse runs whose scores say nothing about each other.

    Raises:
        UserError: the runs are of different stages, or were trained on different data.
    """
    for run in runs:
        for kind, value in (("stage", lambda run: run.stage), ("data", lambda run: run.config["data"] or "textures")):
            if value(run) != value(runs[0]):
                raise UserError(
                    f"The runs can't be compared: the {kind} of {runs[0].name} is {value(runs[0])}, that of {run.name} "
                    f"is {value(run)}; write a report of each."
                )


class Split(NamedTuple):
    """Embedded images of a split."""

    shards: ShardSet
    samples: np.ndarray  # (n,) int64
    features: Tensor  # (n, D)
    label: Tensor  # (n,) int64, -1 for none

    def class_name(self, at: int) -> str:
        return self.shards.classes[self.label[at]] if self.label[at] >= 0 else ""


def draw(run: RunRecord, folder: Path, runs: int, device: torch.device) -> RunPictures:
    """Pictures and numbers of a run's encoder; `runs` share a page."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in run.config["views"].items()}
    try:
        views = AugmentConfig(**options)
    except TypeError as error:
        raise UserError(f"{folder} was written by another version ({error}); train again with this one.") from error
    cache = {name: value for name, value in run.config["loader"].items() if name in ("cache_dir", "cache_gb")}
    loading = LoaderConfig(**cache, max_bad=1.0)  # it shows what there is
    train, test = open_data(run.config["data"], loading)
    batches = partial(center_crop_batches, augment=views, config=loading, batch_size=256, device=device)

    encoder = load_encoder(folder / "encoder.safetensors").to(device).eval()
    bank = embed_split(encoder, train, spread(len(train), BANK), batches)
    asked = test or train
    query = embed_split(encoder, asked, spread(len(asked), max(QUERIES // runs, 50)), batches)
    if not len(bank.samples) or not len(query.samples):
        raise UserError(f"No image of {train.root} can be read; restore the shards.")
    crops = center_crops(query.shards, query.samples, batches, views)
    pictures = [data_uri(crops[sample], PICTURE_SIDE) for sample in query.samples.tolist()]
    predicted, classifier = None, ""
    if test is not None:
        predicted, classifier = predictions(folder, bank, query, batches, device)
    confusion, classes = None, list(train.classes)
    if predicted is not None:
        confusion, classes = count_pairs(query.label, predicted, classes)
    rows = max(ROWS // runs, 3)
    return RunPictures(
        views=view_pairs(train, views, rows, run.config["seed"], loading, device),
        neighbors=neighbors(bank, query, pictures, spread(len(query.samples), rows), batches, views),
        points=plane(query.features),
        pictures=pictures,
        labels=[query.class_name(at) for at in range(len(pictures))],
        rank=rankme(bank.features),
        rank_images=len(bank.samples),
        feature_dim=bank.features.shape[1],
        confusion=confusion,
        classes=classes,
        classifier=classifier,
    )


def spread(total: int, count: int) -> np.ndarray:
    """At most `count` distinct positions, spread evenly over `total`: (n,) int64, ascending."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(np.int64))


@torch.no_grad()
def embed_split(function: nn.Module, shards: ShardSet, samples: np.ndarray, batches: Callable) -> Split:
    """Features of samples ((n,) int64); unreadable ones are left out."""
    parts = zip(*embed(function, partial(batches, shards), samples, ALONE), strict=True)
    features, label, samples = (torch.cat(part).cpu() for part in parts)
    return Split(shards, samples.numpy(), features, label)


def center_crops(
    shards: ShardSet, samples: np.ndarray, batches: Callable, views: AugmentConfig
) -> dict[int, np.ndarray]:
    """Center crops of samples ((n,) int64, distinct), each (S, S, 3) uint8."""
    found = {}
    for batch in batches(shards, samples=samples):
        pictures = to_pictures(batch.views, shards.pixel_format, views).cpu().numpy()
        found |= zip(batch.index.tolist(), pictures, strict=True)
    return found


def view_pairs(
    shards: ShardSet, views: AugmentConfig, count: int, seed: int, loading: LoaderConfig, device: torch.device
) -> list[tuple[str, str, str]]:
    """Original and two views of images spread over a split, as in the run's first epoch."""
    samples = spread(len(shards), count)
    loader = ViewLoader(
        shards, views, loading, batch_size=len(samples), seed=seed, device=device, epochs=1, samples=samples
    )
    try:
        batch = next(iter(loader))
    finally:
        loader.close()
    pairs = batch.views.unflatten(0, (2, -1)).transpose(0, 1)  # (n, 2, C, S, S)
    pairs = to_pictures(pairs, shards.pixel_format, views).cpu().numpy()
    encoded = Reader(shards, loading.cache())(batch.index.numpy())
    originals = [original(each, shards.pixel_format) for each in encoded]
    return [
        tuple(data_uri(picture, VIEW_SIDE) for picture in (whole, *pair))
        for whole, pair in zip(originals, pairs, strict=True)
    ]


def original(encoded: bytes, pixel_format: PixelFormat) -> np.ndarray:
    """Picture of an image, (H, W, 3) uint8."""
    pixels = torch.from_numpy(decode_pixels(encoded, pixel_format))  # (H, W, C)
    return to_pictures(pixels.permute(2, 0, 1)[None], pixel_format)[0].numpy()


def neighbors(
    bank: Split, query: Split, pictures: list[str], chosen: np.ndarray, batches: Callable, views: AugmentConfig
) -> list[tuple[Neighbor, list[Neighbor]]]:
    """Nearest training images of the queries at `chosen` ((n,) int64); no image is its own neighbor."""
    count = min(NEIGHBORS + 1, len(bank.samples))
    _, (_, places) = next(nearest(bank.features, query.features[chosen], count, torch.device("cpu")))
    alike = query.shards is bank.shards
    places = [
        [at for at in line if not (alike and bank.samples[at] == query.samples[i])][:NEIGHBORS]
        for i, line in zip(chosen.tolist(), places.tolist(), strict=True)
    ]
    used = np.unique([bank.samples[at] for line in places for at in line]).astype(np.int64)
    crops = center_crops(bank.shards, used, batches, views)
    return [
        (
            Neighbor(pictures[i], query.class_name(i)),
            [Neighbor(data_uri(crops[bank.samples[at]], PICTURE_SIDE), bank.class_name(at)) for at in line],
        )
        for i, line in zip(chosen.tolist(), places, strict=True)
    ]


def predictions(
    folder: Path, bank: Split, query: Split, batches: Callable, device: torch.device
) -> tuple[Tensor | None, str]:
    """Predicted classes of the queries, (n,) int64, and what predicted them; None without labels of the same classes.

    The classifier of a fine-tuned run predicts itself; for pretraining it is a linear probe on the bank's features.
    """
    if (query.label < 0).all() or list(query.shards.classes) != list(bank.shards.classes):
        return None, ""
    if (folder / "model.safetensors").exists():
        classifier, classes = load_classifier(folder / "model.safetensors")
        if classes != list(query.shards.classes):  # of a teacher of other images
            return None, ""
        logits = embed_split(classifier.to(device).eval(), query.shards, query.samples, batches).features
        return logits.argmax(1), "the trained classifier"
    labeled = bank.label >= 0
    if not labeled.any():
        return None, ""
    predicted = linear_predictions(bank.features[labeled], bank.label[labeled], query.features)
    return predicted, "a linear probe on frozen features"


def count_pairs(label: Tensor, predicted: Tensor, classes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Confusion matrix of the labeled images by true and predicted class, and its classes.

    These are all, or those that occur if there are many: the matrix of 20,000 classes would take 3 GB.
    """
    pairs = torch.stack([label, predicted])[:, label >= 0]
    if len(classes) > MANY_CLASSES:
        used, pairs = pairs.unique(return_inverse=True)
        classes = [classes[i] for i in used.tolist()]
    count = len(classes)
    return torch.bincount(pairs[0] * count + pairs[1], minlength=count**2).view(count, -1).numpy(), classes
