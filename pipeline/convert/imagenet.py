"""ImageNet (ILSVRC 2012) as it is distributed: a tar of class tars, a flat validation tar, or unpacked folders."""

import posixpath
import re
import struct
import tarfile
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..common import UserError
from ..shards.archives import NOT_PLAIN, CheckedMember, image_members, members, open_tar, refuse_url, unpacked
from .sources import FolderReader, Item, Source, TarReader, files_below, modified_ns, named

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"


def imagenet_sources(path: Path, labels: Path | None = None, split: str | None = None) -> dict[str, Source]:
    """The splits that a path holds.

    Args:
        path: the tar of class tars ("train"), the flat validation tar or folder ("val", with `labels`), or a folder
            of train/<wnid>/*.JPEG and val/<wnid>/*.JPEG (those of the two that are there).
        labels: of the validation images, as `validation_classes` takes them.
        split: the only one that is wanted, so that a val/ without class folders does not stop "train".

    Raises:
        UserError: `path` is none of these, not whole, or holds links or paths that lead out of it; the classes of
            folders are ambiguous; or the labels don't belong to the images.
    """
    refuse_url(path)
    if labels is not None:
        return {"val": _validation_source(path, labels)}
    if not path.is_dir():
        return {"train": _train_source(path)}
    splits = {split: _class_folders(path / split) for split in ("train", "val") if (path / split).is_dir()}
    if not splits:
        raise UserError(f"{path} holds neither train/ nor val/: for other class folders use `convert folder`.")
    if split == "train":
        splits.pop("val", None)  # of which nothing is needed
    found = {name: {label for label, _, _ in source.items} for name, source in splits.items()}
    classes, val = found.get("train", found.get("val")), found.get("val", set())
    if not val <= classes or ("train" not in found and len(val) == 1):
        folders = ", ".join(sorted(val - found.get("train", set()))[:3])
        raise UserError(
            f"{path}/val has folders that are not classes ({folders}); use `convert imagenet {path}/val OUT --labels "
            "FILE` for it, and --split train for the rest."
        )
    # the same numbers in both, also where val lacks a class
    return {name: replace(source, classes=sorted(classes)) for name, source in splits.items()}


def _train_source(path: Path) -> Source:
    """ILSVRC2012_img_train.tar: one tar per class inside a tar; only headers are read here."""
    left_out: list[tuple[str, str]] = []
    classes: list[str] = []  # of the images, whatever folders lie inside a class tar

    def images() -> Iterator[tuple[str, tuple]]:
        with open_tar(path) as outer:
            for class_tar in members(outer, path):
                if class_tar.name.endswith(".tar") and class_tar.isfile():
                    folder = posixpath.basename(class_tar.name).removesuffix(".tar")
                    try:
                        file = outer.extractfile(class_tar)
                        with tarfile.open(fileobj=file, mode="r:", tarinfo=CheckedMember) as inner:
                            for image in image_members(inner, f"{path}:{class_tar.name}", left_out):
                                classes.append(folder)
                                yield f"{folder}/{image.name}", (class_tar.offset_data + image.offset_data, image.size)
                    except tarfile.TarError as error:
                        raise tarfile.ReadError(f"{class_tar.name} in it: {error}") from error
                elif class_tar.name.endswith(".tar"):
                    left_out.append((class_tar.name, NOT_PLAIN))

    items = named(images(), "none")
    items = _by_file_name([(label, key, address) for label, (_, key, address) in zip(classes, items, strict=True)])
    if not items:
        raise UserError(
            f"{path} holds no class tars: for the validation images give --labels, "
            "for a tar of class folders use `convert folder`."
        )
    return Source("imagenet", items, TarReader(path), left_out=left_out, modified=modified_ns([path]))


def _class_folders(path: Path) -> Source:
    left_out: list[tuple[str, str]] = []
    modified = array("q")
    items = named(files_below(path, left_out, modified))
    if any(label is None for label, _, _ in items):
        raise UserError(f"Images in {path} lie in no class folder: give their classes by --labels.")
    return Source("imagenet", _by_file_name(items), FolderReader(path), left_out=left_out, modified=modified)


def _validation_source(path: Path, labels: Path) -> Source:
    left_out: list[tuple[str, str]] = []
    others: list[str] = []
    modified = array("q")
    if inside := [name for name in ("train", "val") if (path / name).is_dir()]:  # numbers in other names would fit, too
        raise UserError(f"{path} holds {inside[0]}/, not the validation images; pass {path}/val with --labels.")
    if path.is_dir():
        items, read = named(files_below(path, left_out, modified), "none"), FolderReader(path)
    else:
        with open_tar(path) as tar:
            images = image_members(tar, path, left_out, others)
            items = named(((member.name, (member.offset_data, member.size)) for member in images), "none")
        read = TarReader(path)
        modified.extend(modified_ns([path]))
    if not items and any(name.endswith(".tar") for name in others):
        raise UserError(f"{path} holds class tars, which need no labels: leave --labels out.")
    items = _by_file_name(items)
    classes = validation_classes(labels, [key for _, key, _ in items])
    labeled = [(label, key, address) for label, (_, key, address) in zip(classes, items, strict=True)]
    return Source("imagenet", labeled, read, left_out=left_out, modified=modified)


def _by_file_name(items: list[Item]) -> list[Item]:
    """ImageNet's file names are unique and carry their class: they are the keys of its published label subsets."""
    short = [(label, key.rpartition("/")[2], address) for label, key, address in items]
    return short if len({key for _, key, _ in short}) == len(items) else items  # other images in ImageNet's layout


def validation_classes(labels: Path, keys: list[str]) -> list[str]:
    """The WordNet id of every validation image.

    Args:
        labels: the development kit (ILSVRC2012_devkit_t12.tar.gz or the folder unpacked from it), or a text of
            either one "<file name> <wnid>" per image or one "<wnid>" per image in the order of the numbers in the
            images' names.
        keys: names without suffix, "ILSVRC2012_val_00000001".

    Raises:
        UserError: the labels can't be read, or lack one of the images.
    """
    if not labels.exists():
        raise UserError(f"{labels} does not exist: give the development kit or a text of synsets.")
    if labels.is_dir() or tarfile.is_tarfile(labels):
        return _numbered(labels, _devkit_classes(labels), keys)
    try:
        rows = [line.split() for line in labels.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{labels} is neither a development kit nor a text of synsets: download it again.") from error
    if numeric := next((row[-1] for row in rows if row[-1].isdigit()), ""):
        raise UserError(
            f"{labels} holds class numbers such as {numeric}, not WordNet ids; use the development kit, which says "
            "what the numbers mean."
        )
    if all(len(row) == 1 for row in rows):
        return _numbered(labels, [wnid for (wnid,) in rows], keys)
    if any(len(row) != 2 for row in rows):
        raise UserError(f"{labels} must hold one `<file name> <wnid>` or one `<wnid>` per line: correct it.")
    by_name: dict[str, str] = {}
    for name, wnid in rows:
        if by_name.setdefault(posixpath.splitext(posixpath.basename(name))[0], wnid) != wnid:
            raise UserError(f"{labels} names {name} twice, with different classes; remove the wrong line.")
    names = [posixpath.basename(key) for key in keys]
    if missing := [name for name in names if name not in by_name]:
        raise UserError(f"{labels} lacks {len(missing)} images, the first {missing[0]}: add them.")
    return [by_name[name] for name in names]


def _numbered(labels: Path, classes: list[str], keys: list[str]) -> list[str]:
    """The class of each image by the number in its name."""
    numbers = [int(digits[-1]) if (digits := re.findall(r"\d+", key)) else 0 for key in keys]
    if beyond := [key for key, number in zip(keys, numbers, strict=True) if not 1 <= number <= len(classes)]:
        raise UserError(f"{labels} names {len(classes)} images and {beyond[0]} is none of them: give the right labels.")
    owners: dict[int, str] = {}
    for key, number in zip(keys, numbers, strict=True):
        if (other := owners.setdefault(number, key)) is not key:
            raise UserError(f"{other} and {key} have the same number in {labels}; use labels by file name.")
    return [classes[number - 1] for number in numbers]


def _devkit_classes(devkit: Path) -> list[str]:
    """WordNet ids in the order of the validation images; a synsets.txt, one id per line, may stand for meta.mat."""
    with tempfile.TemporaryDirectory() as scratch:
        files = unpacked(devkit, (GROUND_TRUTH, META, "synsets.txt"), Path(scratch))
        if GROUND_TRUTH not in files or not files.keys() & {META, "synsets.txt"}:
            raise UserError(f"{devkit} holds no {GROUND_TRUTH} with {META}: give ILSVRC2012_devkit_t12.tar.gz.")
        try:
            if META in files:
                wnids = read_synsets(files[META].read_bytes())
            else:
                rows = [line.split() for line in files["synsets.txt"].read_text().splitlines() if line.strip()]
                wnids = {number: wnid for number, (wnid,) in enumerate(rows, start=1)}
                if list(wnids.values()) == sorted(wnids.values()):  # the devkit's numbers follow no alphabet
                    raise UserError(
                        f"synsets.txt in {devkit} is sorted, so it is not in the order of ILSVRC2012_ID that the class "
                        f"numbers refer to; use ILSVRC2012_devkit_t12.tar.gz, which holds {META}."
                    )
            return [wnids[int(number)] for number in files[GROUND_TRUTH].read_text().split()]
        except (struct.error, zlib.error, ValueError, KeyError, IndexError) as error:
            raise UserError(f"The class numbers in {devkit} can't be read ({error!r}): download it again.") from error


def read_synsets(content: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> WordNet id, from the struct array `synsets` in the development kit's meta.mat (MATLAB 5)."""
    # a MATLAB 5 file: 128 bytes of header, then elements (type, size, content padded to 8 bytes)
    for kind, data in _elements(content[128:]):
        if kind == _COMPRESSED:
            kind, data = next(_elements(zlib.decompress(data)))
        if kind != _MATRIX:
            continue
        flags, _, name, *rest = _elements(data)
        if name[1] == b"synsets" and flags[1][0] == _STRUCT:
            width = struct.unpack("<i", rest[0][1])[0]
            fields = [rest[1][1][at : at + width].rstrip(b"\0") for at in range(0, len(rest[1][1]), width)]
            values = [value for _, value in rest[2:]]
            number, wnid = fields.index(b"ILSVRC2012_ID"), fields.index(b"WNID")
            structs = [values[at : at + len(fields)] for at in range(0, len(values), len(fields))]
            return {int(_array(row[number])[0]): "".join(map(chr, _array(row[wnid]))) for row in structs}
    raise ValueError("no synsets in meta.mat")


_MATRIX, _COMPRESSED, _STRUCT = 14, 15, 2
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q", 16: "B", 17: "H"}
"""MATLAB's element types as the struct module names them; 16 and 17 are UTF-8 and UTF-16, here of ASCII."""


def _array(matrix: bytes) -> tuple:
    """The numbers, or the codes of the characters, of a numeric or character matrix."""
    _, _, _, (kind, data) = _elements(matrix)
    code = _NUMBERS[kind]
    return struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # small: type and size share one word, and the content is the other
            kind, size = kind & 0xFFFF, kind >> 16
            yield kind, data[at + 4 : at + 4 + size]
            at += 8
        else:
            if at + 8 + size > len(data):
                raise ValueError("meta.mat ends early")
            yield kind, data[at + 8 : at + 8 + size]
            at += 8 + (size if kind == _COMPRESSED else -(-size // 8) * 8)
