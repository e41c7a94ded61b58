"""Small image collections in every form that the converter supports, and the content of shard sets."""

import csv
import hashlib
import importlib
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import ClassVar

import numpy as np
import webdataset
from scipy.io import savemat

from pipeline.shards.dataset import ShardSet
from tests.pipeline.augment.reference_views import encode, smooth_field

ROOT = Path(__file__).parents[2]


def pictures(classes: int = 3, each: int = 4) -> dict[str, bytes]:
    """`class_0/image_0.jpg` and so on: JPEGs of several sizes and one PNG."""
    files = {}
    for number in range(classes * each):
        picture = smooth_field(0, number, 20 + 4 * (number % 3), 28 - 2 * (number % 5))
        form, suffix = ("PNG", "png") if number == 2 else ("JPEG", "jpg")
        files[f"class_{number % classes}/image_{number}.{suffix}"] = encode(picture, form)
    return files


def damaged() -> dict[str, bytes]:
    """Reason -> image that must be left out."""
    picture = smooth_field(0, 99, 100, 100)
    jpeg = encode(picture, "JPEG")
    avif = encode(picture, "AVIF")
    return {
        "broken": avif[:81] + b"\xff" + avif[82:],  # Pillow raises a RuntimeError
        "truncated": jpeg[: len(jpeg) // 2],
        "headless": jpeg[100:],
        "empty": b"",
        "text": b"this is not an image",
        "animation": encode(picture, "GIF"),
        "float": encode(picture.convert("F"), "TIFF"),  # readable by Pillow but by no backend
    }


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.write_bytes(tar_bytes(files, mode))
    return path


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def write_imagenet(path: Path, files: dict[str, bytes]) -> Path:
    """Write a tar of class tars, like ILSVRC2012_img_train.tar."""
    classes = sorted({name.split("/")[0] for name in files})
    inner = {label: {n.split("/")[1]: c for n, c in files.items() if n.startswith(f"{label}/")} for label in classes}
    return write_tar(path, {f"{label}.tar": tar_bytes(members) for label, members in inner.items()})


def contents(shards: ShardSet) -> dict[str, tuple[str | None, bytes]]:
    """key -> (class or None, encoded image), read with tarfile only."""
    files = {}
    for shard in shards.manifest["shards"]:
        with tarfile.open(Path(shards.root, shard["file"])) as tar:
            files |= {member.name: tar.extractfile(member).read() for member in tar}
    found = {}
    for name, content in files.items():
        key, extension = name.rsplit(".", 1)
        if extension != "cls":
            label = files.get(f"{key}.cls")
            found[key] = (None if label is None else shards.classes[int(label)], content)
    return found


def run_module(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Run `python -m` with one of the project's modules."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def run_here(module: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run a module's command line like `run_module`, but in this process, which saves the second that imports take."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = [module, *map(str, arguments)], None
    try:
        with redirect_stdout(out), redirect_stderr(err):
            importlib.import_module(f"{module}.__main__").main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    if isinstance(code, str):
        print(code, file=err)
    return subprocess.CompletedProcess(module, int(bool(code)), out.getvalue(), err.getvalue())


def rejected(shards: ShardSet) -> dict[str, str]:
    """name -> reason, from rejected.csv."""
    with open(Path(shards.root, "rejected.csv"), newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "reason"] and len(rows) == shards.manifest["rejected"]
    return dict(rows)


def digests(split: Path) -> dict[str, str]:
    """SHA-256 of every file of a split."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(split.iterdir())}


class _Global:
    """A name that a pickle refers to, even if this Python does not have it."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Pickle requires a callable."""


class _Array:
    """Pickles like a uint8 array in numpy 1."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __reduce__(self) -> tuple:
        state = (1, self.pixels.shape, _Dtype(), False, self.pixels.tobytes())
        return _Global("numpy.core.multiarray", "_reconstruct"), (_Global("numpy", "ndarray"), (0,), b"b"), state


class _Dtype:
    def __reduce__(self) -> tuple:
        return _Global("numpy", "dtype"), (b"u1", 0, 1), (3, b"|", None, None, None, -1, -1, 0)


class _Python2Pickler(pickle._Pickler):
    """Writes bytes like the `str` of Python 2, which the CIFAR batches contain."""

    def save_bytes(self, content: bytes) -> None:
        short = len(content) < 256
        head = pickle.SHORT_BINSTRING + bytes([len(content)]) if short else pickle.BINSTRING
        self.write((head if short else head + struct.pack("<i", len(content))) + content)
        self.memoize(content)

    def save_name(self, name: _Global) -> None:
        self.write(pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode())

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_bytes, _Global: save_name}


def cifar_pickle(content: object) -> bytes:
    """Pickle like Python 2."""
    if isinstance(content, dict):
        content = {key: _Array(value) if isinstance(value, np.ndarray) else value for key, value in content.items()}
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def cifar_files(kind: int, each: int, seed: int = 0) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list]]]:
    """Files of the Python version with `each` images per batch, and split -> ((N, 32, 32, 3) uint8, classes)."""
    random = np.random.default_rng(seed)
    folder = {10: "cifar-10-batches-py", 100: "cifar-100-python"}[kind]
    batches = {
        10: {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
        100: {"train": ["train"], "test": ["test"]},
    }[kind]
    names = [b"class %02d" % number for number in range(kind)]
    labels_key, names_key, meta = {
        10: (b"labels", b"label_names", "batches.meta"),
        100: (b"fine_labels", b"fine_label_names", "meta"),
    }[kind]
    files = {f"{folder}/{meta}": cifar_pickle({names_key: names, b"num_vis": 3072}), f"{folder}/readme.html": b"<p>"}
    truth = {}
    for split, batch_names in batches.items():
        images, labels = [], []
        for name in batch_names:
            pixels = random.integers(0, 256, (each, 32, 32, 3), np.uint8)
            numbers = random.integers(0, kind, each).tolist()
            # distributed as rows of 3072 values: red, green and blue plane, each row by row
            rows = np.stack([np.concatenate([image[..., channel].ravel() for channel in range(3)]) for image in pixels])
            batch = {b"data": rows, labels_key: numbers, b"batch_label": name.encode(), b"filenames": [b"x.png"] * each}
            if kind == 100:
                batch[b"coarse_labels"] = [number // 5 for number in numbers]
            files[f"{folder}/{name}"] = cifar_pickle(batch)
            images.append(pixels)
            labels += [names[number].decode() for number in numbers]
        truth[split] = np.concatenate(images), labels
    return files, truth


def stl10_files(each: int) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list]]]:
    """Files of the binary version, and split -> ((N, 96, 96, 3) uint8, classes or None)."""
    random = np.random.default_rng(1)
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    files = {"stl10_binary/class_names.txt": "\n".join(names).encode() + b"\n", "stl10_binary/fold_indices.txt": b"0"}
    truth = {}
    for split in ("train", "test", "unlabeled"):
        pixels = random.integers(0, 256, (each, 96, 96, 3), np.uint8)
        # distributed column by column: red, green and blue plane
        planes = [image[:, column, channel] for image in pixels for channel in range(3) for column in range(96)]
        files[f"stl10_binary/{split}_X.bin"] = np.concatenate(planes).tobytes()
        labels: list = [None] * each
        if split != "unlabeled":
            numbers = random.integers(0, 10, each)
            files[f"stl10_binary/{split}_y.bin"] = (numbers + 1).astype(np.uint8).tobytes()
            labels = [names[number] for number in numbers]
        truth[split] = pixels, labels
    return files, truth


def synsets_mat(wnids: list[str], compressed: bool = True, name: str = "synsets") -> bytes:
    """A MATLAB 5 file with a struct array of some fields of the development kit's `synsets`."""
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    synsets = [(float(number), wnid, f"words of {wnid}") for number, wnid in enumerate(wnids, start=1)]
    file = io.BytesIO()
    savemat(file, {"other": 0.5, name: np.array(synsets, fields)}, do_compression=compressed)
    return file.getvalue()


def devkit_files(wnids: list[str], numbers: list[int]) -> dict[str, bytes]:
    """Development kit: class numbers of the validation images and their WordNet ids."""
    data = "ILSVRC2012_devkit_t12/data"
    return {
        f"{data}/ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in numbers).encode(),
        f"{data}/meta.mat": synsets_mat(wnids),
        "ILSVRC2012_devkit_t12/readme.txt": b"nothing",
    }


def with_manifest(root: Path, copy: Path, change: Callable[[dict], None]) -> Path:
    shutil.copytree(root, copy)
    manifest = json.loads((copy / "dataset.json").read_text())
    change(manifest)
    (copy / "dataset.json").write_text(json.dumps(manifest))
    return copy


def in_form(tmp_path: Path, files: dict[str, bytes], form: str) -> Path:
    """Write files as an archive or as the folder unpacked from it."""
    if form == "folder":
        return write_folder(tmp_path / "unpacked", files)
    return write_tar(tmp_path / f"archive.{form}", files, "w:gz" if form == "tar.gz" else "w")


def read_by_webdataset(root: Path) -> dict[str, dict[str, bytes]]:
    """key -> {extension: content}, grouped by the webdataset library."""
    tars = [str(path) for path in sorted(root.glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    return {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("_")} for s in samples}
