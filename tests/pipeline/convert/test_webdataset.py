"""WebDataset tars written by other tools: plain, compressed, as brace patterns and as pipes."""

import bz2
import gzip
import lzma
import os
from pathlib import Path

import pytest
import webdataset

from common import UserError
from pipeline.convert.folder import folder_source
from pipeline.convert.webdataset import webdataset_source
from pipeline.convert.writer import write_split
from pipeline.shards.index import index_shards
from tests.pipeline.image_sets import contents, digests, pictures, run_module, tar_bytes, write_folder, write_tar


def webdataset_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for key, sample in samples.items():
            writer.write({"__key__": key, **sample})
    return path


def test_webdataset_tars_are_shuffled_and_sharded_again(tmp_path):
    images = list(pictures().values())
    extension = ["png" if image.startswith(b"\x89PNG") else "jpg" for image in images]
    first = {f"{i:04d}": {extension[i]: images[i], "cls": str(i).encode(), "json": {"a": 1}} for i in range(6)}
    second = {f"{i:04d}": {extension[i]: images[i], "cls": str(i).encode()} for i in range(6, 12)} | {
        "unlabeled": {"jpg": images[0]},
        "no_image": {"txt": "text"},
    }
    webdataset_tar(tmp_path / "in" / "a-000.tar", first)
    webdataset_tar(tmp_path / "in" / "a-001.tar", second)
    shards = write_split(webdataset_source(tmp_path / "in"), tmp_path / "out", "train", samples_per_shard=5)
    assert contents(shards) == {f"{i:04d}": (str(i), images[i]) for i in range(12)} | {"unlabeled": (None, images[0])}
    assert shards.classes == [str(i) for i in range(12)]  # in numeric order
    assert [shard["samples"] for shard in shards.manifest["shards"]] == [5, 5, 3]
    again = write_split(webdataset_source(Path(shards.root)), tmp_path / "again", "train", seed=1)  # a shard set
    assert contents(again) == contents(shards)


def test_class_names_of_shard_sets_are_kept(tmp_path):
    """Also for a single tar, and next to a class that is not in the manifest; duplicate names are refused."""
    write_split(folder_source(write_folder(tmp_path / "in", pictures())), tmp_path, "train")
    root, image = tmp_path / "train", pictures()["class_0/image_0.jpg"]
    assert webdataset_source(root / "train-000000.tar").classes == ["class_0", "class_1", "class_2"]
    foreign = write_tar(root / "foreign.tar", {"x.jpg": image, "x.cls": b"3"})
    assert webdataset_source(foreign).classes == ["0", "1", "2", "3"]
    assert webdataset_source(root).classes == ["class_0", "class_1", "class_2", "3"]
    assert index_shards(str(root)).classes == ["class_0", "class_1", "class_2", "3"]
    manifest = root / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"class_1"', '"class_2"'))
    with pytest.raises(UserError, match=r"dataset.json names two classes class_2; rename one of them"):
        webdataset_source(root)


def test_webdataset_names_and_repeated_keys(tmp_path):
    image = pictures()["class_0/image_0.jpg"]
    for number, name in enumerate(("owl", "cat")):
        webdataset_tar(tmp_path / "in" / f"{number}.tar", {"000": {"jpg": image, "cls": name.encode()}})
    source = webdataset_source(tmp_path / "in")
    assert [(label, key) for label, key, _ in source.items] == [("owl", "0/000"), ("cat", "1/000")]
    assert source.classes == ["cat", "owl"]
    write_tar(tmp_path / "twice.tar", {"a.jpg": image, "b.jpg": image, "./a.jpg": image})
    with pytest.raises(UserError, match="holds the key a twice"):
        webdataset_source(tmp_path / "twice.tar")
    with pytest.raises(UserError, match=r"There is no \.tar in"):
        webdataset_source(write_folder(tmp_path / "none", {"a.jpg": image}))
    (tmp_path / "cut.tar").write_bytes(tar_bytes({"a.jpg": image, "b.jpg": image})[:-9000])
    with pytest.raises(UserError, match="is not a whole, uncompressed tar"):
        webdataset_source(tmp_path / "cut.tar")


COMPRESS = {"tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
COMPRESS |= {"tbz2": bz2.compress, "txz": lzma.compress}


@pytest.fixture
def tars(tmp_path) -> Path:
    """Two tars of six samples each."""
    images = list(pictures().values())
    for tar in range(2):
        samples = range(6 * tar, 6 * tar + 6)
        files = {f"{i:04d}.jpg": images[i] for i in samples} | {f"{i:04d}.cls": b"%d" % (i % 3) for i in samples}
        write_folder(tmp_path / "in", {f"a-{tar}.tar": tar_bytes(files)})
    return tmp_path / "in"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_tars_give_the_same_images(tmp_path, tars, suffix):
    expected = write_split(webdataset_source(tars), tmp_path / "plain", "train", samples_per_shard=5)
    for tar in list(tars.iterdir()):
        tar.with_suffix(f".{suffix}").write_bytes(COMPRESS[suffix](tar.read_bytes()))
        tar.unlink()
    source = webdataset_source(tars)
    assert source.modified == [(tars / f"a-{i}.{suffix}").stat().st_mtime_ns for i in range(2)]
    shards = write_split(source, tmp_path / "out", "train", samples_per_shard=5, workers=2)
    assert contents(shards) == contents(expected) and shards.manifest["shards"] == expected.manifest["shards"]
    damaged = tars / f"a-1.{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    with pytest.raises(UserError, match=rf"a-1.{suffix} is truncated or damaged .*download or copy it again"):
        webdataset_source(tars)


def test_brace_patterns(tmp_path, tars):
    write_split(webdataset_source(tars), tmp_path / "folder", "train")
    write_split(webdataset_source(f"{tars}/a-{{0..1}}.tar"), tmp_path / "braces", "train")
    assert digests(tmp_path / "folder" / "train") == digests(tmp_path / "braces" / "train")
    os.rename(tars / "a-1.tar", tars / "a-{1}.tar")
    assert len(webdataset_source(tars / "a-{1}.tar").items) == 6  # an existing file is not a pattern
    with pytest.raises(UserError, match=r"There is no file \S+/a-1.tar"):
        webdataset_source(f"{tars}/a-{{0..1}}.tar")
    with pytest.raises(UserError, match=r"The braces in \S+ are unbalanced; use a pattern"):
        webdataset_source(f"{tars}/a-{{0..1.tar")


def test_a_brace_pattern_longer_than_a_file_name(tars):
    pattern = f"{tars}/{{{','.join(['a-0', *('a-1' for _ in range(99))])}}}.tar"
    assert len(pattern) > 300 and len(webdataset_source(pattern).items) == 12


def test_tars_of_the_same_name_in_several_folders(tmp_path, tars):
    for folder in "bc":
        (tmp_path / folder).mkdir()
        os.link(tars / "a-0.tar", tmp_path / folder / "0.tar")
    items = webdataset_source(f"{tmp_path}/{{b,c}}/0.tar").items
    assert [key for _, key, _ in items] == [f"{folder}/0/{i:04d}" for folder in "bc" for i in range(6)]


def test_pipes(tmp_path, tars):
    expected = write_split(webdataset_source(tars), tmp_path / "plain", "train")
    pattern = f"pipe:gzip -c {tars}/a-{{0,1}}.tar"
    command = ["pipeline.convert", "webdataset", pattern, tmp_path / "out", "--workers", "1", "--shard-size"]
    result = run_module(*command, "5", "--part", "1/2")
    assert result.returncode == 0 and "2 of 3 shards are written" in result.stdout, result.stderr
    assert "12 images of 3 classes in 3 shards" in run_module(*command, "5").stdout  # resumed
    shards = write_split(webdataset_source(pattern), tmp_path / "again", "train")
    assert contents(shards) == contents(expected) and shards.manifest["name"] == "webdataset"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("exit 3", "failed with exit code 3; run it in a shell"),
        ("cat {tars}/a-0.tar; exit 3", "failed with exit code 3; run it in a shell"),
        ("head -c 3000 {tars}/a-0.tar", "is not a whole, uncompressed tar"),
        ("gzip -c {tars}/a-0.tar | head -c 900", "is truncated or damaged"),
        ("true", "is not a whole, uncompressed tar"),
    ],
)
def test_failing_commands(tars, command, message):
    with pytest.raises(UserError, match=message) as error:
        webdataset_source("pipe:" + command.format(tars=tars))
    assert "\n" not in str(error.value)


def test_file_names_are_never_run(tmp_path, tars, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.rename(tars / "a-1.tar", tars / "pipe:touch executed;.tar")
    (tars / "a-0.tar.gz").write_bytes(gzip.compress((tars / "a-0.tar").read_bytes()))
    assert len(webdataset_source(tars).items) == 12
    assert not list(tmp_path.rglob("executed"))


def test_a_full_disk_stops_a_command(tars, monkeypatch):
    """The command gets no chance to write the rest, and the error names the cause."""
    monkeypatch.setattr("shutil.copyfileobj", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"can't be unpacked to \S+ \(No space left on device\); set TMPDIR"):
        webdataset_source("pipe:yes")
