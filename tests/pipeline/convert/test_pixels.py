"""CIFAR and STL-10 as distributed, and damaged and malicious versions of them."""

import io
import os
import pickle
import tarfile
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from common import UserError
from pipeline.convert.pixels import cifar_sources, stl10_sources
from pipeline.convert.textures import textures_source
from pipeline.convert.writer import write_split
from pipeline.images.files import decode, png
from pipeline.shards.archives import unpacked
from pipeline.shards.dataset import open_shards
from tests.pipeline.image_sets import (
    cifar_files,
    cifar_pickle,
    contents,
    in_form,
    run_here,
    run_module,
    stl10_files,
    tar_bytes,
    write_folder,
    write_tar,
)


@pytest.mark.parametrize("name", ["textures", "cifar", "stl10"])
def test_images_encoded_by_another_opencv_are_not_mixed(tmp_path, monkeypatch, name):
    """Another version may encode the same pixels differently, so a conversion resumes with the same version only."""
    sources = {
        "textures": lambda: {"train": textures_source("train")},
        "cifar": lambda: cifar_sources(write_folder(tmp_path / "in", cifar_files(10, each=3)[0])),
        "stl10": lambda: stl10_sources(write_folder(tmp_path / "in", stl10_files(3)[0])),
    }
    source = sources[name]()["train"]
    source = replace(source, items=source.items[:3])
    assert write_split(source, tmp_path / "out", "train", 0, 2, part=(1, 2)) is None
    version = cv2.__version__
    monkeypatch.setattr("pipeline.convert.writer.cv2.__version__", "3.0")
    with pytest.raises(UserError, match=rf"another plan \(its opencv is {version} instead of 3\.0\)"):
        write_split(source, tmp_path / "out", "train", 0, 2)
    monkeypatch.undo()
    assert write_split(source, tmp_path / "out", "train", 0, 2).manifest["made_by"]["opencv"] == version


@pytest.mark.parametrize("kind", [10, 100])
@pytest.mark.parametrize("form", ["tar.gz", "folder"])
def test_cifar(tmp_path, kind, form):
    files, truth = cifar_files(kind, each=3)
    assert pickle.loads(list(files.values())[2], encoding="bytes")[b"data"].shape == (3, 3072)  # as usually read
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
def test_pickles_that_would_run_code_are_refused(tmp_path, protocol, call):
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


def test_pickles_with_external_references_are_refused(tmp_path):
    files, _ = cifar_files(10, each=1)
    files["cifar-10-batches-py/test_batch"] = b"\x80\x02X\x01\x00\x00\x00aQ."
    with pytest.raises(UserError, match="refers to data outside"):
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
        "a name twice": {meta: cifar_pickle({b"label_names": [b"cat"] * 10})},
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


def test_a_full_disk_is_not_taken_for_a_failing_one(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "cifar.tar.gz", cifar_files(10, each=1)[0], "w:gz")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.ExFileObject, "read", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(UserError, match=r"is not a whole archive \(Input/output error\); download or copy it"):
            cifar_sources(path)
    (tmp_path / "batches.meta").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"can't be unpacked to \S+ \(No space left on device\); set TMPDIR"):
        unpacked(path, ["batches.meta"], tmp_path)


@pytest.mark.parametrize("form", ["tar.gz", "folder"])
def test_stl10(tmp_path, form):
    files, truth = stl10_files(each=4)
    path = in_form(tmp_path, files, form)
    result = run_here("pipeline.convert", "stl10", path, tmp_path / "out", "--workers", "1")
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
        with pytest.raises(UserError, match=r"The train images and labels in .* do not match"):
            stl10_sources(write_folder(tmp_path / name, files | change))
    names = files["stl10_binary/class_names.txt"].replace(b"dog", b"cat")
    with pytest.raises(UserError, match="names a class twice"):
        stl10_sources(write_folder(tmp_path / "twice", files | {"stl10_binary/class_names.txt": names}))
    with pytest.raises(UserError, match="is not the binary version of STL-10"):
        stl10_sources(write_folder(tmp_path / "other", {"a.txt": b""}))


def test_png_is_lossless_and_deterministic():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    assert png(pixels) == png(pixels) and np.array_equal(decode(png(pixels)), pixels)
