"""Published data sets, byte for byte as they are distributed, through the converter; and what an archive may hide."""

import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset
from PIL import Image

from errors import UserError
from pipeline.imagenet import imagenet_sources, read_synsets
from pipeline.images import DecodeError, decode, inspect, png
from pipeline.pixel_sets import cifar_sources, stl10_sources
from pipeline.shard_index import index_shards
from pipeline.shards import open_shards, open_splits
from pipeline.sources import FolderReader, folder_source, textures_source, webdataset_source
from pipeline.writer import write_split
from tests.pipeline.image_sets import (
    cifar_files,
    cifar_pickle,
    contents,
    devkit_files,
    pictures,
    rejected,
    run_module,
    stl10_files,
    synsets_mat,
    tar_bytes,
    write_folder,
    write_imagenet,
    write_tar,
)
from tests.pipeline.reference_views import encode, smooth_field

WNIDS = ["n01440764", "n01443537", "n01484850"]


def in_form(tmp_path: Path, files: dict[str, bytes], form: str) -> Path:
    """The archive as it is downloaded, or the folder unpacked from it."""
    if form == "folder":
        return write_folder(tmp_path / "unpacked", files)
    return write_tar(tmp_path / f"archive.{form}", files, "w:gz" if form == "tar.gz" else "w")


def validation_images(count: int = 6) -> dict[str, bytes]:
    images = list(pictures().values())
    return {f"ILSVRC2012_val_{number:08d}.JPEG": images[number - 1] for number in range(1, count + 1)}


@pytest.mark.parametrize("form", ["tar.gz", "folder"])
@pytest.mark.parametrize("images_form", ["tar", "folder"])
def test_imagenet_validation_with_the_development_kit(tmp_path, form, images_form):
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


def test_imagenet_validation_with_texts_of_synsets(tmp_path):
    files = validation_images()
    path = write_tar(tmp_path / "val.tar", dict(reversed(files.items())))  # a tar need not be sorted
    truth = [WNIDS[number % 3] for number in range(6)]
    texts = {
        "by number": "\n".join(truth) + "\n",
        "by name": "".join(f"val/{name} {wnid}\n" for name, wnid in reversed(list(zip(files, truth, strict=True)))),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        shards = write_split(imagenet_sources(path, tmp_path / name)["val"], tmp_path / f"out {name}", "val")
        assert {key: label for key, (label, _) in contents(shards).items()} == dict(
            zip((name[:-5] for name in files), truth, strict=True)
        )
    kit = devkit_files(WNIDS, [1] * 6)
    without_mat = {name: content for name, content in kit.items() if not name.endswith(".mat")}
    write_folder(tmp_path / "kit", without_mat | {"data/synsets.txt": "\n".join(reversed(WNIDS)).encode()})
    items = imagenet_sources(path, tmp_path / "kit")["val"].items
    assert {label for label, _, _ in items} == {WNIDS[2]}


def test_imagenet_labels_that_do_not_belong(tmp_path):
    path = write_tar(tmp_path / "val.tar", validation_images())
    kit = devkit_files(WNIDS, [1, 2, 3])
    mat = "ILSVRC2012_devkit_t12/data/meta.mat"
    cases = {
        "too few": (write_folder(tmp_path / "few", kit), "names 3 images and ILSVRC2012_val_00000004 is none of them"),
        "no meta": (write_folder(tmp_path / "no meta", dict(list(kit.items())[:1])), "holds no ILSVRC2012_validation"),
        "meta cut": (write_folder(tmp_path / "cut", kit | {mat: kit[mat][:300]}), "class numbers in .* can't be read"),
        "class 4": (write_folder(tmp_path / "4", devkit_files(WNIDS, [4] * 6)), "class numbers in .* can't be read"),
        "kit cut": (tmp_path / "kit.tar.gz", "is not a whole archive"),
        "missing": (tmp_path / "nowhere", "does not exist"),
    }
    (tmp_path / "kit.tar.gz").write_bytes(tar_bytes(kit, "w:gz")[:200])
    for text, message in (("a b c\n", "must hold one"), ("a.JPEG n0\n", "lacks 6 images"), ("\xff", "names 1 images")):
        (tmp_path / message).write_text(text)
        cases[message] = tmp_path / message, message
    for labels, message in cases.values():
        with pytest.raises(UserError, match=message):
            imagenet_sources(path, labels)


def test_synsets_of_a_meta_file():
    """The compressed form is the published one; scipy.io.loadmat gave the same on it."""
    for compressed in True, False:
        assert read_synsets(synsets_mat(WNIDS * 100, compressed)) == dict(enumerate(WNIDS * 100, start=1))


def test_imagenet_folders(tmp_path):
    files = {name.replace("class_", "n0000000"): content for name, content in pictures().items()}
    val = {name: content for name, content in files.items() if name.startswith("n00000001")}
    write_folder(tmp_path / "in", {f"train/{n}": c for n, c in files.items()} | {f"val/{n}": c for n, c in val.items()})
    result = run_module("pipeline.convert", "imagenet", tmp_path / "in", tmp_path / "out", "--workers", "1")
    assert result.returncode == 0, result.stderr
    train, test = open_splits(str(tmp_path / "out"))
    for shards, given in ((train, files), (test, val)):
        expected = {name.split("/")[1].split(".")[0]: (name.split("/")[0], c) for name, c in given.items()}
        assert contents(shards) == expected and shards.manifest["name"] == "imagenet"
    write_folder(tmp_path / "flat", {f"val/{n.split('/')[1]}": c for n, c in val.items()})
    with pytest.raises(UserError, match=r"lie in no class folder: give their classes by --labels"):
        imagenet_sources(tmp_path / "flat")


def test_oddities_of_imagenet(tmp_path):
    """CMYK, gray, a PNG that is named .JPEG, a turned one: stored as they are, with the size that the decoder gives."""
    picture = smooth_field(0, 3, 40, 60)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees
    odd = {
        "cmyk": encode(picture.convert("CMYK"), "JPEG"),
        "gray": encode(picture.convert("L"), "JPEG"),
        "png": encode(picture, "PNG"),
        "turned": encode(picture, "JPEG", exif=turned),
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
    for row in shards.index:  # not turned: neither the backends nor torchvision's loader do
        assert (row["height"], row["width"]) == (40, 60)
    assert rejected(shards).keys() == {f"n01_{name}" for name in cut}
    for name, encoded in odd.items():
        reference = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.int64)
        assert np.abs(decode(encoded) - reference).max() <= 1, name


@pytest.mark.parametrize("name", ["textures", "cifar", "stl10"])
def test_pngs_of_another_opencv_are_not_mixed_in(tmp_path, monkeypatch, name):
    """It may encode the same pixels to other bytes: an interrupted conversion goes on under the same version only."""
    sources = {
        "textures": lambda: {"train": textures_source("train")},
        "cifar": lambda: cifar_sources(write_folder(tmp_path / "in", cifar_files(10, each=3)[0])),
        "stl10": lambda: stl10_sources(write_folder(tmp_path / "in", stl10_files(3)[0])),
    }
    source = sources[name]()["train"]
    source = replace(source, items=source.items[:3])
    assert write_split(source, tmp_path / "out", "train", 0, 2, part=(1, 2)) is None
    version = cv2.__version__
    monkeypatch.setattr("pipeline.writer.cv2.__version__", "3.0")
    with pytest.raises(UserError, match=rf"another plan \(its opencv is {version} instead of 3\.0\)"):
        write_split(source, tmp_path / "out", "train", 0, 2)
    monkeypatch.undo()
    assert write_split(source, tmp_path / "out", "train", 0, 2).manifest["made_by"]["opencv"] == version


@pytest.mark.parametrize("kind", [10, 100])
@pytest.mark.parametrize("form", ["tar.gz", "folder"])
def test_cifar(tmp_path, kind, form):
    files, truth = cifar_files(kind, each=3)
    assert pickle.loads(list(files.values())[2], encoding="bytes")[b"data"].shape == (3, 3072)  # as everyone reads it
    sources = cifar_sources(in_form(tmp_path, files, form))
    assert list(sources) == ["train", "test"]
    for split, (pixels, labels) in truth.items():
        shards = write_split(sources[split], tmp_path / "out", split)
        assert shards.manifest["name"] == f"cifar{kind}" and shards.classes == [f"class {i:02d}" for i in range(kind)]
        found = contents(shards)
        assert len(found) == len(pixels)
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            assert found[f"{split}-{number:06d}"][0] == label
            encoded = found[f"{split}-{number:06d}"][1]
            assert encoded.startswith(b"\x89PNG") and np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), image)


class Malicious:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", ["os.system", "eval", "numpy.load", "getattr"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, protocol, call):
    mark = tmp_path / "executed"
    thing = {
        "os.system": Malicious(os.system, f"touch {mark}"),
        "eval": Malicious(eval, f"open({str(mark)!r}, 'w')"),
        "numpy.load": Malicious(np.load, str(mark)),
        "getattr": Malicious(getattr, Malicious(__import__, "os"), "system"),
    }[call]
    files, _ = cifar_files(10, each=1)
    files["cifar-10-batches-py/data_batch_2"] = pickle.dumps({b"data": thing, b"labels": [0]}, protocol)
    path = write_tar(tmp_path / "cifar.tar.gz", files, "w:gz")
    with pytest.raises(UserError, match="which would run code"):
        cifar_sources(path)
    assert not mark.exists()
    if (protocol, call) == (2, "os.system"):
        result = run_module("pipeline.convert", "cifar", path, tmp_path / "out")
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "would run code" in result.stderr
        assert not mark.exists() and not (tmp_path / "out").exists()


def test_a_pickle_that_persists_elsewhere_is_refused(tmp_path):
    files, _ = cifar_files(10, each=1)
    files["cifar-10-batches-py/test_batch"] = b"\x80\x02X\x01\x00\x00\x00aQ."
    with pytest.raises(UserError, match="refers to something outside"):
        cifar_sources(write_folder(tmp_path / "in", files))


def test_damaged_cifar(tmp_path):
    files, _ = cifar_files(10, each=2)
    batch, meta = "cifar-10-batches-py/data_batch_4", "cifar-10-batches-py/batches.meta"
    floats = {b"data": np.zeros((2, 3072)), b"labels": [0, 0]}
    row = np.zeros((1, 3072), np.uint8)
    changes = {
        "cut": {batch: files[batch][:900]},
        "a list": {batch: cifar_pickle([1, 2])},
        "label 10": {batch: cifar_pickle({b"data": row, b"labels": [10]})},
        "one label too many": {batch: cifar_pickle({b"data": row, b"labels": [1, 2]})},
        "floats": {batch: pickle.dumps(floats)},
        "empty": {meta: b""},
    }
    for name, change in changes.items():
        with pytest.raises(UserError, match=r"batches in .* are damaged|would run code"):
            cifar_sources(write_folder(tmp_path / name, files | change))
    with pytest.raises(UserError, match="lacks data_batch_4"):
        cifar_sources(write_tar(tmp_path / "lacking.tar", {n: c for n, c in files.items() if n != batch}))
    with pytest.raises(UserError, match="is not the python version of CIFAR"):
        cifar_sources(write_folder(tmp_path / "other", {"a.txt": b""}))
    (tmp_path / "cut.tar.gz").write_bytes(tar_bytes(files, "w:gz")[:-500])
    with pytest.raises(UserError, match="is not a whole archive"):
        cifar_sources(tmp_path / "cut.tar.gz")


@pytest.mark.parametrize("form", ["tar.gz", "folder"])
def test_stl10(tmp_path, form):
    files, truth = stl10_files(each=4)
    path = in_form(tmp_path, files, form)
    result = run_module("pipeline.convert", "stl10", path, tmp_path / "out", "--workers", "1")
    assert result.returncode == 0, result.stderr
    for split, (pixels, labels) in truth.items():
        shards = open_shards(str(tmp_path / "out" / split))
        found = contents(shards)
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            stored_label, encoded = found[f"{split}-{number:06d}"]
            assert stored_label == label
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), image)
        assert len(shards.classes) == 10 and sum(shards.manifest["class_counts"]) == (0 if labels[0] is None else 4)


def test_damaged_stl10(tmp_path):
    files, _ = stl10_files(each=2)
    pixels, labels = "stl10_binary/train_X.bin", "stl10_binary/train_y.bin"
    changes = {"cut": {pixels: files[pixels][:-1]}, "label 0": {labels: b"\0\1"}, "label 11": {labels: b"\1\13"}}
    for name, change in (changes | {"a label less": {labels: b"\1"}}).items():
        with pytest.raises(UserError, match=r"The train images and labels in .* don't belong together"):
            stl10_sources(write_folder(tmp_path / name, files | change))
    with pytest.raises(UserError, match="is not the binary version of STL-10"):
        stl10_sources(write_folder(tmp_path / "other", {"a.txt": b""}))


def test_png_is_lossless_and_the_same_twice():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    assert png(pixels) == png(pixels) and np.array_equal(decode(png(pixels)), pixels)


def webdataset_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for key, sample in samples.items():
            writer.write({"__key__": key, **sample})
    return path


def test_webdataset_tars_are_sharded_anew(tmp_path):
    images = list(pictures().values())
    extension = ["png" if image.startswith(b"\x89PNG") else "jpg" for image in images]
    first = {f"{i:04d}": {extension[i]: images[i], "cls": str(i).encode(), "json": {"a": 1}} for i in range(6)}
    second = {f"{i:04d}": {extension[i]: images[i], "cls": str(i).encode()} for i in range(6, 12)} | {
        "unlabelled": {"jpg": images[0]},
        "no_image": {"txt": "text"},
    }
    webdataset_tar(tmp_path / "in" / "a-000.tar", first)
    webdataset_tar(tmp_path / "in" / "a-001.tar", second)
    shards = write_split(webdataset_source(tmp_path / "in"), tmp_path / "out", "train", samples_per_shard=5)
    assert contents(shards) == {f"{i:04d}": (str(i), images[i]) for i in range(12)} | {"unlabelled": (None, images[0])}
    assert shards.classes == [str(i) for i in range(12)]  # by number: 10 is not between 1 and 2
    assert [shard["samples"] for shard in shards.manifest["shards"]] == [5, 5, 3]
    again = write_split(webdataset_source(Path(shards.root)), tmp_path / "again", "train", seed=1)  # a set of our own
    assert contents(again) == contents(shards)


def test_webdataset_names_and_repeated_keys(tmp_path):
    image = pictures()["class_0/image_0.jpg"]
    for number, name in enumerate(("owl", "cat")):
        webdataset_tar(tmp_path / "in" / f"{number}.tar", {"000": {"jpg": image, "cls": name.encode()}})
    source = webdataset_source(tmp_path / "in")
    assert [(label, key) for label, key, _ in source.items] == [("owl", "0/000"), ("cat", "1/000")]
    assert source.classes == ["cat", "owl"]
    write_tar(tmp_path / "twice.tar", {"a.jpg": image, "b.jpg": image, "./a.png": image})
    with pytest.raises(UserError, match="holds the key a twice"):
        webdataset_source(tmp_path / "twice.tar")
    with pytest.raises(UserError, match=r"There is no \.tar in"):
        webdataset_source(write_folder(tmp_path / "none", {"a.jpg": image}))
    (tmp_path / "cut.tar").write_bytes(tar_bytes({"a.jpg": image, "b.jpg": image})[:-9000])
    with pytest.raises(UserError, match="is not a whole, uncompressed tar"):
        webdataset_source(tmp_path / "cut.tar")


TREACHEROUS = {
    "../evil.jpg": (tarfile.REGTYPE, "a path that leads out of it"),
    "a/../../evil.jpg": (tarfile.REGTYPE, "a path that leads out of it"),
    "/tmp/evil.jpg": (tarfile.REGTYPE, "a path that leads out of it"),
    "../readme.txt": (tarfile.REGTYPE, "a path that leads out of it"),
    "a/soft.jpg": (tarfile.SYMTYPE, "a link to /etc/passwd, and links in a tar are not followed"),
    "a/hard.jpg": (tarfile.LNKTYPE, "a link to /etc/passwd, and links in a tar are not followed"),
    "b": (tarfile.SYMTYPE, "a link to /etc/passwd, and links in a tar are not followed"),
}


def add_member(path: Path, name: str, kind: bytes, content: bytes) -> Path:
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd" if kind != tarfile.REGTYPE else ""
        member.size = len(content) if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", TREACHEROUS)
@pytest.mark.parametrize("form", ["folder", "imagenet", "class tar", "validation", "webdataset"])
def test_a_tar_with_a_link_or_a_path_that_leads_out_of_it_is_refused(tmp_path, form, name):
    kind, message = TREACHEROUS[name]
    files = pictures(classes=1)
    image = next(iter(files.values()))
    (tmp_path / "labels").write_text("".join(f"{file} n01\n" for file in (*files, name)))
    if form == "class tar":
        inner = add_member(write_tar(tmp_path / "inner.tar", files), name, kind, image)
        path = write_tar(tmp_path / "in.tar", {"n01.tar": inner.read_bytes()})
    elif form == "imagenet":
        path = add_member(write_tar(tmp_path / "in.tar", {"n01.tar": tar_bytes(files)}), name, kind, image)
    else:
        path = add_member(write_tar(tmp_path / "in.tar", files), name, kind, image)
    read = {"folder": folder_source, "webdataset": webdataset_source}.get(form, imagenet_sources)
    arguments = (path, tmp_path / "labels") if form == "validation" else (path,)
    with pytest.raises(UserError) as error:
        read(*arguments)
    where = f"{path}:n01.tar" if form == "class tar" else str(path)
    assert str(error.value).startswith(f"{where} holds {name}, {message}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../evil.jpg", "a/soft.jpg"])
def test_nothing_is_written_of_a_tar_that_is_refused(tmp_path, name):
    path = add_member(write_tar(tmp_path / "in.tar", pictures()), name, TREACHEROUS[name][0], b"")
    result = run_module("pipeline.convert", "folder", path, tmp_path / "out")
    assert result.returncode == 1 and f"{path} holds {name}, " in result.stderr and len(result.stderr.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["in.tar"]


def test_an_archive_of_pixels_with_a_link_in_it_is_refused(tmp_path):
    files, _ = stl10_files(2)
    labels = files.pop("stl10_binary/train_y.bin")
    path = add_member(write_tar(tmp_path / "stl.tar", files), "stl10_binary/train_y.bin", tarfile.SYMTYPE, labels)
    with pytest.raises(UserError, match=r"holds stl10_binary/train_y.bin, a link to /etc/passwd"):
        stl10_sources(path)


@pytest.mark.parametrize("form", ["folder", "webdataset", "index"])
def test_what_is_no_plain_file_is_left_out_and_named(tmp_path, form):
    (tmp_path / "in").mkdir()
    path = add_member(write_tar(tmp_path / "in" / "in.tar", pictures()), "a/pipe.jpg", tarfile.FIFOTYPE, b"")
    if form == "index":
        (left_out,) = index_shards(str(tmp_path / "in")).manifest["left_out"]
        assert left_out == {"name": "in.tar:a/pipe.jpg", "reason": "not a plain file"}
    else:
        source = {"folder": folder_source, "webdataset": webdataset_source}[form](path)
        shards = write_split(source, tmp_path / "out", "train")
        assert {name.split(":")[-1]: reason for name, reason in rejected(shards).items()} == {
            "a/pipe.jpg": "not a plain file"
        }
        assert len(shards) == 12 and shards.manifest["rejected"] == 1


@pytest.mark.parametrize("damage", ["header", "cut"])
@pytest.mark.parametrize("form", ["folder", "imagenet", "class tar", "validation", "webdataset"])
def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path, form, damage):
    """Nor is a cut between two members; one block of zeros is."""
    path = tmp_path / "in.tar"
    whole = tar_bytes(pictures())
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    broken = bytearray(whole[: end + 512])
    if damage == "cut":
        del broken[members[5].offset :]
    else:
        broken[members[5].offset + 3] ^= 1
    (tmp_path / "labels").write_text("".join(f"{name} n01\n" for name in pictures()))
    imagenet = {"n01.tar": whole[: end + 512], "n02.tar": whole}
    if form == "imagenet":
        outer = tar_bytes(imagenet)
        second = 512 + -(-(end + 512) // 512) * 512
        damaged = outer[:second] if damage == "cut" else outer[:second] + b"x" + outer[second + 1 :]
    else:
        outer, damaged = tar_bytes(imagenet), tar_bytes(imagenet | {"n01.tar": bytes(broken)})
    if form not in ("imagenet", "class tar"):
        outer, damaged = whole[: end + 512], bytes(broken)
    read = {"folder": folder_source, "webdataset": webdataset_source}.get(form, imagenet_sources)
    arguments = (path, tmp_path / "labels") if form == "validation" else (path,)
    path.write_bytes(outer)
    assert read(*arguments)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"in\.tar is not a whole, .*download or copy it again") as error:
        read(*arguments)
    assert ("n01.tar in it" in str(error.value)) == (form == "class tar")


def test_a_refusal_names_the_cure(tmp_path):
    train = write_imagenet(tmp_path / "train.tar", pictures())
    (tmp_path / "labels").write_text("x n01\n")
    (tmp_path / "text.gz").write_bytes(b"no archive")
    stl = stl10_files(2)[0] | {"stl10_binary/class_names.txt": b"\xff\xfe owl"}
    refused = {
        "class tars, which need no labels: leave --labels out": lambda: imagenet_sources(train, tmp_path / "labels"),
        "is not taken here: index it in place": lambda: webdataset_source(Path("http://127.0.0.1/set")),
        "^A URL .s3:/bucket/x. is not taken here: copy it to a folder": lambda: folder_source(Path("s3://bucket/x")),
        "https:/host/x.tar. is not taken here: copy it": lambda: imagenet_sources(Path("https://host/x.tar")),
        "http:/host/cifar.tar.gz. is not taken here": lambda: cifar_sources(Path("http://host/cifar.tar.gz")),
        "is not a whole archive": lambda: stl10_sources(tmp_path / "text.gz"),
        "class_names.txt in .* is damaged": lambda: stl10_sources(write_tar(tmp_path / "stl.tar", stl)),
    }
    for message, read in refused.items():
        with pytest.raises(UserError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


def test_links_in_a_folder_are_followed_but_not_in_circles(tmp_path):
    """Subsets of ImageNet are often folders of links."""
    image = pictures()["class_0/image_0.jpg"]
    write_folder(tmp_path / "all", {"owl/0.jpg": image, "cat/1.jpg": image})
    subset = tmp_path / "subset"
    write_folder(subset, {"dog/2.jpg": image})
    os.symlink(tmp_path / "all" / "owl", subset / "owl")
    os.symlink(subset, subset / "dog" / "circle")
    os.symlink(tmp_path / "nowhere.jpg", subset / "dog" / "3.jpg")
    source = folder_source(subset)
    assert [key for _, key, _ in source.items] == ["dog/2", "owl/0"]
    assert source.left_out == [("dog/3.jpg", "a link that leads nowhere, or not a plain file")]


def test_a_name_that_is_not_utf8(tmp_path):
    files = {"a/caf\udce9.jpg": pictures()["class_0/image_0.jpg"], "a/café.jpg": b"not an image"}
    shards = write_split(folder_source(write_tar(tmp_path / "in.tar", files)), tmp_path / "out", "train")
    assert [key.decode() for key in shards.index["key"]] == ["a/caf\\udce9"] and list(rejected(shards)) == ["a/café"]


def test_a_source_that_goes_away_stops_the_conversion(tmp_path):
    """Else all the rest would be left out as unreadable."""
    source = folder_source(write_folder(tmp_path / "in", pictures()))
    (tmp_path / "in" / "class_0" / "image_0.jpg").unlink()  # one image less is left out
    shards = write_split(source, tmp_path / "out", "train")
    assert shards.manifest["rejected"] == 1 and "No such file" in rejected(shards)["class_0/image_0"]
    os.rename(tmp_path / "in", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="can no longer be read"):
        write_split(source, tmp_path / "again", "train")
    assert FolderReader(tmp_path / "elsewhere")("class_1/image_1.jpg", 0)


def test_a_jpeg_that_passes_is_one_that_decodes():
    """What verifies decodes JPEGs in gray; damage of every kind must weigh the same as in colour."""
    random = np.random.default_rng(0)
    whole = [encode(smooth_field(1, n, 40 + n, 60), "JPEG", progressive=n % 2 == 1, quality=70 + n) for n in range(18)]
    whole += [encode(smooth_field(1, n, 40, 60).convert("CMYK"), "JPEG") for n in range(2)]
    passed = 0
    for encoded in whole * 20:
        damaged = bytearray(encoded)
        for at in random.integers(0, len(damaged), random.integers(0, 3)):
            damaged[at] = random.integers(0, 256)
        if random.random() < 0.3:
            del damaged[random.integers(2, len(damaged)) :]
        try:
            _, height, width = inspect(bytes(damaged))
        except DecodeError:
            assert decode(bytes(damaged)) is None
        else:
            assert decode(bytes(damaged)).shape == (height, width, 3)
            passed += 1
    assert 100 < passed < 300


def test_smaller_images_are_averages_of_areas(tmp_path):
    """512 x 1024 to a short side of 256 is the mean of 2 x 2 pixels; smaller images keep their bytes."""
    big = smooth_field(0, 5, 512, 1024)
    files = {"a/big.jpg": encode(big, "PNG"), "a/exact.jpg": encode(smooth_field(0, 6, 256, 300), "JPEG")}
    files |= {"a/small.png": encode(smooth_field(0, 7, 100, 300), "PNG")}
    files |= {"a/cmyk.jpg": encode(smooth_field(0, 8, 300, 270).convert("CMYK"), "JPEG")}
    source = folder_source(write_folder(tmp_path / "in", files))
    shards = write_split(source, tmp_path / "out", "train", short_side=256, quality=100)
    stored = {key: content for key, (_, content) in contents(shards).items()}
    assert stored["a/exact"] == files["a/exact.jpg"] and stored["a/small"] == files["a/small.png"]
    mean = np.asarray(big, np.float64).reshape(256, 2, 512, 2, 3).mean((1, 3))
    smaller = decode(stored["a/big"])
    assert stored["a/big"].startswith(b"\xff\xd8\xff") and np.abs(smaller - mean).mean() < 1.5
    sizes = {row["key"].decode(): (row["height"], row["width"]) for row in shards.index}
    assert sizes == {"a/big": (256, 512), "a/exact": (256, 300), "a/small": (100, 300), "a/cmyk": (284, 256)}
    made_by = shards.manifest["made_by"]
    assert made_by == {
        "command": "pipeline.convert",
        "seed": 0,
        "samples_per_shard": 1024,
        "short_side": 256,
        "quality": 100,
        "opencv": cv2.__version__,
    }
    worse = write_split(source, tmp_path / "worse", "train", short_side=256, quality=10)
    assert len(contents(worse)["a/big"][1]) < len(stored["a/big"]) / 3


def test_headers_alone_let_a_truncated_image_pass(tmp_path):
    picture = encode(smooth_field(0, 9, 80, 120), "JPEG")
    files = {"a/whole.jpg": picture, "a/cut.jpg": picture[:-200], "a/text.jpg": b"text", "a/film.gif": b"GIF89a"}
    source = folder_source(write_folder(tmp_path / "in", files))
    with_verify = write_split(source, tmp_path / "verified", "train")
    without = write_split(source, tmp_path / "headers", "train", verify=False)
    assert rejected(with_verify).keys() == {"a/cut", "a/text", "a/film"}
    assert rejected(without).keys() == {"a/text", "a/film"}
    assert {(row["height"], row["width"]) for row in without.index} == {(80, 120)}
    assert without.manifest["made_by"]["verify"] is False and "verify" not in with_verify.manifest["made_by"]
    smaller = write_split(source, tmp_path / "smaller", "train", verify=False, short_side=64)
    assert rejected(smaller).keys() == {"a/cut", "a/text", "a/film"}  # what is made smaller has to be decoded
