"""Data sets of the `datasets` library and parquet files, all made here: nothing is fetched from the Hub."""

import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from common import UserError
from pipeline.augment.config import AugmentConfig
from pipeline.convert import huggingface
from pipeline.convert.__main__ import main
from pipeline.convert.huggingface import huggingface_sources
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.data import open_data
from pipeline.images.pixel_format import RGB8, PixelFormat
from pipeline.loader import LoaderConfig
from pipeline.shards.dataset import ShardSet, open_shards, open_splits
from tests.pipeline.deep_images import levels, png16
from tests.pipeline.image_sets import contents, damaged, digests, pictures, rejected, run_module, write_folder
from tests.pipeline.loaders import view_loader

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CLASSES = ["class_0", "class_1", "class_2"]
IMAGE, LABEL = datasets.Image(), datasets.ClassLabel(names=CLASSES)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))  # for other processes
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    """Class folders in the order in which they are listed."""
    return dict(sorted(pictures().items()))


def labels_of(images: dict[str, bytes]) -> list[int]:
    return [CLASSES.index(name.split("/")[0]) for name in images]


def made(images: list[bytes], labels: list | None = None, label=LABEL, **columns) -> "datasets.Dataset":
    rows, features = {"image": [{"bytes": image, "path": None} for image in images]}, {"image": IMAGE}
    if labels is not None:
        rows["label"], features["label"] = labels, label
    for name, (values, feature) in columns.items():
        rows[name], features[name] = values, feature
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def raw_parquet(path: Path, images: list[bytes], labels: list[int], struct: bool) -> Path:
    """Write a parquet file as tools other than `datasets` do, with two row groups."""
    column = [{"bytes": image, "path": "x.jpg"} for image in images] if struct else images
    pq.write_table(pa.table({"jpg": column, "label": labels}), path, row_group_size=7)
    return path


def converted(path: Path | str, out: Path, split: str = "train", **options) -> ShardSet:
    return write_split(huggingface_sources(str(path), split, **options)[split], out, split, samples_per_shard=5)


def views(shards: ShardSet) -> dict[bytes, torch.Tensor]:
    """Encoded image -> its views, (2, 3, 16, 16)."""
    loader = view_loader(shards, AugmentConfig(size=16), batch_size=4, seed=1, device=torch.device("cpu"),
                        backend="opencv", epochs=1)  # fmt: skip
    stored, keys = contents(shards), [key.decode() for key in shards.index["key"]]
    found = {}
    for batch in loader:
        for position, pair in zip(batch.index, batch.views.unflatten(0, (2, -1)).transpose(0, 1), strict=True):
            found[stored[keys[position]][1]] = pair
    loader.close()
    return found


def test_the_same_images_give_the_same_views_from_every_form(tmp_path, images):
    """A folder as --data, class folders, a saved set, parquet with and without metadata, and streams, bit for bit."""
    write_folder(tmp_path / "in" / "train", images)
    write_folder(tmp_path / "in" / "test", {name: images[name] for name in list(images)[::4]})
    reference = write_split(folder_source(tmp_path / "in" / "train"), tmp_path / "0", "train", 0, 5)
    data, _ = open_data(str(tmp_path / "in"), LoaderConfig(cache_dir=str(tmp_path / "cache")))
    content, labels = list(images.values()), labels_of(images)
    made(content, labels).save_to_disk(tmp_path / "saved")
    made(content, labels).to_parquet(tmp_path / "by_datasets.parquet")
    raw_parquet(tmp_path / "struct.parquet", content, labels, struct=True)
    (tmp_path / "folder").mkdir()
    for part, first in enumerate((0, 8)):
        file = tmp_path / "folder" / f"train-{part:05d}-of-00002.parquet"
        raw_parquet(file, content[first : first + 8], labels[first : first + 8], struct=False)
    names, forms = ("saved", "by_datasets.parquet", "struct.parquet", "folder"), {"--data": data}
    for name, streaming in product(names, (False, True)):
        out = tmp_path / f"{name}-{streaming}"
        forms[out.name] = converted(tmp_path / name, out, streaming=streaming)
    expected = views(reference)
    assert len({pair.numpy().tobytes() for pair in expected.values()}) == len(images) == 12
    assert sorted(contents(reference).values()) == sorted(
        (CLASSES[label], image) for label, image in zip(labels, content, strict=True)
    )
    for name, shards in forms.items():
        found = views(shards)
        assert found.keys() == expected.keys() == set(content), name
        assert all(torch.equal(found[image], expected[image]) for image in content), name
        assert shards.index["label"].tolist() == reference.index["label"].tolist()
    del forms["--data"]  # whose shards are larger; keys are row numbers in the others
    assert len({tuple(shard["sha256"] for shard in shards.manifest["shards"]) for shards in forms.values()}) == 1


def test_images_of_16_bits_keep_their_bytes(tmp_path):
    """Also from a stream, which prepares images twice if they are shrunk."""
    scans = [png16(levels(20, 24, seed=n), 0) for n in range(4)]
    made(scans).save_to_disk(tmp_path / "saved")
    made(scans).to_parquet(tmp_path / "scans.parquet")
    for name in "saved", "scans.parquet":
        shards = converted(tmp_path / name, tmp_path / f"{name}.out")
        assert shards.pixel_format == PixelFormat(1, 16)
        assert {content for _, content in contents(shards).values()} == set(scans)
    options = {"short_side": 10, "bits": 8}
    source = huggingface_sources(str(tmp_path / "scans.parquet"), "train", streaming=True, **options)["train"]
    shards = write_split(source, tmp_path / "reduced", "train", **options)
    assert shards.pixel_format == RGB8 and set(shards.index["height"]) == {10}


def test_command_with_splits_worker_processes_and_an_unlabeled_test_split(tmp_path, images, monkeypatch):
    content, labels = list(images.values()), labels_of(images)
    part = made(content[:3], [0, 1, 2])
    saved = {"validation": part, "test": made(content[:2], [-1, -1]), "train": made(content, labels)}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    out = tmp_path / "out"
    options = ("--workers", 2, "--shard-size", 5)
    result = run_module("pipeline.convert", "hf", tmp_path / "saved", out, *options)
    assert result.returncode == 0, result.stderr
    assert "left out the split test, since it has no labels" in result.stderr
    train, test = open_splits(str(out))
    assert test.root == f"{out}/val" and len(test) == 3 and not (out / "test").exists()
    assert contents(train) == {
        f"train-{row:06d}": (CLASSES[label], image)
        for row, (label, image) in enumerate(zip(labels, content, strict=True))
    }
    assert run(monkeypatch, "hf", tmp_path / "saved", tmp_path / "one", "--split", "validation", *options) is None
    assert digests(tmp_path / "one" / "val") == digests(out / "val")
    assert run(monkeypatch, "hf", tmp_path / "saved", out, "--split", "test") is None
    assert set(open_shards(f"{out}/test").index["label"]) == {-1}
    refused = run(monkeypatch, "hf", tmp_path / "saved", out, "--split", "dev")
    assert refused.endswith("use --split val or test or train.")
    made(content[:3], [0, 1, 2]).to_parquet(tmp_path / "part.parquet")  # a single file does not name its split
    options = (*options, "--streaming", "--image-column", "image", "--label-column", "label", "--no-verify")
    assert run(monkeypatch, "hf", tmp_path / "part.parquet", tmp_path / "two", "--split", "val", *options) is None
    assert (tmp_path / "two/val/val-000000.tar").read_bytes() == (out / "val/val-000000.tar").read_bytes()


def run(monkeypatch, *arguments) -> str | None:
    """Run the converter's command line in this process; returns its error message."""
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    try:
        main()
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(
    "labels, feature, classes",
    [
        ([5, 0, -1, None], datasets.Value("int32"), ["0", "1", "2", "3", "4", "5"]),
        (["owl", "cat", "", None], datasets.Value("string"), ["cat", "owl"]),
        ([2, 0, -1, None], LABEL, CLASSES),
        (None, None, []),
        ([[0], [1], [], [2]], datasets.List(LABEL), []),  # several classes per image
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_labels(tmp_path, images, labels, feature, classes, streaming):
    made(list(images.values())[:4], labels, feature).to_parquet(tmp_path / "set.parquet")
    source = huggingface_sources(str(tmp_path / "set.parquet"), streaming=streaming)["train"]
    names = [label for label, *_ in source.items]
    expected = [None] * 4
    if classes:
        expected[:2] = [classes[label] if isinstance(label, int) else label for label in labels[:2]]
    assert source.classes == classes and names == expected


def test_unreadable_images_are_left_out_with_their_row(tmp_path, images):
    bad = damaged()
    (tmp_path / "elsewhere.jpg").write_bytes(images["class_0/image_0.jpg"])
    rows = [*bad.values(), None, None, None]
    paths = [None] * len(bad) + [str(tmp_path / "elsewhere.jpg"), str(tmp_path / "missing.jpg"), None]
    column = [{"bytes": image, "path": path} for image, path in zip(rows, paths, strict=True)]
    column[-1] = None
    features = datasets.Features({"image": IMAGE})
    datasets.Dataset.from_dict({"image": column}, features=features).to_parquet(tmp_path / "set.parquet", batch_size=4)
    for streaming in (False, True):
        shards = converted(tmp_path / "set.parquet", tmp_path / str(streaming), streaming=streaming)
        assert contents(shards) == {f"train-{len(bad):06d}": (None, images["class_0/image_0.jpg"])}
        assert rejected(shards).keys() == {f"train-{row:06d}" for row in range(len(rows)) if row != len(bad)}


def test_streamed_images_may_be_shrunk_before_they_are_stored(tmp_path, images):
    content = [*images.values(), damaged()["truncated"]]
    made(content).to_parquet(tmp_path / "set.parquet")
    options, found = {"short_side": 12, "quality": 80}, {}
    for streaming in (False, True):
        (source,) = huggingface_sources(str(tmp_path / "set.parquet"), streaming=streaming, **options).values()
        shards = write_split(source, tmp_path / str(streaming), "train", **options)
        found[streaming] = digests(Path(shards.root))
    assert found[False] == found[True]
    assert sum(len(source.read(*address)) for *_, address in source.items) < sum(map(len, content))


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_conversion_resumes(tmp_path, images, monkeypatch, streaming):
    """Finished shards are kept; another data set of the same size is refused."""
    path = str(tmp_path / "set.parquet")
    made(list(images.values()), labels_of(images)).to_parquet(path)
    whole = converted(path, tmp_path / "whole", streaming=streaming)
    source = huggingface_sources(path, streaming=streaming)["train"]
    calls = []

    def failing(number: int) -> bytes:
        calls.append(number)
        if len(calls) == 8:
            raise UserError("interrupted")
        return source.read(number)

    broken = huggingface.Source(source.name, source.items, failing, source.classes, modified=source.modified)
    with pytest.raises(UserError, match="interrupted"):
        write_split(broken, tmp_path / "out", "train", samples_per_shard=5)
    if streaming:
        (tmp_path / "other").mkdir()
        made(list(images.values())[::-1], labels_of(images)).to_parquet(tmp_path / "other" / "set.parquet")
        with pytest.raises(UserError, match="holds an unfinished conversion with another plan"):
            converted(tmp_path / "other" / "set.parquet", tmp_path / "out", streaming=True)
    read = []
    source = huggingface_sources(path, streaming=streaming)["train"]
    again = huggingface.Source(source.name, source.items, lambda number: read.append(number) or source.read(number),
                               source.classes, modified=source.modified)  # fmt: skip
    shards = write_split(again, tmp_path / "out", "train", samples_per_shard=5)
    assert len(read) == 7 and digests(Path(shards.root)) == digests(Path(whole.root))


def test_columns_that_cannot_be_chosen_are_reported(tmp_path, images):
    content, labels = list(images.values())[:3], [0, 1, 2]
    two = made(content, labels, mask=([{"bytes": image, "path": None} for image in content], IMAGE),
               coarse=([0, 0, 1], datasets.ClassLabel(names=["a", "b"])))  # fmt: skip
    two.save_to_disk(tmp_path / "two")
    two.remove_columns(["image", "mask"]).save_to_disk(tmp_path / "none")
    made(content).select([]).save_to_disk(tmp_path / "empty")
    made(content).select([]).to_parquet(tmp_path / "empty.parquet")
    made(content, [0, 1, 7], datasets.Value("int64")).cast_column("label", datasets.Value("float32")).save_to_disk(
        tmp_path / "float"
    )
    for name, options, message in (
        ("two", {}, r"two has several columns of images; use --image-column image or mask\."),
        ("two", {"image_column": "mask"}, r"several columns of classes; use --label-column label or coarse\."),
        ("two", {"image_column": "coarse"}, r"The column coarse .* holds ClassLabel.*, not images; use another"),
        ("two", {"image_column": "img"}, r"has no column img; use --image-column with one of image, label, mask, c"),
        ("none", {}, r"none has no column of images \(only label, coarse\); use a data set that stores"),
        ("empty", {}, r"empty has an empty split \(.*\); use another data set"),
        ("empty.parquet", {}, r"empty.parquet has an empty split \(.*\); use another data set"),
        ("empty.parquet", {"streaming": True}, r"The split train of .*empty.parquet is empty; use another data set\."),
        (
            "float",
            {"label_column": "label"},
            r"column label of .* holds Value\('float32'\), not one class per",
        ),
    ):
        with pytest.raises(UserError, match=message):
            huggingface_sources(str(tmp_path / name), **options)
    source = huggingface_sources(str(tmp_path / "two"), image_column="mask", label_column="coarse")["train"]
    assert [label for label, *_ in source.items] == ["a", "a", "b"] and source.read(2) == content[2]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_with_different_columns_are_reported(tmp_path, images, streaming):
    content = list(images.values())[:3]
    made(content, [0, 1, 2]).to_parquet(tmp_path / "a.parquet")
    made(content).rename_column("image", "photo").to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"files of .* have different columns \(photo instead of image, label\); use"):
        huggingface_sources(str(tmp_path), streaming=streaming)


def test_sets_that_cannot_be_loaded_are_reported(tmp_path, monkeypatch):
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"damaged.parquet can't be read \(.*\); use a name on the Hub"):
        huggingface_sources(str(tmp_path / "damaged.parquet"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"nothing can't be read \(.*\); use a name on the Hub"):
        huggingface_sources(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"absent can't be read \(Couldn't find any data file at .*\); use a name"):
        huggingface_sources(str(tmp_path / "absent"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"someone/photos can't be read \(Couldn't reach .*\); check the connection"):
        huggingface_sources("someone/photos")
    gone = datasets.exceptions.DatasetNotFoundError
    for error, message in (
        (gone("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), r"accessed\); .* if the data set is p"),
        (gone("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated."), r"^a/b is gated; accept its"),
        (ValueError("BuilderConfig 'x' not found. Available: ['y', 'z']"), r"'z'\]\); choose one by --config-name\.$"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(UserError, match=message):
            huggingface_sources("a/b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"requires the package datasets \(.*\): pip install datasets\."):
        huggingface_sources("a/b")
