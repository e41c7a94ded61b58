"""Images as --data: converted once, the same views in every form, splits, and what is refused."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from common import UserError
from pipeline import data as data_module
from pipeline.augment import AugmentConfig
from pipeline.convert import photos
from pipeline.convert.folder import folder_source, list_images
from pipeline.convert.photos import held_out, is_photos, photo_sources
from pipeline.convert.writer import write_split
from pipeline.data import open_data
from pipeline.loader import LoaderConfig
from pipeline.shards.dataset import ShardSet
from tests.pipeline.image_sets import (
    ROOT,
    contents,
    damaged,
    digests,
    pictures,
    rejected,
    run_module,
    write_folder,
    write_tar,
)
from tests.pipeline.loaders import view_loader

CLASSES = {"class_0", "class_1", "class_2"}


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """Each test starts without the leases of the previous one."""
    monkeypatch.setattr(photos, "_leases", {})
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def config(tmp_path):
    return LoaderConfig(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Thirty images of three classes."""
    return write_folder(tmp_path / "photos", pictures(each=10))


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def under(top: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{top}/{name}": content for name, content in files.items()}


def keys(shards: ShardSet | None) -> set[str]:
    return set() if shards is None else {key.decode() for key in shards.index["key"]}


def classes_of(shards: ShardSet) -> set[str | None]:
    return {label for label, _ in contents(shards).values()}


# ---- the same in every form


def test_every_form_gives_the_same_views_and_none_is_converted_twice(tmp_path, config, folder, monkeypatch):
    """A zip and a tar in another order and below a common folder, and shards from the command line."""
    files = dict(reversed(pictures(each=10).items()))
    forms = {
        "folder": folder,
        "deflated": write_zip(tmp_path / "photos.zip", under("photos", files)),
        "stored": write_zip(tmp_path / "stored.zip", files, zipfile.ZIP_STORED),
        "tar": write_tar(tmp_path / "photos.tar", under("./photos", files)),
        "shards": tmp_path / "shards",
    }
    result = run_module("pipeline.convert", "folder", folder, forms["shards"], "--split", "auto", "--workers", "1")
    assert result.returncode == 0 and "a tenth of each class" in result.stderr, result.stderr

    def batches(data: Path) -> tuple[list[torch.Tensor], list[list[int]]]:
        train, test = open_data(str(data), config)
        assert (len(train), len(test), set(train.classes)) == (27, 3, CLASSES) and not keys(train) & keys(test)
        loader = view_loader(train, AugmentConfig(size=16), batch_size=9, seed=1, epochs=1, device=torch.device("cpu"))
        found = list(loader)
        loader.close()
        return [batch.views for batch in found], [batch.label.tolist() for batch in found]

    views, labels = zip(*map(batches, forms.values()), strict=True)
    for other, label in zip(views[1:], labels[1:], strict=True):
        assert len(other) == 3 and all(map(torch.equal, views[0], other)) and label == labels[0]
    versions = {
        form: digests(next((tmp_path / "cache" / "photos").glob(f"{data.name}-*/*/train")))
        for form, data in forms.items()
        if form != "shards"
    }
    of_tar = {name: digest for name, digest in versions["tar"].items() if name != "dataset.json"}  # which has its name
    assert versions["folder"] == digests(forms["shards"] / "train") and of_tar.items() <= versions["folder"].items()

    monkeypatch.setattr(photos, "write_split", lambda *_, **__: pytest.fail("converted again"))
    again = zip(*map(batches, forms.values()), strict=True)
    assert all(map(torch.equal, next(again)[0], views[0]))


def test_the_first_use_tells_where_the_shards_are(tmp_path, config, folder, capsys):
    (folder / "class_0" / "broken.jpg").write_bytes(damaged()["truncated"])
    shutil.copy(folder / "class_1" / "image_1.jpg", folder / "class_1" / "image_30.jpg")
    train, _ = open_data(str(folder), config)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and f"converting 32 images (0.1 MB) once, to {tmp_path}/cache" in lines[0]
    assert re.search("(28|29) training images and (2|3) evaluation images[.]", lines[1])
    assert "Unreadable and left out: 1 (rejected.csv)." in lines[1]
    assert "exact copies" in lines[1] or "also training images" in lines[1]
    assert "--split auto --drop-duplicates` leaves copies out." in lines[1]
    assert lines[1].endswith(f"The shards are in {Path(train.root).parent}")
    open_data(str(folder), config)
    assert not capsys.readouterr().err


# ---- once


@pytest.mark.parametrize("change", ["content", "touch", "new", "gone"])
def test_a_change_converts_again_and_frees_the_old_version(config, folder, monkeypatch, change):
    before, _ = open_data(str(folder), config)
    image = folder / "class_0" / "image_0.jpg"
    if change == "content":
        image.write_bytes(pictures(each=10)["class_1/image_1.jpg"])
    elif change == "touch":
        os.utime(image, ns=(0, 0))
    elif change == "new":
        write_folder(folder, {"class_0/new.jpg": image.read_bytes()})
    else:
        image.unlink()
    after, test = open_data(str(folder), config)
    assert Path(before.root).exists() and before.root != after.root  # this process still reads the old one
    assert len(after) + len(test) == 30 + {"new": 1, "gone": -1}.get(change, 0)
    for lease in photos._leases.values():
        lease.close()
    os.utime(folder / "class_1" / "image_1.jpg", ns=(1, 1))
    open_data(str(folder), config)
    assert not Path(before.root).exists() and not Path(after.root).exists()


def test_an_interrupted_conversion_is_not_trusted_and_resumes(config, folder, monkeypatch):
    write = photos.write_split

    def interrupted(source, out, split, **options):
        if split == "test":
            raise KeyboardInterrupt
        return write(source, out, split, **options)

    monkeypatch.setattr(photos, "write_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_data(str(folder), config)
    (tar,) = Path(config.cache_dir).rglob("*/train/*.tar")
    before = tar.stat()
    monkeypatch.setattr(photos, "write_split", write)
    train, test = open_data(str(folder), config)
    assert (len(train), len(test)) == (27, 3)
    assert (tar.stat().st_ino, tar.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 0), Path.unlink])
@pytest.mark.parametrize("name", ["train-000000.tar", "dataset.json"])
def test_a_conversion_that_lost_a_file_is_repeated(config, folder, name, damage):
    train, _ = open_data(str(folder), config)
    before = digests(Path(train.root))
    damage(Path(train.root, name))
    assert digests(Path(open_data(str(folder), config)[0].root)) == before


def test_images_that_change_during_the_conversion_are_refused(config, folder, monkeypatch):
    write = photos.write_split

    def while_copying(*arguments, **options):
        write_folder(folder, {"class_0/late.jpg": b"just arriving"})
        return write(*arguments, **options)

    monkeypatch.setattr(photos, "write_split", while_copying)
    with pytest.raises(UserError, match="changed during its conversion; wait until nothing writes to it"):
        open_data(str(folder), config)
    assert not list(Path(config.cache_dir).rglob("*.tar"))


CONVERSION = """
import sys
from pathlib import Path
from pipeline.convert import photos
from pipeline.shards.cache import ShardCache

convert, calls = photos._convert, []
photos._convert = lambda *arguments: calls.append(convert(*arguments))
version = photos.convert_photos(Path(sys.argv[1]), ShardCache(sys.argv[2]))
print(len(calls), version)
"""


def test_one_of_several_processes_converts(tmp_path, folder):
    command = [sys.executable, "-c", CONVERSION, str(folder), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    (first, here), (second, there) = (process.communicate()[0].split() for process in processes)
    assert {first, second} == {"0", "1"} and here == there


@pytest.fixture
def ranks(monkeypatch):
    """Every call of `open_data` is that of another rank."""
    store = dist.HashStore()
    monkeypatch.setattr(data_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data_module.dist.distributed_c10d, "_get_default_store", lambda: store)


def test_ranks_that_see_other_shards_are_refused(tmp_path, config, original, ranks):
    """A copy that was made before the set was converted again has other images under the same numbers."""
    data = shutil.copytree(original, tmp_path / "set")
    for _ in range(2):
        assert len(open_data(str(data), config)[0])
    manifest = json.loads((data / "dataset.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (data / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"The shards of .*set are not the same for all processes; copy them"):
        open_data(str(data), config)


def test_ranks_that_see_other_images_are_refused(config, folder, ranks):
    """A rank on another machine would otherwise train on other batches without an error."""
    train, _ = open_data(str(folder), config)
    assert open_data(str(folder), config)[0].root == train.root
    os.utime(folder / "class_0" / "image_0.jpg", ns=(0, 0))
    with pytest.raises(UserError, match="are not the same for all processes"):
        open_data(str(folder), config)


def test_a_folder_whose_name_would_be_a_chain_of_urls(tmp_path, config, folder):
    train, test = open_data(str(folder.rename(tmp_path / "a::b")), config)
    assert (len(train), len(test)) == (27, 3)


def test_a_home_folder_is_expanded(tmp_path, config, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train, test = open_data(f"~/{folder.name}", config)
    assert (len(train), len(test)) == (27, 3)


def test_a_dataset_json_of_another_program_does_not_make_shards_of_images(tmp_path, config, folder):
    (folder / "dataset.json").write_text('{"labels": null}')
    photos_zip = write_zip(folder / "photos.zip", pictures(each=10))
    assert len(open_data(str(photos_zip), config)[0]) == 27
    photos_zip.unlink()
    assert len(open_data(str(folder), config)[0]) == 27


def test_a_folder_with_a_long_name(tmp_path, config, folder):
    train, test = open_data(str(folder.rename(tmp_path / ("ä" * 120))), config)
    assert (len(train), len(test)) == (27, 3)


# ---- splits and labels


@pytest.mark.parametrize(
    ("names", "used", "unused"),
    [
        (("train", "test"), "test", ""),
        (("training", "val"), "val", ""),
        (("Train", "Validation"), "val", ""),
        (("train", "test", "unlabeled"), "test", "Not used: unlabeled."),
        (("train", "test", "valid"), "test", "The val images are not used because there are test images."),
    ],
)
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_folders_named_like_splits_are_the_splits(tmp_path, names, used, unused, form):
    files = {}
    for number, name in enumerate(names):
        files |= under(name, {f"{file[:-4]}_{number}.jpg": content for file, content in pictures().items()})
    path = write_folder(tmp_path / "in", files)
    if form == "zip":
        path = write_zip(tmp_path / "in.zip", under("photos", files))
    sources, notes = photo_sources(path)
    number = {name.lower(): place for place, name in enumerate(names)}
    tested = next(place for name, place in number.items() if photos.SPLITS.get(name) == used)
    assert list(sources) == ["train", used] and notes == ([unused] if unused else [])
    for split, place in (("train", 0), (used, tested)):
        assert len(sources[split].items) == 12 and sources[split].classes == sorted(CLASSES)
        assert {key for _, key, _ in sources[split].items} == {f"{file[:-4]}_{place}" for file in pictures()}


@pytest.mark.parametrize(
    ("files", "note"),
    [
        ({"test/a.jpg": b"1", "test/b.jpg": b"2"}, "The test images are not used because they have no labels."),
        (
            {"test/class_0/a.jpg": b"1", "test/zebra/b.jpg": b"2"},
            "The test images are not used because no training image is of class zebra.",
        ),
    ],
)
def test_a_test_split_of_other_classes_is_not_used(tmp_path, files, note):
    path = write_folder(tmp_path / "in", under("train", pictures(each=10)) | files)
    sources, notes = photo_sources(path)
    assert notes[0] == note and "a tenth of each class" in notes[1]
    assert {split: len(source.items) for split, source in sources.items()} == {"train": 27, "test": 3}


def test_a_test_split_without_labels_gives_way_to_a_val_split(tmp_path):
    files = under("train", pictures()) | under("val", pictures()) | {"test/a.jpg": b"1", "test/b.jpg": b"2"}
    sources, notes = photo_sources(write_folder(tmp_path / "in", files))
    assert {split: len(source.items) for split, source in sources.items()} == {"train": 12, "val": 12}
    assert notes == ["The test images are not used because they have no labels."]


def test_a_test_split_of_some_classes_is_used(tmp_path):
    path = write_folder(tmp_path / "in", under("train", pictures()) | {"test/class_1/a.jpg": b"1"})
    sources, notes = photo_sources(path)
    assert [label for label, _, _ in sources["test"].items] == ["class_1"] and not notes


def test_a_class_called_train_is_not_a_split(tmp_path):
    path = write_folder(tmp_path / "in", {f"{name}/{i}.jpg": b"" for name in ("plane", "train") for i in range(3)})
    sources, _ = photo_sources(path)
    assert {label for label, _, _ in sources["train"].items} == {"plane", "train"}


UNLABELED = {
    "flat": ({"a.jpg": b"", "b.jpg": b""}, 1),
    "one class": ({"holiday/a.jpg": b"", "holiday/b.jpg": b"", "c.jpg": b""}, 2),
    "one folder": ({"holiday/a.jpg": b"", "holiday/b.jpg": b""}, 2),
    "nested": ({"2023/05/a.jpg": b"", "2023/06/b.jpg": b"", "2024/05/c.jpg": b""}, 2),
}


@pytest.mark.parametrize("case", UNLABELED)
def test_without_labels_all_images_are_trained_on(tmp_path, case):
    files, count = UNLABELED[case]
    sources, notes = photo_sources(write_folder(tmp_path / "in", files))
    assert list(sources) == ["train"] and len(sources["train"].items) == len(files)
    assert all(label is None for label, _, _ in sources["train"].items) and len(notes) == count
    assert notes[-1] == "Without labels there are no kNN scores."


def test_classes_of_one_image_keep_it(tmp_path):
    sources, notes = photo_sources(write_folder(tmp_path / "in", {f"{label}/{label}.jpg": b"" for label in "abc"}))
    assert list(sources) == ["train"] and sources["train"].classes == ["a", "b", "c"]
    assert notes == ["No class has two images, so none are kept for evaluation."]


def test_a_tenth_of_each_class_is_kept_and_hardly_changes_with_more_images(monkeypatch):
    def items(counts: dict[str, int]) -> list:
        return [(label, f"{label}/{number}", ()) for label, count in counts.items() for number in range(count)]

    def kept(counts: dict[str, int]) -> set[str]:
        chosen = items(counts)
        return {chosen[place][1] for place in np.flatnonzero(held_out(chosen))}

    before = kept({"a": 100, "b": 39, "c": 5, "d": 2, "e": 1, "f": 0})
    counted = {label: sum(key.startswith(label) for key in before) for label in "abcdef"}
    assert counted == {"a": 10, "b": 3, "c": 1, "d": 1, "e": 0, "f": 0}
    assert len(before & kept({"a": 110, "b": 40, "c": 5, "d": 2, "e": 1})) >= len(before) - 2
    monkeypatch.setattr(photos, "MOST_HELD_OUT", 20)
    assert len(kept({"a": 300, "b": 100})) == 20


# ---- what is refused


def test_shards_and_urls_are_not_images(tmp_path, original):
    for root in (original, original.parent, original / "train-000000.tar", tmp_path / "nowhere", "http://host/x.zip"):
        assert not is_photos(str(root))
    shutil.copytree(original, tmp_path / "set")
    (tmp_path / "set" / "dataset.json").unlink()
    assert not is_photos(str(tmp_path / "set"))  # tars without an index have an error of their own
    assert is_photos(str(write_folder(tmp_path / "in", pictures())))


def refuse(path: Path, config: LoaderConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        open_data(str(path), config)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
    assert not list(Path(config.cache_dir).rglob("done.json")) and not list(Path(config.cache_dir).rglob("*.tar"))


def test_shards_without_a_train_split_are_not_taken_for_images(tmp_path, config, original):
    shutil.copytree(original, tmp_path / "set" / "test")
    refuse(tmp_path / "set", config, "set holds the shards of test/, but no train/; convert the training split, or use")


def test_an_unfinished_conversion_is_not_taken_for_images(tmp_path, config, folder):
    assert write_split(folder_source(folder), tmp_path / "set", "train", samples_per_shard=2, part=(1, 2)) is None
    refuse(tmp_path / "set", config, "set holds an unfinished conversion; run the same `python -m pipeline.convert`")


def test_shards_that_are_taken_for_images_and_images_next_to_a_tar(tmp_path, config, folder, original):
    shard = shutil.copy(original / "train-000000.tar", tmp_path / "copy.tar")
    refuse(shard, config, "cls, the class of a WebDataset sample; use `python -m pipeline.convert webdataset .*copy")
    write_tar(folder / "backup.tar", pictures())
    refuse(folder, config, "photos holds images as well as backup.tar; move the tar out of it")
    (folder / "backup.tar").rename(folder / "set-train-0.tar")
    assert not is_photos(str(folder))


def test_unusable_folders_are_refused(tmp_path, config):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", config, "No images in .*empty; use a folder, zip or tar with .jpg")
    refuse(write_folder(tmp_path / "text", {"a/readme.txt": b"text"}), config, "No images in .*text; use")
    refuse(write_folder(tmp_path / "one", {"a/0.jpg": b""}), config, "holds one image, .*; use more images")
    unreadable = write_folder(tmp_path / "damaged", {f"a/{name}.jpg": content for name, content in damaged().items()})
    refuse(unreadable, config, "No image of damaged could be read .*; use another source")
    for name in "photos.tar.gz", "photos.txz":
        path = write_tar(tmp_path / name, pictures(), "w:gz" if name.endswith("gz") else "w:xz")
        refuse(path, config, "not a whole, uncompressed tar .*decompress")
    refuse(tmp_path / "nowhere", config, "No shards at .*nowhere; .*correct the path")


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/tmp/evil.jpg", "C:\\evil.jpg", "..\\evil.txt"])
def test_zips_with_unsafe_names_are_refused(tmp_path, config, name):
    path = write_zip(tmp_path / "photos.zip", pictures() | {name: b"evil"})
    refuse(path, config, "a path that leads out of it: pack the folder again")


def test_links_in_a_zip_and_damaged_zips_are_refused(tmp_path, config):
    path = write_zip(tmp_path / "photos.zip", pictures())
    (tmp_path / "cut.zip").write_bytes(path.read_bytes()[:-40])
    refuse(tmp_path / "cut.zip", config, "cut.zip is not a whole zip .*; download, copy or pack it again")
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("class_0/link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    refuse(path, config, "class_0/link.jpg, a link, and links in a zip are not followed")


def test_zips_with_damaged_names(tmp_path, config):
    path = write_zip(tmp_path / "photos.zip", pictures() | {"é.jpg": b""})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    refuse(path, config, "not a whole zip .'utf-8' codec can't decode .*; download, copy or pack it again")
    with zipfile.ZipFile(write_zip(path, pictures()), "a") as archive:
        nameless = zipfile.ZipInfo("x")
        nameless.filename = ""
        archive.writestr(nameless, b"")
    assert {name for name, _ in list_images(path).files} == set(pictures())


def test_images_of_a_zip_that_cannot_be_read_are_left_out(tmp_path, config):
    files = {name: content for name, content in pictures().items() if name.endswith("jpg")}
    path = write_zip(tmp_path / "photos.zip", files | {"class_1\\from_windows.jpg": files["class_1/image_1.jpg"]})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("class_0/bz2.jpg", files["class_0/image_0.jpg"], zipfile.ZIP_BZIP2)
        flipped, encrypted = archive.getinfo("class_0/image_3.jpg"), archive.getinfo("class_0/image_6.jpg")
        encrypted.flag_bits |= 1
    content = bytearray(path.read_bytes())
    content[flipped.header_offset + 30 + len(flipped.filename) + flipped.compress_size // 2] ^= 1
    path.write_bytes(content)
    train, test = open_data(str(path), config)
    assert rejected(train) | rejected(test) == {
        "class_0/bz2.jpg": "compressed by a method other than deflate",
        "class_0/image_3": "damaged in the zip",
        "class_0/image_6.jpg": "encrypted",
    }
    assert "class_1/from_windows" in keys(train) | keys(test)


@pytest.mark.parametrize("form", ["folder", "tar", "zip"])
def test_hidden_files_and_folders_are_skipped(tmp_path, form):
    names = ["a/0.jpg", "a/1.jfif", "b/2.JPE", "c:x/3.png"]  # the last is no drive of Windows
    hidden = ["a/._0.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", "b/@eaDir/2.JPE/SYNOPHOTO_THUMB_M.jpg"]
    files, write = dict.fromkeys(names + hidden, b""), {"folder": write_folder, "tar": write_tar, "zip": write_zip}
    path = write[form](tmp_path / "in", files if form == "folder" else under(".", files))
    assert [name.removeprefix("./") for name, _ in list_images(path).files] == names


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    inner = write_zip(tmp_path / "inner.zip", {"other.jpg": b""}).read_bytes()
    path = write_tar(tmp_path / "photos.tar", pictures() | {"zz/inner.zip": inner})
    assert {name for name, _ in list_images(path).files} == set(pictures())
    renamed = shutil.copy(tmp_path / "inner.zip", tmp_path / "photos.cbz")
    assert [name for name, _ in list_images(renamed).files] == ["other.jpg"]


def test_a_cache_without_room_or_permission(tmp_path, config, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(photos.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
        refuse(folder, config, "takes 0.1 MB, but .* has room for 0.0 MB; free some space, or set --loader.cache-dir")
    (tmp_path / "file").write_text("")
    refuse(folder, LoaderConfig(cache_dir=str(tmp_path / "file")), "can't be used as a cache .*STREAMCLR_CACHE")


def test_a_folder_without_permission(config, folder, monkeypatch):
    """As root, tests can read every folder."""
    scan = os.scandir

    def refusing(path):
        if Path(path).name == "class_1":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    refuse(folder, config, "class_1 can't be read .Permission denied.; change its permissions, or move it out of")


def test_an_image_without_permission_is_not_left_out(config, folder, monkeypatch):
    """The next run would use the shards without it, after its permissions are changed, too."""
    read = Path.read_bytes

    def refusing(path):
        if path.name == "image_1.jpg":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refusing)
        refuse(folder, config, "image_1.jpg can't be read .Permission denied.; change its permissions, or move it")
    assert sum(map(len, open_data(str(folder), config))) == 30
