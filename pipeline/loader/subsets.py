"""Subsets of a shard set for training with few labels, as `ViewLoader(samples=...)` expects them."""

import posixpath
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common import UserError
from ..philox import uniforms
from ..shards.archives import clean_key, is_image
from ..shards.dataset import ShardSet
from ..shards.format import ROWS


@dataclass(frozen=True)
class LabelsConfig:
    """Selection of the labeled images to train on."""

    fraction: float = 1.0
    """Class-balanced fraction of the labeled images, drawn by --seed; a smaller subset is part of a larger one."""
    keys: str = ""
    """File with the keys of the images instead, one per line, such as SimCLR's lists of 1 % and 10 % of ImageNet."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"--labels.fraction is {self.fraction}; use a fraction above 0 and at most 1.")


SUBSET_STREAM = 2**32 - 5
"""Random number stream of subsets, distinct from those of sampler, views, conversion and replacements."""


def labeled_subset(shards: ShardSet, labels: LabelsConfig, seed: int) -> np.ndarray:
    """Select the samples whose labels are used.

    Returns:
        (n,) int64, ascending.

    Raises:
        UserError: listed images are missing from the set or have no label, or the set has no labels.
    """
    if not labels.keys:
        return label_subset(shards.index["label"], labels.fraction, seed)
    samples = keys_subset(shards, Path(labels.keys))
    if unlabeled := int((shards.index["label"][samples] < 0).sum()):
        raise UserError(f"{labels.keys} lists {unlabeled} images of {shards.root} without a label; remove them.")
    return samples


def label_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Select a class-balanced fraction of the labeled samples, like the 1 % and 10 % of arXiv 2002.05709, section 6.

    Every round takes one sample of each class, until there are enough: class sizes differ by at most one, except for
    classes that have too few samples. With the same seed, a smaller fraction is contained in a larger one.

    Args:
        labels: (N,) integers; -1 for unlabeled samples.
        fraction: fraction of the labeled samples, 0 < fraction <= 1.
        seed: decides which samples are taken, and which classes have one more than others.

    Returns:
        (n,) int64, ascending; n = round(fraction * labeled), but at least one sample of every class.

    Raises:
        UserError: the fraction is out of range, or there are no labels.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"The fraction of labels is {fraction:g}; it must be above 0 and at most 1.")
    labeled = np.flatnonzero(labels >= 0)
    if not len(labeled):
        raise UserError("The data set has no labels; use labeled shards.")
    classes, label, counts = np.unique(labels[labeled], return_inverse=True, return_counts=True)
    by_class = np.lexsort((uniforms(seed, 0, labeled, SUBSET_STREAM, 1)[:, 0], label))
    label = label[by_class]
    turn = np.arange(len(label)) - (np.cumsum(counts) - counts)[label]  # round in which a sample is taken
    place = uniforms(seed, 1, classes, SUBSET_STREAM, 1)[:, 0]  # order of the classes within a round
    taken = np.lexsort((label, place[label], turn))[: max(round(fraction * len(labeled)), len(classes))]
    return np.sort(labeled[by_class[taken]])


def keys_subset(shards: ShardSet, path: Path) -> np.ndarray:
    """Select the samples whose keys a text file lists, one per line, with or without the extension of the image file.

    The published subsets of ImageNet's labels have this format ("n01440764_10183.JPEG"); `pipeline.convert` keeps their
    names.

    Returns:
        (n,) int64, ascending.

    Raises:
        UserError: the file can't be read or is empty, or the shard set does not have exactly one sample per key.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]  # Windows adds a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}); use a text file with one key per line.") from error
    if not (wanted := np.array(sorted({_key(name).encode() for name in names if name}))).size:
        raise UserError(f"{path} is empty; use a text file with one key per line.")
    found, matches = [], np.zeros(len(wanted), np.int64)
    for first in range(0, len(shards), ROWS):
        keys = shards.index["key"][first : first + ROWS]
        candidate = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        (here,) = np.nonzero(wanted[candidate] == keys)
        matches += np.bincount(candidate[here], minlength=len(wanted))
        found.append(first + here)
    for wrong, problem, remedy in (
        (wanted[matches == 0], "lists {} keys that {} does not contain", "use the list that belongs to these shards"),
        (wanted[matches > 1], "lists {} keys that several samples of {} have", "convert the images under other names"),
    ):
        if len(wrong):
            examples = ", ".join(key.decode() for key in wrong[:3])
            raise UserError(f"{path} {problem.format(len(wrong), shards.root)}, such as {examples}; {remedy}.")
    return np.concatenate(found)


def _key(name: str) -> str:
    """Key that `pipeline.convert` makes from a file name: without the image's extension and without dots."""
    folder, slash, file = clean_key(name).rpartition("/")
    stem = posixpath.splitext(file)[0] if is_image(file) else file
    return folder + slash + stem.replace(".", "_")
