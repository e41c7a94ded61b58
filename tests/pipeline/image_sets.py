"""Small image collections in every form that the converter takes, and what is in a shard set."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

from pipeline.shards import ShardSet
from tests.pipeline.reference_views import encode, smooth_field

ROOT = Path(__file__).parents[2]


def pictures(classes: int = 3, each: int = 4) -> dict[str, bytes]:
    """`class_0/image_0.jpg` and so on: JPEGs of a few sizes, one PNG among them."""
    files = {}
    for number in range(classes * each):
        picture = smooth_field(0, number, 20 + 4 * (number % 3), 28 - 2 * (number % 5))
        form, suffix = ("PNG", "png") if number == 2 else ("JPEG", "jpg")
        files[f"class_{number % classes}/image_{number}.{suffix}"] = encode(picture, form)
    return files


def damaged() -> dict[str, bytes]:
    """Images that must be left out, by the reason for it."""
    picture = smooth_field(0, 99, 100, 100)
    jpeg = encode(picture, "JPEG")
    return {
        "truncated": jpeg[: len(jpeg) // 2],
        "headless": jpeg[100:],
        "empty": b"",
        "text": b"this is not an image",
        "animation": encode(picture, "GIF"),
        "float": encode(picture.convert("F"), "TIFF"),  # Pillow reads it, no backend does
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
    """A tar of class tars, as ILSVRC2012_img_train.tar is one."""
    classes = sorted({name.split("/")[0] for name in files})
    inner = {label: {n.split("/")[1]: c for n, c in files.items() if n.startswith(f"{label}/")} for label in classes}
    return write_tar(path, {f"{label}.tar": tar_bytes(members) for label, members in inner.items()})


def contents(shards: ShardSet) -> dict[str, tuple[str | None, bytes]]:
    """key -> (class or None, encoded image) by reading the tars with tarfile alone."""
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
    """`python -m` of one of the project's modules, in a process of its own."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
