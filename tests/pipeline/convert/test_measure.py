"""What a conversion measures: colors, sizes and exact copies; and how copies are left out."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.convert import writer
from pipeline.convert.folder import folder_source
from pipeline.convert.writer import write_split
from pipeline.images.files import decode
from pipeline.shards.dataset import open_shards
from pipeline.shards.duplicates import identical, shared_images, size_and_crc
from pipeline.shards.verify import show
from tests.pipeline.image_sets import contents, damaged, digests, pictures, rejected, run_here, run_module, write_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Twenty-four images of several sizes, two of them three times, and one that is damaged."""
    files = pictures(each=8)
    for number in range(2):
        for copy in "xy":
            files[f"class_2/{copy}{number}.jpg"] = files[f"class_0/image_{3 * number}.jpg"]
    return write_folder(tmp_path_factory.mktemp("in"), files | {"class_1/broken.jpg": damaged()["truncated"]})


def statistics(split: Path) -> dict:
    return json.loads((split / "dataset.json").read_text())["statistics"]


def test_colors_and_sizes(images, tmp_path):
    shards = write_split(folder_source(images), tmp_path, "train", samples_per_shard=5)
    found = statistics(tmp_path / "train")
    pixels = [decode(content) / 255.0 for _, content in contents(shards).values()]
    mean = np.mean([image.mean((0, 1)) for image in pixels], 0)
    std = np.sqrt(np.mean([((image - mean) ** 2).mean((0, 1)) for image in pixels], 0))  # every image weighs the same
    np.testing.assert_allclose(found["mean"], mean, atol=6e-5)  # rounded to four digits
    np.testing.assert_allclose(found["std"], std, atol=6e-5)
    assert found["measured_images"] == len(pixels) == 28
    assert found["short_side_px"] == {"0": 28}


@pytest.mark.parametrize("options", [{"workers": 3, "threads": True}, "parts", "resumed"])
def test_statistics_depend_on_the_images_alone(images, tmp_path, monkeypatch, options):
    """Of eight of the images, spread over six shards; sums of floats in another order would differ."""
    monkeypatch.setattr(writer, "MEASURED_IMAGES", 8)
    source = folder_source(images)
    write_split(source, tmp_path / "a", "train", samples_per_shard=5)
    for part in (3, 2, 1) if options in ("parts", "resumed") else ():
        write_split(source, tmp_path / "b", "train", samples_per_shard=5, part=(part, 3 if options == "parts" else 4))
    split = {} if isinstance(options, str) else options
    write_split(source, tmp_path / "b", "train", samples_per_shard=5, **split)
    assert digests(tmp_path / "a" / "train") == digests(tmp_path / "b" / "train")
    assert statistics(tmp_path / "a" / "train")["measured_images"] == 12  # two per shard


def test_the_checksum_of_a_set_does_not_depend_on_its_statistics(images, tmp_path):
    """Older sets have none, and runs on them resume."""
    shards = write_split(folder_source(images), tmp_path, "train")
    path = tmp_path / "train" / "dataset.json"
    manifest = json.loads(path.read_text())
    del manifest["statistics"]
    path.write_text(json.dumps(manifest))
    assert open_shards(shards.root).checksum == shards.checksum
    tables, problems = show(shards.root)
    assert len(tables) == 4 and not problems


def test_exact_copies_are_listed(images, tmp_path):
    shards = write_split(folder_source(images), tmp_path, "train", samples_per_shard=5)
    assert statistics(tmp_path / "train")["duplicates"] == 4
    with open(tmp_path / "train" / "duplicates.csv", newline="") as file:
        header, *rows = csv.reader(file)
    stored = contents(shards)
    assert header == ["name", "copy of"] and len(rows) == 4
    for copy, first in rows:
        assert copy != first and stored[copy][1] == stored[first][1]
    assert len({first for _, first in rows}) == 2 and len({copy for copy, _ in rows}) == 4


def test_equal_sizes_and_checksums_are_no_proof():
    contents = [b"a", b"b", b"a", b"c", b"b", b"b"]
    read = []
    groups = identical(np.array([1, 1, 1, 2, 1, 1], np.uint64), lambda place: read.append(place) or contents[place])
    assert groups == [[0, 2], [1, 4, 5]] and read == [0, 1, 2, 4, 5]
    assert identical(np.zeros(0, np.uint64), contents.__getitem__) == []


def test_images_of_both_splits_are_found_and_shown(images, tmp_path, capsys):
    train = write_split(folder_source(images), tmp_path / "out", "train", samples_per_shard=5)
    files = {name: (images / name).read_bytes() for name in ("class_0/image_0.jpg", "class_1/image_1.jpg")}
    others = {"class_1/new.jpg": pictures(each=9)["class_2/image_26.jpg"]}
    result = run_here(
        "pipeline.convert", "folder", write_folder(tmp_path / "in", files | others), tmp_path / "out", "--split", "test"
    )
    assert (
        result.returncode == 0 and f"2 images of {tmp_path}/out/test are also in {tmp_path}/out/train." in result.stderr
    )
    test = open_shards(str(tmp_path / "out" / "test"))
    pairs = shared_images(test, train)
    assert {key for key, _ in pairs} == {"class_0/image_0", "class_1/image_1"}
    assert all(contents(test)[key][1] == contents(train)[other][1] for key, other in pairs)
    assert len(np.unique(size_and_crc(train.index))) == 24
    result = run_here("pipeline.shards", "show", tmp_path / "out")
    lines = [[cell.strip() for cell in line.split("│")] for line in result.stdout.splitlines()]
    rows = {line[1]: line[2] for line in reversed(lines) if len(line) > 3}
    assert rows["also in train"] == "2 images, byte for byte" and rows["copies"] == "4 images, byte for byte"
    assert rows["classes"] == "3 with 8 to 12 images"
    values = ", ".join(f"{value:.4f}" for value in statistics(Path(train.root))["mean"])
    assert rows["mean"] == f"{values} (RGB in 0..1, 28 images)"


def test_copies_can_be_left_out(images, tmp_path):
    """Of train, copies of its own images and of those of test, which stay."""
    for split in "train", "test":
        shutil.copytree(images, tmp_path / "in" / split)
    for name in "image_0.jpg", "image_3.jpg", "image_6.jpg":
        (tmp_path / "in" / "train" / "class_0" / name).unlink()
    for kept in (tmp_path / "in" / "test" / "class_1").iterdir():
        kept.unlink()
    command = ["pipeline.convert", "folder", tmp_path / "in", tmp_path / "out", "--split", "auto", "--drop-duplicates"]
    result = run_here(*command, "--workers", "1")
    assert result.returncode == 0, result.stderr
    train, test = (open_shards(str(tmp_path / "out" / split)) for split in ("train", "test"))
    assert {label for label, _ in contents(train).values()} == {"class_1"}
    assert not shared_images(test, train) and statistics(Path(test.root))["duplicates"] == 0
    assert rejected(test) == {  # the first in the order of names keeps its class
        "class_2/x0": "a copy of test: class_0/image_0",
        "class_2/y0": "a copy of test: class_0/image_0",
        "class_2/x1": "a copy of test: class_0/image_3",
        "class_2/y1": "a copy of test: class_0/image_3",
    }
    assert rejected(train)["class_2/x1"] == "a copy of test: class_0/image_3"
    again = run_module(*command, "--workers", "2")
    assert again.returncode == 0 and again.stdout == result.stdout
