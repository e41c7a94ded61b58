"""Folders and tars as sources, malicious and damaged archives, and verification of images."""

import io
import os
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from common import UserError
from pipeline.convert.folder import folder_source, read_file
from pipeline.convert.imagenet import imagenet_sources
from pipeline.convert.pixels import cifar_sources, stl10_sources
from pipeline.convert.webdataset import webdataset_source
from pipeline.convert.writer import write_split
from pipeline.images.files import DecodeError, decode
from pipeline.images.prepare import prepare
from pipeline.shards.archives import LONGEST_NAME
from pipeline.shards.index import index_shards
from tests.pipeline.augment.reference_views import encode, smooth_field
from tests.pipeline.image_sets import (
    contents,
    pictures,
    rejected,
    run_module,
    stl10_files,
    tar_bytes,
    write_folder,
    write_imagenet,
    write_tar,
)

MALICIOUS = {
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


@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.parametrize("form", ["folder", "imagenet", "class tar", "validation", "webdataset"])
def test_links_and_paths_out_of_a_tar_are_refused(tmp_path, form, name):
    kind, message = MALICIOUS[name]
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


def test_the_last_of_several_members_of_one_name_counts(tmp_path):
    first, *others = pictures().items()
    path = write_tar(tmp_path / "in.tar", dict([first, *others]))
    add_member(path, first[0], tarfile.REGTYPE, others[0][1])
    source = folder_source(path)
    contents = {key: source.read(*address) for _, key, address in source.items}
    assert len(contents) == 12 and contents[first[0].partition(".")[0]] == others[0][1]


@pytest.mark.parametrize("name", ["../evil.jpg", "a/soft.jpg"])
def test_a_refused_tar_writes_nothing(tmp_path, name):
    path = add_member(write_tar(tmp_path / "in.tar", pictures()), name, MALICIOUS[name][0], b"")
    result = run_module("pipeline.convert", "folder", path, tmp_path / "out")
    assert result.returncode == 1 and f"{path} holds {name}, " in result.stderr and len(result.stderr.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["in.tar"]


def test_links_in_pixel_archives_are_refused(tmp_path):
    files, _ = stl10_files(2)
    labels = files.pop("stl10_binary/train_y.bin")
    path = add_member(write_tar(tmp_path / "stl.tar", files), "stl10_binary/train_y.bin", tarfile.SYMTYPE, labels)
    with pytest.raises(UserError, match=r"holds stl10_binary/train_y.bin, a link to /etc/passwd"):
        stl10_sources(path)


@pytest.mark.parametrize("form", ["folder", "webdataset", "index"])
def test_special_files_are_left_out_and_listed(tmp_path, form):
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
    """Neither is a cut between two members, but one block of zeros is."""
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


def test_errors_contain_the_remedy(tmp_path):
    train = write_imagenet(tmp_path / "train.tar", pictures())
    (tmp_path / "labels").write_text("x n01\n")
    (tmp_path / "text.gz").write_bytes(b"no archive")
    stl = stl10_files(2)[0] | {"stl10_binary/class_names.txt": b"\xff\xfe owl"}
    refused = {
        "class tars, which need no labels; remove --labels": lambda: imagenet_sources(train, tmp_path / "labels"),
        "index it in place": lambda: webdataset_source(Path("http://127.0.0.1/set")),
        "s3:/bucket/x.* copy it to a folder": lambda: folder_source(Path("s3://bucket/x")),
        "https:/host/x.tar.* copy it": lambda: imagenet_sources(Path("https://host/x.tar")),
        "http:/host/cifar.tar.gz.* copy it": lambda: cifar_sources(Path("http://host/cifar.tar.gz")),
        "is not a whole archive": lambda: stl10_sources(tmp_path / "text.gz"),
        "class_names.txt in .* is damaged": lambda: stl10_sources(write_tar(tmp_path / "stl.tar", stl)),
    }
    for message, read in refused.items():
        with pytest.raises(UserError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


def test_links_in_folders_are_followed_without_loops(tmp_path):
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


def test_deep_folders_and_links_to_themselves_are_left_out(tmp_path, monkeypatch):
    """Listing stops neither at the recursion limit nor at the limit of links."""
    assert sys.getrecursionlimit() > LONGEST_NAME // 2 + 300  # the deepest path consists of names of one letter
    monkeypatch.setattr("pipeline.shards.archives.LONGEST_NAME", 100)
    image = pictures()["class_0/image_0.jpg"]
    path = write_folder(tmp_path / "in", {"a/x.jpg": image, "d/" * 60 + "x.jpg": image})
    for name in "loop.jpg", "loop", "text":
        os.symlink(name, path / name)
    source = folder_source(path)
    assert [key for _, key, _ in source.items] == ["a/x"]
    assert source.left_out == [
        ("d/" * 40 + "...", "its name is longer than 1024 bytes"),
        ("loop.jpg", "a link that leads nowhere, or not a plain file"),
    ]


def test_a_name_that_is_not_utf8(tmp_path):
    files = {"a/caf\udce9.jpg": pictures()["class_0/image_0.jpg"], "a/café.jpg": b"not an image"}
    shards = write_split(folder_source(write_tar(tmp_path / "in.tar", files)), tmp_path / "out", "train")
    assert [key.decode() for key in shards.index["key"]] == ["a/caf\\udce9"] and list(rejected(shards)) == ["a/café"]


def test_a_source_that_disappears_stops_the_conversion(tmp_path):
    """Otherwise all remaining images would be left out as unreadable."""
    source = folder_source(write_folder(tmp_path / "in", pictures()))
    (tmp_path / "in" / "class_0" / "image_0.jpg").unlink()  # a single missing image is left out
    shards = write_split(source, tmp_path / "out", "train")
    assert shards.manifest["rejected"] == 1 and "No such file" in rejected(shards)["class_0/image_0"]
    os.rename(tmp_path / "in", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="can no longer be read"):
        write_split(source, tmp_path / "again", "train")
    assert read_file(tmp_path / "elsewhere", "class_1/image_1.jpg", 0)


def test_verified_jpegs_decode():
    """Verification decodes JPEGs in gray and must find the same damage as decoding in color."""
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
            _, height, width = prepare(bytes(damaged)).form
        except DecodeError:
            assert decode(bytes(damaged)) is None
        else:
            assert decode(bytes(damaged)).shape == (height, width, 3)
            passed += 1
    assert 100 < passed < 300


def test_shrunk_images_are_area_averages(tmp_path):
    """Shrinking 512 x 1024 to a short side of 256 averages 2 x 2 pixels; smaller images keep their bytes."""
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


def test_without_verification_truncated_images_pass(tmp_path):
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
    assert rejected(smaller).keys() == {"a/cut", "a/text", "a/film"}  # images that are shrunk are always decoded
