"""Conversion of images and back: order, classes, unreadable images and refused sources."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from common import UserError
from pipeline.convert import __main__ as convert
from pipeline.convert import textures
from pipeline.convert.folder import CLASS_LEVELS, AmbiguousClasses, folder_source, named
from pipeline.convert.imagenet import imagenet_sources
from pipeline.convert.textures import ensure_textures
from pipeline.convert.writer import write_split
from pipeline.shards.dataset import open_shards, open_splits
from pipeline.shards.format import Sample, write_shard
from tests.pipeline.image_sets import (
    ROOT,
    contents,
    damaged,
    digests,
    pictures,
    rejected,
    run_here,
    run_module,
    tar_bytes,
    write_folder,
    write_imagenet,
    write_tar,
)


@pytest.fixture
def few_textures(monkeypatch):
    monkeypatch.setattr(textures, "SPLITS", {"train": 30, "test": 10})


def expected(files: dict[str, bytes]) -> dict[str, tuple[str, bytes]]:
    return {name.rsplit(".", 1)[0]: (name.split("/")[0], content) for name, content in files.items()}


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_class_folders(tmp_path, form):
    files = pictures()
    path = write_folder(tmp_path / "in", files) if form == "folder" else write_tar(tmp_path / "in.tar", files)
    shards = write_split(folder_source(path), tmp_path / "out", "train", samples_per_shard=5)
    assert contents(shards) == expected(files)
    assert shards.manifest["name"] == "in" and shards.manifest["split"] == "train"
    assert shards.classes == ["class_0", "class_1", "class_2"] and shards.manifest["class_counts"] == [4, 4, 4]
    assert [shard["samples"] for shard in shards.manifest["shards"]] == [5, 5, 2]
    assert shards.manifest["rejected"] == 0 and rejected(shards) == {}


def test_imagenet_tar_is_read_without_unpacking(tmp_path):
    files = pictures()
    source = imagenet_sources(write_imagenet(tmp_path / "ILSVRC2012_img_train.tar", files))["train"]
    opened, watching = [], True

    def watch(event: str, arguments: tuple) -> None:  # audit hooks cannot be removed, so this one is switched off
        if watching and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            opened.append(Path(arguments[0]).name)

    sys.addaudithook(watch)
    shards = write_split(source, tmp_path / "out", "train")
    watching = False
    assert contents(shards) == {key.split("/")[1]: value for key, value in expected(files).items()}
    # no image was unpacked
    assert not any(name.endswith((".jpg", ".JPEG", ".png")) for name in opened)
    assert {name for name in opened if name.endswith(".tar")} == {"train-000000.tar"}


def test_textures(tmp_path, few_textures):
    ensure_textures(tmp_path)
    train, test = open_splits(str(tmp_path))
    assert train.classes == test.classes == textures.CLASSES
    assert train.manifest["class_counts"] == [3] * 10 and test.manifest["class_counts"] == [1] * 10
    rendered = contents(train)
    assert rendered["train-000013"] == (textures.CLASSES[3], textures.render(0, "train", 13))
    before = (tmp_path / "train" / "dataset.json").stat().st_mtime_ns
    ensure_textures(tmp_path)
    assert (tmp_path / "train" / "dataset.json").stat().st_mtime_ns == before


def test_complete_textures_need_no_permission_to_write(tmp_path, few_textures, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    ensure_textures(tmp_path / "few")
    monkeypatch.setattr(textures, "FileLock", refused)
    ensure_textures(tmp_path / "few")
    with pytest.raises(UserError, match=r"textures can't be written \(Permission denied\); run in another folder, or"):
        ensure_textures(tmp_path / "textures")


def test_names_are_utf_8_in_every_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, "encoding", "ascii")
    write_shard(tmp_path, "a.tar", [Sample("雪/1", ("png", 1, 1), b"1", -1)])
    with tarfile.open(tmp_path / "a.tar", encoding="utf-8") as tar:
        assert tar.getnames() == ["雪/1.png"]


FOREIGN = [
    "a set",
    "textures of another version",
    "tars without an index",
    "a damaged manifest",
    "tars at the top",
]


@pytest.mark.parametrize("case", FOREIGN)
def test_textures_never_replace_data_of_the_user(tmp_path, few_textures, case):
    out = tmp_path / "out"
    ensure_textures(out)
    manifest = out / "train" / "dataset.json"
    if case == "textures of another version":
        manifest.write_text(manifest.read_text().replace(f'"{textures.NAME}"', '"textures-0"'))
        shutil.rmtree(out / "test")
    elif case == "tars at the top":
        shutil.rmtree(out / "test")
        write_tar(out / "mine.tar", pictures())
    else:
        shutil.rmtree(out / "train")
        write_split(folder_source(write_folder(tmp_path / "in", pictures())), tmp_path / "other", "train")
        os.replace(tmp_path / "other" / "train", out / "train")
        if case == "tars without an index":
            manifest.unlink()
        elif case == "a damaged manifest":
            manifest.write_text('{"format"')
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"does not hold the built-in textures and is not overwritten; use --data"):
        ensure_textures(out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_textures_keep_an_unfinished_conversion_of_the_user(tmp_path, few_textures):
    source = folder_source(write_folder(tmp_path / "in", pictures()))
    assert write_split(source, tmp_path / "out", "train", samples_per_shard=5, part=(1, 2)) is None
    written = digests(tmp_path / "out" / ".train.partial" / "shards")
    with pytest.raises(UserError, match="holds an unfinished conversion"):
        ensure_textures(tmp_path / "out")
    assert digests(tmp_path / "out" / ".train.partial" / "shards") == written
    assert len(write_split(source, tmp_path / "out", "train", samples_per_shard=5)) == 12


def test_conversion_is_deterministic(tmp_path):
    path = write_folder(tmp_path / "in", pictures())
    for out in "a", "b":
        write_split(folder_source(path), tmp_path / out, "train", samples_per_shard=5)
    first, second = (digests(tmp_path / out / "train") for out in ("a", "b"))
    assert first == second and len(first) >= 3 + 3 + 2
    other = write_split(folder_source(path), tmp_path / "c", "train", seed=1)
    assert other.index["key"].tolist() != open_shards(str(tmp_path / "a" / "train")).index["key"].tolist()


def test_classes_are_mixed_in_every_shard(tmp_path):
    files = pictures(classes=2, each=20)
    shards = write_split(folder_source(write_folder(tmp_path / "in", files)), tmp_path, "train", samples_per_shard=10)
    for first in range(0, 40, 10):
        assert len(set(shards.index["label"][first : first + 10].tolist())) == 2


def test_unreadable_images_are_left_out_and_listed(tmp_path):
    suffixes = {"animation": "gif", "float": "tif", "broken": "avif", "phone": "HEIC"}
    refused = damaged() | {"phone": b"\0\0\0\x18ftypheic" + bytes(99)}
    bad = {f"class_0/{name}.{suffixes.get(name, 'jpg')}": content for name, content in refused.items()}
    files = pictures()
    source = folder_source(write_folder(tmp_path / "in", files | bad))
    shards = write_split(source, tmp_path / "out", "train")
    assert contents(shards) == expected(files)
    reasons = {name.split("/")[1]: reason for name, reason in rejected(shards).items()}
    assert reasons.keys() == refused.keys()
    assert "GIF" in reasons["animation"] and "truncated" in reasons["truncated"] and "not an image" in reasons["text"]
    assert "HEIF" in reasons["phone"]
    assert shards.manifest["rejected"] == 8
    result = run_here("pipeline.convert", "folder", tmp_path / "in", tmp_path / "again", "--workers", "1")
    assert result.returncode == 0 and "12 images of 3 classes in 1 shards, 8 left out." in result.stdout
    assert all(f"left out class_0/{name}: " in result.stderr for name in reasons)


def test_line_breaks_in_names_are_escaped(tmp_path):
    path = write_folder(tmp_path / "in", pictures() | {"class_0/a\n\x1b[31m,é.jpg": b"text"})
    result = run_here("pipeline.convert", "folder", path, tmp_path / "out", "--workers", "1")
    assert result.stderr == "left out class_0/a\\n\\x1b[31m,é: not an image, or its header is damaged\n"


def test_images_at_the_top_level_have_no_class(tmp_path):
    files = {f"{number}.jpg": content for number, content in enumerate(list(pictures().values())[:2])}
    shards = write_split(folder_source(write_tar(tmp_path / "in.tar", files)), tmp_path / "out", "train")
    assert contents(shards) == {"0": (None, files["0.jpg"]), "1": (None, files["1.jpg"])}
    assert shards.index["label"].tolist() == [-1, -1] and shards.classes == []


def test_keys_have_no_dot_and_are_unique(tmp_path):
    content = next(iter(pictures().values()))
    names = ["a/x.1.jpg", "a/x_1.jpg", "b/a/x_1.jpg", "a/y.jpg", "a/y.JPEG", "v./z..jpg"]
    path = write_folder(tmp_path / "in", dict.fromkeys(names, content))
    shards = write_split(folder_source(path, "last"), tmp_path, "train")
    keys = [key.decode() for key in shards.index["key"]]
    assert len(set(keys)) == 6 and all("." not in key.rsplit("/", 1)[-1] for key in keys)
    twice = write_folder(tmp_path / "twice", dict.fromkeys(["a/x.jpg", "b/a/x.jpg", "b/a/x_jpg.jpg"], content))
    write_folder(twice, {"c/b/a/x.jpg": content})
    for level in CLASS_LEVELS:
        assert len({key for _, key, _ in folder_source(twice, level).items}) == 4


NESTED = {  # folders of one image each; --class-level -> classes of the images, None if refused
    "classes": ("cat dog", {None: "cat dog", "first": "cat dog", "last": "cat dog"}),
    "one folder below each class": ("cat/images dog/images", {None: "cat dog", "last": "images images"}),
    "other folders below each class": ("cat/a dog/b", {None: "cat dog", "last": "a b"}),
    "a folder around all": ("in/all/cat in/all/dog", {None: "cat dog", "first": "cat dog"}),
    "splits": ("train/cat val/cat val/dog", {None: None, "first": "train val val", "last": "cat cat dog"}),
    "a group of classes": ("a/cat a/dog", {None: "cat dog"}),
    "groups of classes": ("a/cat b/car a/dog", {None: None, "last": "cat car dog"}),
    "two depths": ("cat dog dog/more", {None: None, "first": "cat dog dog"}),
    "two depths of one class": ("cat cat/more", {None: None, "first": "cat cat"}),
}


@pytest.mark.parametrize("case", NESTED)
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_classes_of_nested_folders(tmp_path, case, form):
    """The class is the folder below the folders that all images share; if that is ambiguous, the user chooses."""
    folders, expected = NESTED[case]
    content = next(iter(pictures().values()))
    files = {f"{folder}/{n}.jpg": content for n, folder in enumerate(folders.split())}
    files |= {"top.jpg": content, "cat/._0.jpg": b"macOS's metadata of 0.jpg"}
    path = write_folder(tmp_path / "in", files) if form == "folder" else write_tar(tmp_path / "in.tar", files)
    for level, labels in expected.items():
        if labels is None:
            with pytest.raises(UserError, match=r"The class of the images in \S+ and \S+ is ambiguous; use"):
                folder_source(path, level)
        else:
            items = {key.rpartition("/")[2]: label for label, key, _ in folder_source(path, level).items}
            assert items.pop("top") is None and [items[str(n)] for n in range(len(items))] == labels.split()
    assert {label for label, _, _ in folder_source(path, "none").items} == {None}


def test_ambiguous_folders_that_are_not_adjacent_in_order_are_named():
    """A space sorts before the slash."""
    files = [(name, (1,)) for name in ("cat/a.jpg", "cat 2/b.jpg", "cat/sub/c.jpg")]
    with pytest.raises(AmbiguousClasses, match="The class of the images in cat and cat/sub is ambiguous"):
        named(files)


def test_class_level_option(tmp_path):
    content = next(iter(pictures().values()))
    path = write_folder(tmp_path / "in", dict.fromkeys(["train/cat/0.jpg", "val/dog/1.jpg", "val/cat/2.jpg"], content))
    result = run_module("pipeline.convert", "folder", path, tmp_path / "out")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "--class-level" in result.stderr
    result = run_here("pipeline.convert", "folder", path, tmp_path / "out", "--class-level", "last", "--workers", "1")
    assert result.returncode == 0 and "3 images of 2 classes" in result.stdout, result.stderr


def test_splits_have_the_same_labels(tmp_path):
    files = pictures()
    write_split(folder_source(write_folder(tmp_path / "in", files)), tmp_path / "out", "train")
    fewer = {name: content for name, content in files.items() if not name.startswith("class_0")}
    test = write_split(folder_source(write_folder(tmp_path / "test", fewer)), tmp_path / "out", "test")
    assert contents(test) == expected(fewer) and set(test.index["label"].tolist()) == {1, 2}
    foreign = {name.replace("class_1", "owl"): content for name, content in files.items()}
    with pytest.raises(UserError, match=r"has classes that (.*) does not have \(owl\)"):
        write_split(folder_source(write_folder(tmp_path / "val", foreign)), tmp_path / "out", "val")
    assert not (tmp_path / "out" / "val").exists()
    with pytest.raises(UserError, match=r"train exists already \(its seed is 0 instead of 1\); delete it"):
        write_split(folder_source(tmp_path / "in"), tmp_path / "out", "train", seed=1)
    train, opened = open_splits(str(tmp_path / "out"))
    assert (len(train), len(opened)) == (12, 8)


def test_splits_with_other_classes_are_refused(tmp_path):
    write_split(folder_source(write_folder(tmp_path / "in", pictures())), tmp_path / "out", "train")
    write_split(folder_source(write_folder(tmp_path / "two", pictures(classes=2))), tmp_path / "other", "test")
    os.replace(tmp_path / "other" / "test", tmp_path / "out" / "test")
    with pytest.raises(UserError, match="has other classes than"):
        open_splits(str(tmp_path / "out"))


ENSURE = """
import sys
from pathlib import Path
from pipeline.convert import __main__ as convert
from pipeline.convert import textures
textures.SPLITS = {"train": 60, "test": 20}
render = textures.render
def counted(*address):
    print(*address, flush=True)
    return render(*address)
textures.render = counted
textures.ensure_textures(Path(sys.argv[1]))
"""


def test_one_of_several_processes_renders_the_textures(tmp_path):
    arguments = [sys.executable, "-c", ENSURE, tmp_path / "textures"]
    processes = [subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(len(output.splitlines()) for output in outputs) == [0, 80]
    train, test = open_splits(str(tmp_path / "textures"))
    assert (len(train), len(test)) == (60, 20)


def test_memory_per_item(tmp_path):
    """About 300 bytes per image, with one string per class, so that millions of images fit into memory."""
    files = ((f"n{number % 10:08d}/n{number % 10:08d}_{number}.JPEG", (number, 1)) for number in range(20_000))
    tracemalloc.start()
    items = named(files)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(items) == 20_000 and peak / len(items) < 450
    assert len({id(label) for label, _, _ in items}) == 10


@pytest.mark.parametrize("split", ["../train", "a/b", "/tmp/x", ".hidden", "..", ""])
def test_split_names(tmp_path, split):
    source = folder_source(write_folder(tmp_path / "in", pictures()))
    with pytest.raises(UserError, match="can't be the name of a split"):
        write_split(source, tmp_path / "out", split)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


REFUSED = {
    "missing": (["folder", "nowhere"], "does not exist"),
    "empty folder": (["folder", "empty"], "No images in empty"),
    "tar without images": (["folder", "text.tar"], "No images in text"),
    "compressed tar": (["folder", "images.tar.gz"], "is not a whole, uncompressed tar"),
    "truncated tar": (["folder", "cut.tar"], "is not a whole, uncompressed tar"),
    "nothing readable": (["folder", "damaged"], "No image of damaged could be read"),
    "imagenet without classes": (["imagenet", "images.tar"], "holds no class tars"),
    "imagenet as a folder": (["imagenet", "empty"], r"holds neither train/ nor val/"),
    "truncated imagenet": (["imagenet", "cut_imagenet.tar"], "is not a whole, uncompressed tar"),
}


@pytest.fixture(scope="module")
def refused_sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("refused")
    (root / "empty").mkdir()
    write_tar(root / "text.tar", {"a/readme.txt": b"nothing"})
    write_tar(root / "images.tar.gz", pictures(), "w:gz")
    write_tar(root / "images.tar", pictures())
    (root / "cut.tar").write_bytes(tar_bytes(pictures())[:1500])
    write_folder(root / "damaged", {"a/text.jpg": damaged()["text"]})
    whole = write_imagenet(root / "whole.tar", pictures()).read_bytes()
    (root / "cut_imagenet.tar").write_bytes(whole[:12_000])
    return root


@pytest.mark.parametrize("case", REFUSED)
def test_refused_sources(refused_sources, tmp_path, case):
    (kind, name), message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        path = refused_sources / name
        source = folder_source(path) if kind == "folder" else imagenet_sources(path)["train"]
        write_split(source, tmp_path / "out", "train")
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize("case", ["missing", "compressed tar", "imagenet without classes", "nothing readable"])
def test_errors_are_one_line_with_exit_code_1(refused_sources, tmp_path, case):
    (kind, name), message = REFUSED[case]
    result = run_here("pipeline.convert", kind, refused_sources / name, tmp_path / "out")
    assert result.returncode == 1 and message in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


def test_shards_are_identical_to_those_of_tarfile(tmp_path):
    """Includes names that need several headers, and sizes around a block."""
    names = ["a", "k" * 99, "folder/" + "k" * 150, "ü/ñ"]
    samples = [
        Sample(f"{name}{size}", ("jpg", 2, 3), bytes(size), size % 2 - 1)
        for name in names
        for size in (0, 511, 512, 513)
    ]
    entry = write_shard(tmp_path, "ours.tar", samples)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key, _, encoded, label in samples:
            for name, content in ((f"{key}.jpg", encoded), (f"{key}.cls", str(label).encode())):
                if name.endswith(".jpg") or label >= 0:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    ours = (tmp_path / "ours.tar").read_bytes()
    assert ours == (tmp_path / "theirs.tar").read_bytes()
    assert (entry["bytes"], entry["sha256"]) == (len(ours), hashlib.sha256(ours).hexdigest())


@pytest.mark.parametrize(
    ("option", "hint"),
    [("--splt", " (did you mean --split?)"), ("--wokers=2", " (did you mean --workers?)"), ("--zzz", "")],
)
def test_a_mistyped_option_names_the_one_that_was_meant(option, hint, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["convert", "folder", "photos", "shards", option, "test"])
    with pytest.raises(SystemExit):
        convert.main()
    name = option.split("=")[0]
    assert f"folder has no option '{name}'{hint}; see folder --help" in capsys.readouterr().err


def test_shards_are_not_written_to_a_url(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["convert", "folder", str(tmp_path), "s3://bucket/shards"])
    with pytest.raises(SystemExit, match="s3:/bucket/shards is a URL, but a local path is required; write to"):
        convert.main()
    assert not list(tmp_path.iterdir())


def test_many_rejected_images_are_counted(tmp_path):
    files = pictures() | {f"class_0/bad_{number:02d}.jpg": b"no image" for number in range(13)}
    path = write_folder(tmp_path / "in", files)
    result = run_here("pipeline.convert", "folder", path, tmp_path / "out", "--workers", "1")
    assert result.returncode == 0 and result.stderr.count("left out ") == 10
    assert f"... and 3 more; see {tmp_path}/out/train/rejected.csv" in result.stderr


def test_a_split_that_the_source_lacks_is_refused(tmp_path):
    result = run_here("pipeline.convert", "textures", tmp_path / "out", "--split", "val")
    assert result.returncode == 1 and "There is no split val in the source; use --split train or test." in result.stderr
    assert not (tmp_path / "out").exists()
