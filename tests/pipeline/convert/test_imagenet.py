"""ImageNet as distributed: labels and unusual files."""

import io
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import UserError
from pipeline.convert.imagenet import imagenet_sources, read_synsets
from pipeline.convert.writer import write_split
from pipeline.images.files import decode
from pipeline.shards.dataset import open_splits
from tests.pipeline.augment.reference_views import encode, smooth_field
from tests.pipeline.image_sets import (
    contents,
    devkit_files,
    in_form,
    pictures,
    rejected,
    run_here,
    synsets_mat,
    tar_bytes,
    write_folder,
    write_imagenet,
    write_tar,
)

WNIDS = ["n01440764", "n01443537", "n01484850"]


def validation_images(count: int = 6) -> dict[str, bytes]:
    images = list(pictures().values())
    return {f"ILSVRC2012_val_{number:08d}.JPEG": images[number - 1] for number in range(1, count + 1)}


@pytest.mark.parametrize("form", ["tar.gz", "folder"])
@pytest.mark.parametrize("images_form", ["tar", "folder"])
def test_validation_with_the_development_kit(tmp_path, form, images_form):
    files = validation_images()
    path = in_form(tmp_path, files, images_form)
    devkit = devkit_files(WNIDS, [3, 1, 2, 2, 1, 3])
    labels = (
        write_folder(tmp_path / "kit", devkit) if form == "folder" else write_tar(tmp_path / "kit.gz", devkit, "w:gz")
    )
    sources = imagenet_sources(path, labels)
    assert list(sources) == ["val"]
    shards = write_split(sources["val"], tmp_path / "out", "val")
    truth = [WNIDS[number - 1] for number in (3, 1, 2, 2, 1, 3)]
    expected = {name[:-5]: (wnid, files[name]) for name, wnid in zip(files, truth, strict=True)}
    assert contents(shards) == expected and shards.classes == WNIDS


def test_validation_with_text_files_of_synsets(tmp_path):
    files = validation_images()
    path = write_tar(tmp_path / "val.tar", dict(reversed(files.items())))  # a tar need not be sorted
    truth = [WNIDS[number % 3] for number in range(6)]
    texts = {
        "by number": "\n".join(truth) + "\n",
        "by name": "".join(f"val/{name} {wnid}\n" for name, wnid in reversed(list(zip(files, truth, strict=True)))),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")  # with the byte order mark that Windows adds
        shards = write_split(imagenet_sources(path, tmp_path / name)["val"], tmp_path / f"out {name}", "val")
        assert {key: label for key, (label, _) in contents(shards).items()} == dict(
            zip((name[:-5] for name in files), truth, strict=True)
        )
    kit = devkit_files(WNIDS, [1] * 6)
    without_mat = {name: content for name, content in kit.items() if not name.endswith(".mat")}
    write_folder(tmp_path / "kit", without_mat | {"data/synsets.txt": "\n".join(reversed(WNIDS)).encode()})
    items = imagenet_sources(path, tmp_path / "kit")["val"].items
    assert {label for label, _, _ in items} == {WNIDS[2]}


def test_labels_that_do_not_match(tmp_path):
    path = write_tar(tmp_path / "val.tar", validation_images())
    kit = devkit_files(WNIDS, [1, 2, 3])
    mat = "ILSVRC2012_devkit_t12/data/meta.mat"
    cases = {
        "too few": (write_folder(tmp_path / "few", kit), "names 3 images and ILSVRC2012_val_00000004 is none of them"),
        "no meta": (
            write_folder(tmp_path / "no meta", dict(list(kit.items())[:1])),
            "does not hold ILSVRC2012_val",
        ),
        "meta cut": (write_folder(tmp_path / "cut", kit | {mat: kit[mat][:300]}), "class numbers in .* can't be read"),
        "class 4": (write_folder(tmp_path / "4", devkit_files(WNIDS, [4] * 6)), "class numbers in .* can't be read"),
        "kit cut": (tmp_path / "kit.tar.gz", "is not a whole archive"),
        "missing": (tmp_path / "nowhere", "does not exist"),
    }
    (tmp_path / "kit.tar.gz").write_bytes(tar_bytes(kit, "w:gz")[:200])
    for text, message in (
        ("a b c\n", "must hold one"),
        ("a.JPEG n0\nn1\n", "per line, not `n1`"),
        ("a.JPEG n0\n", "lacks 6 images"),
        ("\xff", "names 1 images"),
    ):
        (tmp_path / message).write_text(text)
        cases[message] = tmp_path / message, message
    for labels, message in cases.values():
        with pytest.raises(UserError, match=message):
            imagenet_sources(path, labels)


def test_read_synsets(tmp_path):
    path = tmp_path / "meta.mat"
    path.write_bytes(synsets_mat(WNIDS * 100))
    assert read_synsets(path) == dict(enumerate(WNIDS * 100, start=1))


def test_damaged_synsets_are_refused_before_scipy_reads_them(tmp_path):
    """SciPy may crash on damaged files; without compression there is no checksum to notice damage by."""
    path, whole = tmp_path / "meta.mat", synsets_mat(WNIDS * 20)
    random = np.random.default_rng(0)
    cases = [synsets_mat(WNIDS, compressed=False), b"", whole[:130], synsets_mat(WNIDS, name="other")]
    for at in random.integers(128, len(whole), 60):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << random.integers(8)
        cases += [whole[:at], bytes(flipped)]
    for content in cases:
        path.write_bytes(content)
        with pytest.raises((ValueError, struct.error, zlib.error)):
            read_synsets(path)


def test_imagenet_folders(tmp_path):
    files = {name.replace("class_", "n0000000"): content for name, content in pictures().items()}
    val = {name: content for name, content in files.items() if name.startswith("n00000001")}
    write_folder(tmp_path / "in", {f"train/{n}": c for n, c in files.items()} | {f"val/{n}": c for n, c in val.items()})
    result = run_here("pipeline.convert", "imagenet", tmp_path / "in", tmp_path / "out", "--workers", "1")
    assert result.returncode == 0, result.stderr
    train, test = open_splits(str(tmp_path / "out"))
    for shards, images in ((train, files), (test, val)):
        expected = {name.split("/")[1].split(".")[0]: (name.split("/")[0], c) for name, c in images.items()}
        assert contents(shards) == expected and shards.manifest["name"] == "imagenet"
    write_folder(tmp_path / "flat", {f"val/{n.split('/')[1]}": c for n, c in val.items()})
    with pytest.raises(UserError, match=r"are not in class folders; convert .* with --labels"):
        imagenet_sources(tmp_path / "flat")


def test_tiny_imagenet(tmp_path):
    """train/<wnid>/images/*.JPEG, with boxes next to them; val/images/*.JPEG needs its labels."""
    files = {
        f"train/{name.replace('class_', 'n0000000').replace('/', '/images/')}": content
        for name, content in pictures().items()
    }
    boxes = {f"train/n0000000{number}/n0000000{number}_boxes.txt": b"x 0 0 9 9" for number in range(3)}
    path = write_folder(tmp_path / "in", files | boxes)
    sources = imagenet_sources(path)
    shards = write_split(sources["train"], tmp_path / "out", "train")
    expected = {name.split("/")[3].split(".")[0]: (name.split("/")[1], c) for name, c in files.items()}
    assert contents(shards) == expected and shards.classes == ["n00000000", "n00000001", "n00000002"]
    write_folder(path, {f"val/images/val_{n}.JPEG": c for n, c in enumerate(list(files.values())[:4])})
    with pytest.raises(
        UserError, match=r"val has folders that are not classes \(images\); use .* --labels FILE. for it"
    ):
        imagenet_sources(path)
    assert imagenet_sources(path, split="train")["train"].items == sources["train"].items
    result = run_here("pipeline.convert", "imagenet", path, tmp_path / "out", "--split", "train", "--workers", "1")
    assert result.returncode == 0 and "12 images of 3 classes" in result.stdout, result.stderr
    (tmp_path / "labels").write_text("".join(f"val_{n}.JPEG n0000000{n % 3}\n" for n in range(4)))
    val = write_split(imagenet_sources(path / "val", tmp_path / "labels")["val"], tmp_path / "out", "val")
    assert {key: label for key, (label, _) in contents(val).items()} == {
        f"val_{n}": f"n0000000{n % 3}" for n in range(4)
    }
    shutil.rmtree(path / "train")
    with pytest.raises(UserError, match=r"val has folders that are not classes \(images\)"):
        imagenet_sources(path)
    with pytest.raises(UserError, match=r"holds no train/; use `convert folder` for other class folders"):
        imagenet_sources(path, split="train")


def test_folders_inside_class_tars_are_not_classes(tmp_path):
    content = next(iter(pictures().values()))
    inner = {"n01.tar": tar_bytes({"a/n01_1.JPEG": content, "b/n01_2.JPEG": content})}
    for tars in inner, inner | {"n02.tar": tar_bytes({"c/d/n02_1.JPEG": content})}:
        items = imagenet_sources(write_tar(tmp_path / "in.tar", tars))["train"].items
        assert [(label, key) for label, key, _ in items] == [("n01", "n01_1"), ("n01", "n01_2"), ("n02", "n02_1")][
            : len(items)
        ]


def test_val_without_one_of_the_classes_has_the_labels_of_train(tmp_path):
    """In either order: each split knows the classes of both."""
    files = {name.replace("class_", "n0000000"): content for name, content in pictures().items()}
    val = {name: content for name, content in files.items() if not name.startswith("n00000000")}
    write_folder(tmp_path / "in", {f"train/{n}": c for n, c in files.items()} | {f"val/{n}": c for n, c in val.items()})
    for split in "val", "train":
        shards = write_split(imagenet_sources(tmp_path / "in")[split], tmp_path / "out", split)
        assert shards.classes == ["n00000000", "n00000001", "n00000002"]


LABELS = {
    "sorted synsets": (
        "kit",
        b"n01440764\nn01443537\nn01484850\n",
        "synsets.txt in .* is sorted, but class numbers",
    ),
    "synsets with names": (
        "kit",
        b"n01443537 goldfish\nn01440764 tench\nn01484850 shark\n",
        "numbers in .* can't be read",
    ),
    "class numbers": (
        "text",
        b"490\n361\n171\n822\n297\n482\n",
        "per line, not `490`; correct it, or use",
    ),
    "twice": (
        "text",
        b"".join(b"ILSVRC2012_val_%08d.JPEG n%d\n" % (n % 7, n > 7) for n in range(1, 14)),
        "names ILSVRC2012_val_00000001.JPEG twice, with different classes",
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_ambiguous_labels_are_refused(tmp_path, case):
    form, content, message = LABELS[case]
    path = write_tar(tmp_path / "val.tar", validation_images())
    labels = tmp_path / "labels"
    if form == "text":
        labels.write_bytes(content)
    else:
        kit = devkit_files(WNIDS, [3, 1, 2, 2, 1, 3])
        write_folder(labels, {n: c for n, c in kit.items() if not n.endswith(".mat")} | {"data/synsets.txt": content})
    with pytest.raises(UserError, match=message):
        imagenet_sources(path, labels)


def test_numbers_in_names_of_training_images_are_not_label_numbers(tmp_path):
    """n01440764_3 is not the third validation image."""
    kit = write_folder(tmp_path / "kit", devkit_files(WNIDS, [3, 1, 2, 2, 1, 3]))
    content = next(iter(pictures().values()))
    path = write_folder(tmp_path / "in", {"train/n01/n01_3.JPEG": content, "val/ILSVRC2012_val_00000001.JPEG": content})
    with pytest.raises(UserError, match=r"in holds train/, not the validation images; use \S+/in/val with --labels"):
        imagenet_sources(path, kit)
    assert [label for label, _, _ in imagenet_sources(path / "val", kit)["val"].items] == [WNIDS[2]]
    path = write_folder(tmp_path / "two", {"n01/n01_3.JPEG": content, "n02/n02_3.JPEG": content})
    with pytest.raises(UserError, match=r"n01_3 and n02_3 have the same number"):
        imagenet_sources(path, kit)


def test_unusual_files_of_imagenet(tmp_path):
    """CMYK, gray, a PNG named .JPEG and a rotated image keep their bytes, with the size that the decoder returns."""
    picture = smooth_field(0, 3, 40, 60)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # displayed rotated by 90 degrees
    odd = {
        "cmyk": encode(picture.convert("CMYK"), "JPEG"),
        "gray": encode(picture.convert("L"), "JPEG"),
        "png": encode(picture, "PNG"),
        "rotated": encode(picture, "JPEG", exif=rotated),
        "progressive": encode(picture, "JPEG", progressive=True),
    }
    jpeg = encode(picture, "JPEG")
    cut = {"cut_by_one": jpeg[:-1], "cut_in_half": jpeg[: len(jpeg) // 2], "cut_header": jpeg[:30]}
    path = write_imagenet(tmp_path / "in.tar", {f"n01/n01_{name}.JPEG": c for name, c in (odd | cut).items()})
    shards = write_split(imagenet_sources(path)["train"], tmp_path / "out", "train")
    stored = {key.removeprefix("n01_"): content for key, (_, content) in contents(shards).items()}
    assert stored == odd
    with tarfile.open(Path(shards.root, "train-000000.tar")) as tar:
        assert {name for name in tar.getnames() if name.endswith(".png")} == {"n01_png.png"}
    for row in shards.index:  # the orientation is ignored by the backends and by torchvision's loader
        assert (row["height"], row["width"]) == (40, 60)
    assert rejected(shards).keys() == {f"n01_{name}" for name in cut}
    for name, encoded in odd.items():
        reference = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.int64)
        assert np.abs(decode(encoded) - reference).max() <= 1, name
