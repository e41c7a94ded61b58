"""Where images to convert come from: a `Source` lists them all and reads one by its address."""

import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from pipeline import textures
from pipeline.images import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Source:
    """Images with their classes; a million items take about 0.3 GB."""

    name: str
    items: list[tuple[str | None, str, tuple]]
    """(class or None, key, address) per image."""
    read: Callable[..., bytes]
    """read(*address) -> the encoded image; called from several threads."""


def textures_source(split: str, seed: int = 0) -> Source:
    """The built-in textures; see `pipeline.textures`."""
    classes = textures.CLASSES
    items = [
        (classes[number % len(classes)], f"{split}-{number:06d}", (seed, split, number))
        for number in range(textures.SPLITS[split])
    ]
    return Source(f"textures-{textures.VERSION}", items, textures.render)


def folder_source(path: Path) -> Source:
    """Class folders below a folder, or in an uncompressed tar: the class is the folder that holds the image.

    Images at the top, in no folder, have no class.

    Raises:
        UserError: there is no such folder or tar, or two images would get the same key.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: give the folder or tar that holds the images.")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_image(file.name) and file.is_file())
        named = ((file.relative_to(path).as_posix(), (file,)) for file in files)
        return Source(path.resolve().name, _named(named), Path.read_bytes)
    with _open_tar(path) as tar:
        items = _named((member.name, (member.offset_data, member.size)) for member in _image_members(tar))
    return Source(path.stem, items, _tar_reader(path))


def imagenet_source(path: Path) -> Source:
    """ILSVRC2012_img_train.tar: one tar per class inside a tar; only headers are read here.

    Raises:
        UserError: there is no such tar, it is not whole, or it holds no class tars.
    """

    def images() -> Iterator[tuple[str, tuple]]:
        with _open_tar(path) as outer:
            for class_tar in outer:
                if not class_tar.name.endswith(".tar"):
                    continue
                folder = posixpath.basename(class_tar.name).removesuffix(".tar")
                with tarfile.open(fileobj=outer.extractfile(class_tar), mode="r:") as inner:
                    for image in _image_members(inner):
                        yield f"{folder}/{image.name}", (class_tar.offset_data + image.offset_data, image.size)

    # ImageNet's file names are unique and carry their class: they are the keys of its published label subsets
    items = [(label, key.rpartition("/")[2], address) for label, key, address in _named(images())]
    if not items:
        raise UserError(f"{path} holds no class tars: for a tar of class folders use `convert folder`.")
    return Source("imagenet", items, _tar_reader(path))


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1][1:].lower() in IMAGE_SUFFIXES


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    if not path.is_file():
        raise UserError(f"There is no file {path}: give the tar that holds the images.")
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        cure = "unpack it first if it is a .gz or .xz, else download it again"
        raise UserError(f"{path} is not a whole, uncompressed tar ({error}): {cure}.") from error


def _image_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.isfile() and _is_image(member.name):
            yield member
        tar.members = []  # which tarfile would otherwise keep: 1 GB for a million images


def _tar_reader(path: Path) -> Callable[[int, int], bytes]:
    def read(offset: int, size: int) -> bytes:
        with open(path, "rb", buffering=0) as tar:  # opening costs 10 us; a file kept open would have to be closed
            tar.seek(offset)
            return tar.read(size)

    return read


def _named(files: Iterable[tuple[str, tuple]]) -> list[tuple[str | None, str, tuple]]:
    """(name, address) -> (class, key, address); a key has no dot and is unique, as WebDataset demands."""
    items, taken, classes = [], set(), {}
    for name, address in files:
        *folders, file = (part for part in name.split("/") if part not in ("", ".", ".."))
        folder = folders[-1] if folders else None
        folder = classes.setdefault(folder, folder)  # one string per class, not one per image
        stem = posixpath.splitext(file)[0].replace(".", "_")
        key = f"{folder}/{stem}" if folder else stem
        if key in taken:
            key = "/".join([*folders, file.replace(".", "_")])
        if key in taken:
            raise UserError(f"Two images would get the key {key}: rename one of them.")
        taken.add(key)
        items.append((folder, key, address))
    return items
