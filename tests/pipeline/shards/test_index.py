"""Indexing of foreign WebDataset tars: intact, truncated or damaged, labels, names, brace patterns."""

import io
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from common import UserError
from pipeline.convert.sources import folder_source, webdataset_source
from pipeline.convert.writer import write_split
from pipeline.images.pixel_format import RGB8, PixelFormat, decode_pixels
from pipeline.images.prepare import prepare
from pipeline.shards import index
from pipeline.shards.__main__ import main
from pipeline.shards.dataset import open_shards, open_splits
from pipeline.shards.index import index_shards
from pipeline.shards.reader import Reader
from pipeline.shards.verify import verify_shards
from tests.pipeline.deep_images import levels, npy, png16
from tests.pipeline.image_sets import contents, damaged, pictures, read_by_webdataset, run_here, run_module, write_tar
from tests.pipeline.web_server import cache_at, serving


def foreign_tars(root: Path, files: list[dict[str, bytes]]) -> Path:
    """Write tars with webdataset's TarWriter, one per dictionary."""
    root.mkdir(parents=True)
    for number, samples in enumerate(files):
        with webdataset.TarWriter(str(root / f"shard-{number:03d}.tar")) as writer:
            for name, content in samples.items():
                key, extension = name.split(".", 1)
                sample = content if isinstance(content, dict) else {extension: content}
                writer.write({"__key__": key, **sample})
    return root


def labeled(first: int) -> dict[str, dict[str, bytes]]:
    images = list(pictures().values())
    return {f"{i:03d}.": {"jpg": images[i], "cls": i % 3} for i in range(first, first + 4) if i != 2}


def test_foreign_tars_get_an_index(tmp_path):
    """With a damaged image, a class that is not a number, and files that are not images."""
    jpeg = pictures()["class_0/image_0.jpg"]
    odd = {
        "bad.": {"jpg": damaged()["truncated"], "cls": 1},
        "deep/words.": {"jpeg": jpeg, "cls": b"owl", "json": {"a": 1}},
        "notes.txt": b"nothing",
        "masked.": {"jpg": jpeg, "mask.png": jpeg},
    }
    root = foreign_tars(tmp_path / "foreign", [labeled(0), labeled(4) | odd])
    result = run_module("pipeline.shards", "index", root)
    assert result.returncode == 0, result.stderr
    assert "9 images in 2 shards indexed." in result.stdout
    assert "left out shard-001.tar:bad.jpg: a damaged or truncated JPEG" in result.stderr
    assert "left out shard-001.tar:deep/words.cls: the class is not a number" in result.stderr
    shards = open_shards(str(root))
    by_webdataset = {key: sample for key, sample in read_by_webdataset(root).items() if {"jpg", "jpeg"} & sample.keys()}
    by_webdataset.pop("bad")
    assert [key.decode() for key in shards.index["key"]] == list(by_webdataset)
    for row, (key, sample) in zip(shards.index, by_webdataset.items(), strict=True):
        assert row["crc32"] == zlib.crc32(sample.get("jpg") or sample["jpeg"])
        assert row["label"] == (-1 if key in ("deep/words", "masked") else int(sample["cls"]))
    assert shards.classes == ["0", "1", "2"] and verify_shards(str(root)) == []


@pytest.mark.parametrize(
    ("cut", "kept"), [("in an image", 6), ("before a class", 6), ("in a class header", 6), ("end mark", 7)]
)
def test_a_truncated_foreign_tar(tmp_path, cut, kept):
    """The last sample is not used unless another one follows, since its class may be missing."""
    root = foreign_tars(tmp_path / "foreign", [labeled(4)])
    pairs = [(f"{key}jpg", f"{key}cls", sample) for key, sample in labeled(8).items()]
    members = {name: content for jpg, cls, s in pairs for name, content in ((jpg, s["jpg"]), (cls, b"%d" % s["cls"]))}
    write_tar(root / "shard-001.tar", members)  # class after image; TarWriter writes it before
    whole = index_shards(str(root))
    row = whole.index[6]  # the third sample of the second tar
    after = int(row["offset"] + -(-row["size"] // 512) * 512)
    size = {
        "in an image": int(row["offset"] + 100),
        "before a class": after,
        "in a class header": after + 100,
        "end mark": int(whole.index[7]["offset"] + -(-whole.index[7]["size"] // 512) * 512 + 1024),  # after its class
    }[cut]
    os.truncate(root / "shard-001.tar", size)
    shards = index_shards(str(root))
    keys = [key.decode() for key in shards.index["key"]]
    assert keys == ["004", "005", "006", "007", "008", "009", "010"][:kept]
    assert shards.index["label"].tolist() == [1, 2, 0, 1, 2, 0, 1][: len(keys)]
    rest, changed = shards.manifest["left_out"]
    assert rest["name"] == "shard-001.tar:the rest of the tar" and changed["name"] == "shard-001.tar"
    assert verify_shards(str(root)) == []  # the recorded checksum is that of the truncated file


def test_a_damaged_header_in_a_foreign_tar(tmp_path):
    root = foreign_tars(tmp_path / "foreign", [labeled(0), labeled(4)])
    with tarfile.open(root / "shard-000.tar") as tar:
        third = tar.getmembers()[2].offset
    content = bytearray((root / "shard-000.tar").read_bytes())
    content[third + 2] ^= 1
    (root / "shard-000.tar").write_bytes(content)
    shards = index_shards(str(root))
    (entry,) = shards.manifest["left_out"]
    assert entry["name"] == "shard-000.tar:the rest of the tar" and "bad checksum" in entry["reason"]
    assert {"004", "007"} <= {key.decode() for key in shards.index["key"]}


def test_a_foreign_set_at_a_read_only_address(tmp_path, monkeypatch):
    """Indexed over HTTP with broken connections, and the index kept in the cache; likewise for a read-only folder."""
    root = foreign_tars(tmp_path / "foreign", [labeled(0), labeled(4)])
    files = {file.name for file in root.iterdir()}
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
    with serving(root, "drop", "503", suffix="000.tar") as server:
        with pytest.raises(
            UserError, match=rf"have no index; run `python -m pipeline\.shards index {server.url}` first"
        ):
            open_shards(server.url)
        result = run_here("pipeline.shards", "index", server.url)
        assert result.returncode == 0 and "7 images in 2 shards indexed." in result.stdout, result.stderr
        shards = open_shards(server.url)
        assert shards.root == server.url and Path(shards.index_root).is_relative_to(tmp_path / "cache" / "indexes")
        assert {file.name for file in root.iterdir()} == files
        assert run_here("pipeline.shards", "verify", server.url).returncode == 0
        encoded = Reader(shards).read(np.arange(7))
        monkeypatch.setattr("pipeline.shards.index._writable", lambda *_: False)
        there = index_shards(str(root))
        assert {file.name for file in root.iterdir()} == files and there.index_root != there.root
        monkeypatch.undo()
        here = index_shards(str(root))
        assert np.array_equal(here.index, shards.index) and np.array_equal(there.index, shards.index)
        assert Reader(here).read(np.arange(7)) == encoded and here.index_root == str(root)
        (root / "shard-001.tar").write_bytes((root / "shard-000.tar").read_bytes())
        monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
        (problem,) = verify_shards(server.url)
        assert "shard-001.tar does not match its checksum" in problem


def test_interrupted_indexing_of_a_web_address_resumes(tmp_path, monkeypatch):
    """A tar with another ETag is read again."""
    root, cache = foreign_tars(tmp_path / "foreign", [labeled(0), labeled(4), labeled(8)]), cache_at(tmp_path)
    read, read_tar = [], index._read_tar

    def interrupted(fs, path, *options):
        read.append(path[-7:])
        if len(read) == 3:
            raise KeyboardInterrupt
        return read_tar(fs, path, *options)

    monkeypatch.setattr(index, "_read_tar", interrupted)
    with serving(root) as server:
        with pytest.raises(KeyboardInterrupt):
            index_shards(server.url, cache)
        shutil.copy(root / "shard-002.tar", root / "shard-001.tar")
        assert len(index_shards(server.url, cache)) == len(index_shards(str(root)))
    assert read[:5] == ["000.tar", "001.tar", "002.tar", "001.tar", "002.tar"]


def test_a_foreign_set_of_many_shards_gets_a_common_index(tmp_path):
    image = pictures()["class_0/image_0.jpg"]
    root = foreign_tars(tmp_path / "foreign", [{f"{i}.": {"jpg": image, "cls": i % 2}} for i in range(17)])
    shards = index_shards(str(root))
    assert (root / "index.npy").exists() and isinstance(shards.index.base, np.memmap) and len(shards) == 17
    (root / "shard-016.tar").unlink()
    assert len(index_shards(str(root))) == 16 and not (root / "index.npy").exists()
    assert verify_shards(str(root)) == []


def test_brace_notation_for_a_server_that_does_not_list_its_files(tmp_path):
    root = foreign_tars(tmp_path / "foreign", [labeled(0), labeled(4), labeled(8)])
    with serving(root) as server:
        server.lists, cache = False, cache_at(tmp_path)
        with pytest.raises(UserError, match=r"There is no \.tar in .*, use a pattern such as"):
            index_shards(server.url, cache)
        shards = index_shards(f"{server.url}/shard-{{000..001}}.tar", cache)
        assert shards.root == server.url and [entry["file"] for entry in shards.manifest["shards"]] == [
            "shard-000.tar",
            "shard-001.tar",
        ]
        assert np.array_equal(open_shards(server.url, cache).index, shards.index) and len(shards) == 7
        with pytest.raises(FileNotFoundError, match=r"shard-003\.tar: the server answers 404"):
            index_shards(f"{server.url}/shard-{{000..003}}.tar", cache)
    with pytest.raises(UserError, match="names tars in several folders; index each folder separately"):
        index_shards("https://host/{train,test}/shard-{000..003}.tar")
    with pytest.raises(UserError, match=r"The braces in \S+ are unbalanced; use a pattern"):
        index_shards("https://host/shard-{000..003.tar")


@pytest.mark.parametrize("pattern", ["", "/a.tar.{gz,xz}"])
def test_compressed_tars_are_refused(tmp_path, pattern):
    write_tar(tmp_path / "a.tar.gz", {"a.jpg": pictures()["class_0/image_0.jpg"]}, "w:gz")
    with pytest.raises(UserError, match=r"a\.tar\.gz is a compressed tar, .*`python -m pipeline\.convert webdataset`"):
        index_shards(f"{tmp_path}{pattern}")


def test_tars_without_an_index_name_the_remedy(tmp_path):
    root = foreign_tars(tmp_path / "foreign", [labeled(0)])
    with pytest.raises(UserError, match=rf"have no index; run `python -m pipeline.shards index {root}` first"):
        open_shards(str(root))
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "No shards at"), ("nowhere", "No shards at"), ("foo://x", "can't be opened")):
        with pytest.raises(UserError, match=message):
            open_splits(name if "://" in name else str(tmp_path / name))
    with pytest.raises(UserError, match=r"There is no \.tar in"):
        index_shards(str(tmp_path / "empty"))
    foreign_tars(tmp_path / "text", [{"a.txt": b"nothing"}])
    with pytest.raises(UserError, match="No image could be read from the tars"):
        index_shards(str(tmp_path / "text"))
    foreign_tars(tmp_path / "scans", [{"a.dcm": b"scan", "a.cls": b"0"}])
    with pytest.raises(UserError, match=r"No image could be read .*a\.dcm: not an image, or its header is damaged\)"):
        index_shards(str(tmp_path / "scans"))
    result = run_here("pipeline.shards", "verify", tmp_path / "nowhere")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "No shards at" in result.stderr


def found_in(root: Path) -> tuple[dict[str, int], list[str]]:
    """Index a set; returns label by key and the list of what is left out."""
    shards = index_shards(str(root))
    left_out = [f"{entry['name']}: {entry['reason']}" for entry in shards.manifest["left_out"]]
    return {row["key"].decode(): int(row["label"]) for row in shards.index}, left_out


FAULTS = {
    "a folder named like a tar": "z.tar is a folder, not a tar; rename it or move it away",
    "interrupted": "^$",
    "two images": "Sample x of .* has two images",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_indexing_keeps_the_old_index(original, tmp_path, monkeypatch, fault):
    """Only the old manifest holds the set's classes, split and checksums."""
    root = tmp_path / "train"
    shutil.copytree(original, root)
    before = {file.name: file.read_bytes() for file in root.iterdir()}
    image = pictures()["class_0/image_0.jpg"]
    if fault == "a folder named like a tar":
        (root / "z.tar").mkdir()
    elif fault == "two images":
        write_tar(root / "z.tar", {"x.jpg": image, "x.png": image})
    else:
        write_tar(root / "z.tar", {"x.jpg": image})
        calls = []

        def interrupted(encoded, **options):
            calls.append(encoded)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return prepare(encoded, **options)

        monkeypatch.setattr("pipeline.shards.index.prepare", interrupted)
    with pytest.raises((UserError, KeyboardInterrupt), match=FAULTS[fault]):
        index_shards(str(root))
    assert {file.name: file.read_bytes() for file in root.iterdir() if file.name != "z.tar"} == before
    monkeypatch.undo()
    shutil.rmtree(root / "z.tar") if fault == "a folder named like a tar" else (root / "z.tar").unlink()
    again = index_shards(str(root))
    assert again.classes == ["class_0", "class_1", "class_2"] and again.manifest["split"] == "train"
    assert again.manifest["left_out"] == []


def test_a_full_disk_keeps_the_old_index(original, tmp_path, monkeypatch):
    """The disk is full when the manifest is written."""
    root = tmp_path / "train"
    shutil.copytree(original, root)
    before = (root / "dataset.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.shards.index.write_manifest", full)
    with pytest.raises(OSError, match="No space"):
        index_shards(str(root))
    assert (root / "dataset.json").read_bytes() == before and not list(root.glob("*.partial"))
    assert open_shards(str(root)).classes == ["class_0", "class_1", "class_2"]


def test_indexing_again_in_the_cache_keeps_classes_and_checksums(tmp_path, monkeypatch):
    """The cache holds the manifest of a read-only set."""
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.shards.index._writable", lambda *_: False)
    root = foreign_tars(tmp_path / "foreign", [labeled(0), labeled(4)])
    first = index_shards(str(root))
    manifest = Path(first.index_root, "dataset.json")
    manifest.write_text(manifest.read_text().replace('"0",\n  "1",\n  "2"', '"owl",\n  "cat",\n  "dog"'))
    (root / "shard-001.tar").write_bytes((root / "shard-000.tar").read_bytes())
    again = index_shards(str(root))
    assert again.classes == ["owl", "cat", "dog"]
    assert [entry["name"] for entry in again.manifest["left_out"]] == ["shard-001.tar"]


def test_relative_paths_of_read_only_sets_are_not_mixed_up(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.shards.index._writable", lambda *_: False)
    for number, name in enumerate("ab"):
        monkeypatch.chdir(foreign_tars(tmp_path / name, [labeled(4 * number)]))
        index_shards(".")
    for name, other in ("ab", "ba"):
        monkeypatch.chdir(tmp_path / name)
        here, there = open_shards("."), open_shards(f"../{other}")
        assert here.index_root == open_shards(str(tmp_path / name)).index_root != there.index_root
        assert not {*here.index["key"].tolist()} & {*there.index["key"].tolist()}


def test_a_manifest_that_cannot_be_replaced_is_refused(original, tmp_path, monkeypatch):
    """The set's own manifest takes precedence, so an index in the cache would never be read."""
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.shards.index._writable", lambda *_: False)
    with pytest.raises(UserError, match=r"dataset.json exists and can't be replaced; make the folder writable, or"):
        index_shards(str(original))
    assert not (tmp_path / "cache").exists()


def test_labels_apart_from_their_images(tmp_path):
    """Classes after all images, before their images, and without an image."""
    images = [content for name, content in pictures().items() if name.endswith("jpg")]
    (tmp_path / "in").mkdir()
    write_tar(
        tmp_path / "in" / "a.tar",
        {"a.jpg": images[0], "b.jpg": images[1], "c.jpg": images[2], "c.cls": b"2", "a.cls": b"1", "b.cls": b"0"},
    )
    write_tar(
        tmp_path / "in" / "b.tar",
        {
            "e.cls": b"2",
            "d.cls": b"0",
            "d.jpg": images[3],
            "e.jpg": images[4],
            "f.cls": b"1",
            "d.txt": b"",
            "g.cls": b"1",
        },
    )
    labels, left_out = found_in(tmp_path / "in")
    assert labels == {"a": 1, "b": 0, "c": 2, "d": 0, "e": 2}
    assert left_out == ["b.tar:f.cls: its sample has no image, as 1 more in this tar"]
    source = webdataset_source(tmp_path / "in")
    assert {key: int(label) for label, key, _ in source.items} == labels
    assert source.left_out == [("b.tar:f.cls", "its sample has no image, as 1 more in this tar")]


def test_labels_in_any_order_of_members(tmp_path):
    (tmp_path / "in").mkdir()
    random = np.random.default_rng(0)
    images = [content for name, content in pictures().items() if name.endswith("jpg")]
    files = {f"{n}.jpg": images[n] for n in range(7)} | {f"{n}.cls": b"%d" % (n % 3) for n in range(5)} | {"x.txt": b""}
    for _ in range(20):
        names = random.permutation(list(files)).tolist()
        write_tar(tmp_path / "in" / "in.tar", {name: files[name] for name in names})
        (tmp_path / "in" / "dataset.json").unlink(missing_ok=True)
        labels, left_out = found_in(tmp_path / "in")
        assert labels == {str(n): n % 3 if n < 5 else -1 for n in range(7)} and left_out == [], names
        items = webdataset_source(tmp_path / "in").items
        assert {key: label for label, key, _ in items} == {str(n): str(n % 3) if n < 5 else None for n in range(7)}


def test_labels_of_repeated_keys(tmp_path):
    """Adjacent duplicates are listed; apart, each keeps its adjacent class, and other classes are ambiguous."""
    first, second, third = list(pictures().values())[3:6]
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "in.tar", "w") as tar:
        for name, content in (
            ("a.jpg", first),
            ("a.cls", b"0"),
            ("a.jpg", second),
            ("a.cls", b"1"),
            ("b.jpg", first),
            ("b.cls", b"2"),
            ("c.jpg", first),
            ("b.jpg", second),
            ("b.cls", b"3"),
            ("d.jpg", first),
            ("c.jpg", second),
            ("e.jpg", third),
            ("c.cls", b"4"),
            ("a.cls", b"0"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    shards = index_shards(str(tmp_path / "in"))
    rows = [(row["key"].decode(), int(row["label"]), int(row["crc32"])) for row in shards.index]
    one, two, three = map(zlib.crc32, (first, second, third))
    expected = [("a", 0, one), ("b", 2, one), ("c", -1, one), ("b", 3, two), ("d", -1, one), ("c", -1, two)]
    assert rows == [*expected, ("e", -1, three)]
    assert [(entry["name"][7:], entry["reason"][:20]) for entry in shards.manifest["left_out"]] == [
        ("a.jpg", "a second image of th"),
        ("a.cls", "a second class of it"),
        ("c.cls", "which image it belon"),
        ("a.cls", "which image it belon"),
    ]


@pytest.mark.parametrize("order", ["by sample", "by kind"])
def test_a_sample_with_two_images_is_refused_unless_one_is_chosen(tmp_path, order):
    """For example a photograph and its mask."""
    images = list(pictures().values())
    files = {
        f"{key}.{kind}": images[2 if kind == "png" else i] for i, key in ((0, "a"), (1, "b")) for kind in ("jpg", "png")
    }
    if order == "by kind":
        files = dict(sorted(files.items(), key=lambda item: item[0][::-1]))
    files |= {"a.cls": b"1", "only.png": images[2], "c.mask.png": images[2], "c.JPG": images[4]}
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "in.tar", files)
    message = r"Sample a of \S+in.tar has two images, a.(jpg|png) and a.(jpg|png); use --image-extension (jpg|png) or "
    with pytest.raises(UserError, match=message):
        index_shards(str(tmp_path / "in"))
    with pytest.raises(UserError, match=message):
        webdataset_source(tmp_path / "in")
    result = run_here("pipeline.shards", "index", tmp_path / "in", "--image-extension", "jpg")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "left out in.tar:only.png: its sample has no .jpg\n"
    by_key = {
        row["key"].decode(): (int(row["crc32"]), int(row["label"])) for row in open_shards(str(tmp_path / "in")).index
    }
    assert by_key == {
        "a": (zlib.crc32(images[0]), 1),
        "b": (zlib.crc32(images[1]), -1),
        "c": (zlib.crc32(images[4]), -1),
    }
    arguments = ("webdataset", tmp_path / "in", tmp_path / "out", "--image-extension", ".PNG", "--workers", "1")
    result = run_here("pipeline.convert", *arguments)
    assert result.returncode == 0 and "left out in.tar:c.mask.png: its sample has no .png" in result.stderr, (
        result.stderr
    )
    assert {key: label for key, (label, _) in contents(open_shards(str(tmp_path / "out" / "train"))).items()} == {
        "a": "1",
        "b": None,
        "only": None,
    }
    assert index_shards(str(tmp_path / "in"), image_extension="mask.png").index["key"].tolist() == [b"c"]


def test_images_with_dots_in_their_names_are_left_out(tmp_path):
    """In WebDataset, the extension starts at the first dot."""
    image = pictures()["class_0/image_0.jpg"]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "in.tar", {"a.1.jpg": image, "a.2.jpg": image, "b.3.jpg": image, "c.jpg": image})
    labels, left_out = found_in(tmp_path / "in")
    assert labels == {"c": -1}
    reason = "its extension, all behind the first dot, is unknown; use --image-extension or rename it"
    assert left_out == [f"in.tar:a.1.jpg: {reason}, as 1 more in this tar"]


CLASSES = {
    "25 digits": (b"1" * 25, "the class is not a number below 1000000"),
    "5000 digits": (b"1" * 5000, "a class of more than 1024 bytes"),
    "900 digits": (b"1" * 900, "the class is not a number below 1000000"),
    "1700000000": (b"1700000000", "the class is not a number below 1000000"),
    "million": (b"1000000", "the class is not a number below 1000000"),
    "superscript": ("²".encode(), "the class is not a number below 1000000"),
    "negative": (b"-3", "the class is not a number below 1000000"),
    "float": (b"1.0", "the class is not a number below 1000000"),
    "bytes": (bytes(range(128, 256)), "the class is not a number below 1000000"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_classes_that_are_not_class_numbers(tmp_path, case):
    """Indexing accepts numbers only and lists the others; conversion uses them as names if they are short."""
    content, reason = CLASSES[case]
    image = pictures()["class_0/image_0.jpg"]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "in.tar", {"a.jpg": image, "a.cls": content, "b.jpg": image, "b.cls": b" 0000000001\n"})
    labels, left_out = found_in(tmp_path / "in")
    assert labels == {"a": -1, "b": 1} and len(left_out) == 1 and left_out[0].startswith(f"in.tar:a.cls: {reason}")
    source = webdataset_source(tmp_path / "in")
    if len(content) > 1024:
        assert [label for label, _, _ in source.items] == [None, "1"] and source.classes == ["0", "1"]
    else:
        name = content.decode(errors="replace")
        assert [label for label, _, _ in source.items] == [name, "0000000001"]
        assert source.classes == sorted([name, "0000000001"])


def test_contents_that_mean_unlabeled(tmp_path):
    image = pictures()["class_0/image_0.jpg"]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "in.tar", {"a.jpg": image, "a.cls": b"-1", "b.jpg": image, "b.cls": b" \n"})
    assert found_in(tmp_path / "in") == ({"a": -1, "b": -1}, [])
    assert [label for label, _, _ in webdataset_source(tmp_path / "in").items] == [None, None]


def test_names_that_are_not_utf_8(tmp_path):
    image = pictures()["class_0/image_0.jpg"]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "in.tar", {"caf\udce9/\udcfc.jpg": image, "caf\udce9/\udcfc.cls": b"1", "b.jpg": image})
    assert found_in(tmp_path / "in") == ({r"caf\udce9/\udcfc": 1, "b": -1}, [])
    assert [key for _, key, _ in webdataset_source(tmp_path / "in").items] == [r"caf\udce9/\udcfc", "b"]
    result = run_here("pipeline.shards", "index", tmp_path / "in")
    assert result.returncode == 0 and "2 images in 1 shards indexed." in result.stdout


@pytest.mark.parametrize("form", ["index", "webdataset", "folder"])
def test_long_names_are_left_out(tmp_path, form):
    """All keys of an index are as wide as the longest."""
    image = pictures()["class_0/image_0.jpg"]
    (tmp_path / "in").mkdir()
    files = {
        f"a/{'k' * 300_000}.jpg": image,
        f"b/{'k' * 1018}.jpg": image,
        "c/" + "\udce9" * 500 + ".jpg": image,
        "d.jpg": image,
    }
    path = write_tar(tmp_path / "in" / "in.tar", files)
    if form == "index":
        shards = index_shards(str(tmp_path / "in"))
        left_out = [(entry["name"], entry["reason"]) for entry in shards.manifest["left_out"]]
        assert [len(key) for key in shards.index["key"]] == [1020, 1] and shards.index.nbytes < 3000
    else:
        source = webdataset_source(path) if form == "webdataset" else folder_source(path)
        assert [len(key) for _, key, _ in source.items] == [1020, 1]
        left_out = source.left_out
    assert [reason for _, reason in left_out] == ["its name is longer than 1024 bytes"] * 2
    assert max(len(name) for name, _ in left_out) < 100


SIZES = {
    "-1": b"\xff" * 12,
    "-1024": b"\xff" * 10 + b"\xfc\x00",
    "terabytes": b"\x80" + bytes(4) + b"\x20" + bytes(6),
    "beyond 64 bits": b"\x80" + b"\x01" * 11,
}


@pytest.mark.parametrize("size", SIZES)
def test_an_impossible_member_size_is_damage(tmp_path, size):
    """tarfile would loop over the same members or try to read terabytes."""
    (tmp_path / "in").mkdir()
    image = pictures()["class_0/image_0.jpg"]
    path = write_tar(tmp_path / "in" / "in.tar", {"a.jpg": image, "b.txt": b"x", "c.txt": b"x"})
    content = bytearray(path.read_bytes())
    at = content.index(b"b.txt")
    content[at + 124 : at + 136] = SIZES[size]
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)
    message = "unexpected end of data" if size == "terabytes" else "an impossible size at byte"
    for read in folder_source, webdataset_source:
        with pytest.raises(UserError, match=rf"is not a whole, uncompressed tar .{message}"):
            read(path)
    with pytest.raises(UserError, match="No image could be read"):  # no other sample follows the only one
        index_shards(str(tmp_path / "in"))


# ---- images beyond 8-bit RGB


def deep_tars(root: Path, *kinds: str) -> Path:
    """One tar of four images per kind; the arrays next to photographs are no images."""
    photographs, tars = list(pictures().values()), []
    for kind in kinds:
        scans = [levels(20, 24, 1 if kind == "png" else 5, seed=n) >> n for n in range(4)]
        content = {
            "png": lambda n, scans=scans: {"png": png16(scans[n], 0)},
            "npy": lambda n, scans=scans: {"npy": npy(scans[n])},
            "jpg": lambda n: {"jpg": photographs[n], "npy": npy(np.zeros(3))},
        }[kind]
        tars.append({f"{kind}{n}.": content(n) | {"cls": n % 2} for n in range(4)})
    return foreign_tars(root, tars)


@pytest.mark.parametrize("kind", ["png", "npy", "jpg"])
def test_channels_bits_and_colors_are_recorded(tmp_path, kind):
    shards = index_shards(str(deep_tars(tmp_path / "foreign", kind, kind)))
    assert shards.pixel_format == {"png": PixelFormat(1, 16), "npy": PixelFormat(5, 16), "jpg": RGB8}[kind]
    assert len(shards) == 8 and shards.manifest["left_out"] == []
    pixels = [decode_pixels(content, shards.pixel_format) for content in Reader(shards).read(np.arange(8))]
    means = np.mean([image.mean((0, 1)) / shards.pixel_format.white for image in pixels], 0)
    found = shards.manifest["statistics"]
    np.testing.assert_allclose(found["mean"], means, atol=6e-5 if kind == "jpg" else 6e-9)
    assert found["measured_images"] == 8 and len(found["std"]) == shards.pixel_format.channels


def test_colors_are_measured_on_images_at_equal_distances(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.shards.index.MEASURED_IMAGES", 4)
    shards = index_shards(str(deep_tars(tmp_path / "foreign", "png", "png")))
    assert shards.manifest["statistics"]["measured_images"] == 4
    expected = np.mean([(levels(20, 24, seed=n) >> n).mean() / 65535 for n in (0, 2)])
    assert shards.manifest["statistics"]["mean"] == pytest.approx([expected], abs=6e-9)


def test_mixed_formats_are_refused_unless_reduced_to_8_bits(tmp_path, monkeypatch):
    root = deep_tars(tmp_path / "foreign", "png", "jpg")
    refused = r"\(gray, 16 bits: 4; RGB, 8 bits: 4\); .* `python -m pipeline.shards index` with --bits 8"
    with pytest.raises(UserError, match=refused):
        index_shards(str(root))
    assert {file.suffix for file in root.iterdir()} == {".tar"}
    monkeypatch.setattr("sys.argv", ["shards", "index", str(root), "--bits", "8"])
    main()
    assert open_shards(str(root)).pixel_format == RGB8
    assert index_shards(str(root)).pixel_format == RGB8  # an existing index keeps its bits
    (root / "shard-001.tar").unlink()
    assert index_shards(str(root)).pixel_format == RGB8
    (root / "dataset.json").unlink()
    assert index_shards(str(root)).pixel_format == PixelFormat(1, 16)
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.shards.index._writable", lambda *_: False)
    other = deep_tars(tmp_path / "other", "png", "jpg")
    with pytest.raises(UserError, match=refused):
        index_shards(str(other))
    assert index_shards(str(other), bits=8).pixel_format == RGB8  # what was found with other options is not resumed


def test_folders_of_splits_are_indexed_with_the_classes_of_the_train_split(tmp_path, monkeypatch, capsys):
    for split, files in ("train", labeled(0)), ("test", {"7.": {"jpg": pictures()["class_0/image_0.jpg"], "cls": 0}}):
        foreign_tars(tmp_path / "set" / split, [files])
    monkeypatch.setattr("sys.argv", ["shards", "index", str(tmp_path / "set")])
    main()
    assert capsys.readouterr().out == "3 images in 1 shards indexed.\n1 images in 1 shards indexed.\n"
    train, test = open_splits(str(tmp_path / "set"))
    assert len(train) == 3 and len(test) == 1 and test.classes == ["0", "1"]


def test_images_that_need_options_or_packages_are_left_out(tmp_path):
    arrays = {f"{n}.": {"npy": npy(levels(20, 24, 3, 8))} for n in range(2)}
    root = foreign_tars(tmp_path / "foreign", [arrays, labeled(0)])
    shards = index_shards(str(root))
    assert len(shards) == 3 and shards.pixel_format == RGB8
    reason = "can't be read in place; use `python -m pipeline.convert webdataset`, which encodes its pixels again"
    assert shards.manifest["left_out"] == [{"name": f"shard-000.tar:{n}.npy", "reason": reason} for n in range(2)]
    converted = write_split(webdataset_source(root), tmp_path / "out", "train")
    assert len(converted) == 5 and converted.pixel_format == RGB8
