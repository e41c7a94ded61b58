"""Parts of a shard set, for training with few labels: what `ViewLoader` takes as `samples`."""

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
    """Which images are used with their labels."""

    fraction: float = 1.0
    """Share of the labeled images, class-balanced, drawn by --seed; 0.01 is part of 0.1."""
    keys: str = ""
    """File that lists the images instead, one key per line, such as SimCLR's lists of 1 % and 10 % of ImageNet."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"--labels.fraction is {self.fraction}; use a fraction above 0 and at most 1.")


SUBSET_STREAM = 2**32 - 5  # of random numbers: apart from order, views, conversion and replacements


def labeled_subset(shards: ShardSet, labels: LabelsConfig, seed: int) -> np.ndarray:
    """(n,) int64, ascending: the samples whose labels are used.

    Raises:
        UserError: the listed images are not in the set or have no label, or the set has no labels.
    """
    if not labels.keys:
        return label_subset(shards.index["label"], labels.fraction, seed)
    samples = keys_subset(shards, Path(labels.keys))
    if unlabeled := int((shards.index["label"][samples] < 0).sum()):
        raise UserError(f"{labels.keys} lists {unlabeled} images of {shards.root} without a label; remove them.")
    return samples


def label_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A class-balanced share of the labeled samples, as for the 1 % and 10 % of arXiv 2002.05709, section 6.

    One sample of every class is taken after the other, in rounds, until there are enough: class sizes differ by at most
    one, except that a class with too few samples gives all it has. A smaller fraction is contained in a larger one of
    the same seed.

    Args:
        labels: (N,) integers; -1 for none.
        fraction: of the labeled samples, 0 < fraction <= 1.
        seed: which samples, and which classes get one more than others.

    Returns:
        (n,) int64, ascending: n = round(fraction * labeled), but at least one sample of every class.

    Raises:
        UserError: the fraction is none, or there are no labels.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"A share of {fraction:g} of the labels can't be taken: give one above 0 and up to 1.")
    labeled = np.flatnonzero(labels >= 0)
    if not len(labeled):
        raise UserError("The data set has no labels of which to take a share: give labeled shards.")
    classes, label, counts = np.unique(labels[labeled], return_inverse=True, return_counts=True)
    by_class = np.lexsort((uniforms(seed, 0, labeled, SUBSET_STREAM, 1)[:, 0], label))
    label = label[by_class]
    turn = np.arange(len(label)) - (np.cumsum(counts) - counts)[label]  # the round in which a sample is taken
    place = uniforms(seed, 1, classes, SUBSET_STREAM, 1)[:, 0]  # of its class in the round
    taken = np.lexsort((label, place[label], turn))[: max(round(fraction * len(labeled)), len(classes))]
    return np.sort(labeled[by_class[taken]])


def keys_subset(shards: ShardSet, path: Path) -> np.ndarray:
    """The samples that a text names by their keys, one a line, with or without the extension of the image's file.

    Such are the published subsets of ImageNet's labels ("n01440764_10183.JPEG"), whose names `pipeline.convert` keeps.

    Returns:
        (n,) int64, ascending.

    Raises:
        UserError: the text can't be read or is empty, or the shard set has not exactly one sample of each name.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]  # Windows marks UTF-8
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}): give a text with one key a line.") from error
    if not (wanted := np.array(sorted({_key(name).encode() for name in names if name}))).size:
        raise UserError(f"{path} is empty: give a text with one key a line.")
    found, times = [], np.zeros(len(wanted), np.int64)
    for first in range(0, len(shards), ROWS):
        keys = shards.index["key"][first : first + ROWS]
        place = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        (here,) = np.nonzero(wanted[place] == keys)
        times += np.bincount(place[here], minlength=len(wanted))
        found.append(first + here)
    for wrong, what, cure in (
        (wanted[times == 0], "names {} keys that {} has not", "give the list that belongs to these shards"),
        (wanted[times > 1], "names {} keys that several samples of {} have", "convert the images with other names"),
    ):
        if len(wrong):
            first_ones = ", ".join(key.decode() for key in wrong[:3])
            raise UserError(f"{path} {what.format(len(wrong), shards.root)}, the first {first_ones}: {cure}.")
    return np.concatenate(found)


def _key(name: str) -> str:
    """As `pipeline.convert.sources.named` makes keys: without the image's extension and without dots."""
    folder, slash, file = clean_key(name).rpartition("/")
    stem = posixpath.splitext(file)[0] if is_image(file) else file
    return folder + slash + stem.replace(".", "_")
