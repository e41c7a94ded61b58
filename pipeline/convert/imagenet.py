"""ImageNet (ILSVRC 2012) as distributed: a tar of class tars, a flat validation tar, or unpacked folders."""

import posixpath
import re
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..common import UserError
from ..shards.archives import NOT_PLAIN, CheckedMember, image_members, members, open_tar, refuse_url, unpacked
from .base import Item, Source, modified_ns, read_range
from .folder import folder_source, named

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
COMPRESSED_ELEMENT = 15
"""Type of a compressed element in a MATLAB 5 file."""


def imagenet_sources(path: Path, labels: Path | None = None, split: str | None = None) -> dict[str, Source]:
    """The splits that `path` holds.

    Args:
        path: the tar of class tars ("train"); the flat validation tar or folder ("val", requires `labels`); or a folder
            that holds train/<wnid>/*.JPEG, val/<wnid>/*.JPEG or both.
        labels: labels of the validation images; see `validation_classes`.
        split: the only split needed; with "train", a val/ without class folders is ignored.

    Raises:
        UserError: `path` is none of these, is damaged, or holds links or paths that lead out of it; the class folders
            are ambiguous; or the labels do not match the images.
    """
    refuse_url(path)
    if labels is not None:
        return {"val": _validation_source(path, labels)}
    if not path.is_dir():
        return {"train": _train_source(path)}
    wanted = ("train",) if split == "train" else ("train", "val")
    sources = {name: _class_folders(path / name) for name in wanted if (path / name).is_dir()}
    if not sources:
        missing = "no train/" if split == "train" else "neither train/ nor val/"
        raise UserError(f"{path} holds {missing}; use `convert folder` for other class folders.")
    classes = {name: {label for label, _, _ in source.items} for name, source in sources.items()}
    train, val = (classes.get(name, set()) for name in ("train", "val"))
    if (foreign := sorted(val - train)) and ("train" in sources or len(val) == 1):
        raise UserError(
            f"{path}/val has folders that are not classes ({', '.join(foreign[:3])}); use `convert imagenet {path}/val "
            "OUT --labels FILE` for it and --split train for the rest."
        )
    # both splits get the same label numbers, even if val lacks a class
    return {name: replace(source, classes=sorted(train | val)) for name, source in sources.items()}


def _train_source(path: Path) -> Source:
    """ILSVRC2012_img_train.tar, a tar that holds one tar per class; only headers are read here."""
    left_out: list[tuple[str, str]] = []
    classes: list[str] = []  # one per image: the name of its class tar, regardless of folders inside

    def images() -> Iterator[tuple[str, tuple]]:
        with open_tar(path) as outer:
            for class_tar in members(outer, path):
                if not class_tar.name.endswith(".tar"):
                    continue
                if not class_tar.isfile():
                    left_out.append((class_tar.name, NOT_PLAIN))
                    continue
                folder, file = posixpath.basename(class_tar.name).removesuffix(".tar"), outer.extractfile(class_tar)
                try:
                    with tarfile.open(fileobj=file, mode="r:", tarinfo=CheckedMember, encoding="utf-8") as inner:
                        for image in image_members(inner, f"{path}:{class_tar.name}", left_out):
                            classes.append(folder)
                            yield f"{folder}/{image.name}", (class_tar.offset_data + image.offset_data, image.size)
                except tarfile.TarError as error:
                    raise tarfile.ReadError(f"{class_tar.name} in it: {error}") from error

    items = _by_file_name(named(images(), "none"), classes)
    if not items:
        raise UserError(
            f"{path} holds no class tars; use --labels for the validation images, or `convert folder` for a tar of "
            "class folders."
        )
    return Source("imagenet", items, partial(read_range, path), left_out=left_out, modified=modified_ns([path]))


def _class_folders(path: Path) -> Source:
    source = folder_source(path)
    classes = [label for label, _, _ in source.items]
    if None in classes:
        raise UserError(
            f"Images in {path} are not in class folders; convert {path} with --labels, and others with --split train."
        )
    return replace(source, name="imagenet", items=_by_file_name(source.items, classes))


def _validation_source(path: Path, labels: Path) -> Source:
    if inside := [name for name in ("train", "val") if (path / name).is_dir()]:
        # numbers in the names of training images would match labels, too
        raise UserError(f"{path} holds {inside[0]}/, not the validation images; use {path}/val with --labels.")
    source = folder_source(path, "none")
    if not source.items:
        raise UserError(f"{path} holds no images or only class tars, which need no labels; remove --labels.")
    classes = validation_classes(labels, [posixpath.basename(key) for _, key, _ in source.items])
    return replace(source, name="imagenet", items=_by_file_name(source.items, classes))


def _by_file_name(items: list[Item], classes: list[str]) -> list[Item]:
    """Set the classes of items, and use file names without their folder as keys, if they are unique.

    ImageNet's file names are unique and contain the class; its published label subsets refer to images by them.
    """
    short = [key.rpartition("/")[2] for _, key, _ in items]
    keys = short if len(set(short)) == len(items) else [key for _, key, _ in items]
    return [(label, key, address) for label, key, (_, _, address) in zip(classes, keys, items, strict=True)]


def validation_classes(labels: Path, names: list[str]) -> list[str]:
    """WordNet id of each validation image.

    Args:
        labels: the development kit (ILSVRC2012_devkit_t12.tar.gz or the folder unpacked from it), or a text file of
            either "<file name> <wnid>" lines or "<wnid>" lines, the latter in the order of the numbers in the images'
            names.
        names: image names without suffix, such as "ILSVRC2012_val_00000001".

    Raises:
        UserError: the labels cannot be read, or there is none for one of the images.
    """
    if not labels.exists():
        raise UserError(f"{labels} does not exist; use the development kit or a text file of synsets.")
    if labels.is_dir() or tarfile.is_tarfile(labels):
        return _numbered(labels, _devkit_classes(labels), names)
    try:
        rows = _rows(labels, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{labels} is neither a development kit nor a text file of synsets; download it again."
        ) from error
    if wrong := next((row for row in rows if len(row) != min(len(rows[0]), 2) or row[-1].isdigit()), None):
        raise UserError(
            f"{labels} must hold one `<file name> <wnid>` or one `<wnid>` per line, not `{' '.join(wrong)[:80]}`; "
            "correct it, or use the development kit, which defines the class numbers."
        )
    if not rows or len(rows[0]) == 1:
        return _numbered(labels, [wnid for (wnid,) in rows], names)
    by_name: dict[str, str] = {}
    for name, wnid in rows:
        if by_name.setdefault(posixpath.splitext(posixpath.basename(name))[0], wnid) != wnid:
            raise UserError(f"{labels} names {name} twice, with different classes; remove the wrong line.")
    if missing := [name for name in names if name not in by_name]:
        raise UserError(f"{labels} lacks {len(missing)} images, such as {missing[0]}; add them.")
    return [by_name[name] for name in names]


def _rows(path: Path, encoding: str = "utf-8") -> list[list[str]]:
    """Words of each line that is not empty."""
    return [line.split() for line in path.read_text(encoding).splitlines() if line.strip()]


def _numbered(labels: Path, classes: list[str], names: list[str]) -> list[str]:
    """Class of each image, determined by the number in its name."""
    owners: dict[int, str] = {}
    for name in names:
        number = int((re.findall(r"\d+", name) or [0])[-1])
        if not 1 <= number <= len(classes):
            raise UserError(f"{labels} names {len(classes)} images and {name} is none of them; use the right labels.")
        if number in owners:
            raise UserError(f"{owners[number]} and {name} have the same number in {labels}; use labels by file name.")
        owners[number] = name
    return [classes[number - 1] for number in owners]


def _devkit_classes(devkit: Path) -> list[str]:
    """WordNet ids in the order of the validation images; synsets.txt, one id per line, can replace meta.mat."""
    with tempfile.TemporaryDirectory() as scratch:
        files = unpacked(devkit, (GROUND_TRUTH, META, "synsets.txt"), Path(scratch))
        if GROUND_TRUTH not in files or not files.keys() & {META, "synsets.txt"}:
            raise UserError(f"{devkit} does not hold {GROUND_TRUTH} and {META}; use ILSVRC2012_devkit_t12.tar.gz.")
        try:
            if META in files:
                wnids = read_synsets(files[META])
            else:
                wnids = {number: wnid for number, (wnid,) in enumerate(_rows(files["synsets.txt"]), start=1)}
                if list(wnids.values()) == sorted(wnids.values()):  # the kit's numbers are not in alphabetical order
                    raise UserError(
                        f"synsets.txt in {devkit} is sorted, but class numbers refer to the order of ILSVRC2012_ID; "
                        f"use ILSVRC2012_devkit_t12.tar.gz, which holds {META}."
                    )
            return [wnids[int(number)] for number in files[GROUND_TRUTH].read_text().split()]
        except (struct.error, zlib.error, ValueError, KeyError, IndexError) as error:
            raise UserError(f"The class numbers in {devkit} can't be read ({error!r}); download it again.") from error


def read_synsets(path: Path) -> dict[int, str]:
    """Map ILSVRC2012_ID to WordNet id, from the struct array `synsets` in the development kit's meta.mat (MATLAB 5).

    Raises:
        ValueError, struct.error, zlib.error: the file is damaged or holds no such array.
    """
    from scipy.io import loadmat

    # Damage can make SciPy crash the process, so the checksums are verified first. The file consists of a header of 128
    # bytes and elements (type, size, content), of which only compressed ones, MATLAB's default, have a checksum.
    content, at = path.read_bytes(), 128
    while at < len(content):
        kind, size = struct.unpack_from("<II", content, at)
        element = content[at + 8 : at + 8 + size]
        if kind != COMPRESSED_ELEMENT or len(element) < size:
            raise ValueError(f"{META} is cut off or not a compressed MATLAB 5 file")
        zlib.decompress(element)
        at += 8 + size
    try:
        synsets = loadmat(path, variable_names=["synsets"], squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"no synsets in {META}: {error}") from error
