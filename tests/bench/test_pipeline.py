"""Tests of the pipeline benchmark: rendered images, candidates, and the arithmetic of its rows, on a few images."""

import re
from importlib.util import find_spec
from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
import torch

from bench import pipeline as bench
from bench import plot, stages
from pipeline.augment.config import AugmentConfig
from pipeline.augment.opencv import resized_crop
from pipeline.images.files import decode
from pipeline.images.pixel_format import RGB8
from pipeline.loader import LoaderConfig
from pipeline.shards.dataset import ShardSet

CPU = torch.device("cpu")


def test_rendered_photographs():
    images = [decode(bench.photograph(number)) for number in range(4)]
    assert [image.shape[:2] for image in images] == [(500, 400), (400, 500), (400, 500), (500, 400)]
    assert bench.photograph(2) == bench.photograph(2) != bench.photograph(1)
    for image in images:
        assert image.std() > 25 and image.min() < 60 and image.max() > 190  # light and shade
    small = decode(bench.with_short_side(bench.photograph(1), 256))
    assert small.shape == (256, 320, 3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    images = [bench.with_short_side(bench.photograph(number), 64) for number in range(5)]
    return bench.make_shards(images, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def rows(shards) -> list[dict]:
    """Rows of a benchmark of four small images, without worker processes of the peers."""
    patch = pytest.MonkeyPatch()
    patch.setattr(bench, "BATCH", 4)
    patch.setattr(bench, "STEADY_BATCH", 4)
    patch.setattr(bench, "DataLoader", lambda dataset, batch, **_: torch.utils.data.DataLoader(dataset, batch))
    yield bench.measure(shards, "small", AugmentConfig(size=48), threads=2, seconds=0, device=CPU)
    patch.undo()


def test_rows(rows):
    named = {(row["implementation"], row["jitter"], row["stage"]): row for row in rows}
    assert len(named) == len(rows)  # unique
    for name in ("opencv", "kornia", "loader"):
        assert {(name, "exact", "all"), (name, "affine", "all")} <= set(named)
    backends = ["opencv", "kornia", *(["dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else [])]
    for name in backends:
        assert {(name, "", "geometry"), (name, "exact", "color"), (name, "affine", "color")} <= set(named)
        assert {(name, "", "blur"), (name, "", "normalize")} <= set(named)
    assert {("opencv", "", "read"), ("opencv", "", "decode")} <= set(named)
    assert ("dali" in backends) == (("dali", "", "decode by DALI") in named)
    assert ("torchvision", "exact", "all") in named
    assert [name for name, row in named.items() if "ratio_to_backend" in row] == [
        ("loader", "exact", "all"),
        ("loader", "affine", "all"),
    ]
    for row in rows:
        assert row["runs"] == 3 and row["images"] in (2, 4) and row["workers"] == 2 and row["shards"] == "small"
        assert row["images_per_s"] == pytest.approx(1000 * row["images"] / row["median_ms"], rel=0.01)
    assert named["opencv", "", "decode"]["ratio_to_decode"] == 1
    peers = [row for row in rows if row["implementation"] in ("torchvision", "lightly")]
    assert max(peers, key=lambda row: row["images_per_s"])["ratio_to_best_peer"] == 1


def test_no_peer_computes_during_the_next_turn():
    """A DataLoader's workers fetch ahead; closing its stream waits until nothing is left to fetch."""
    left = iter(range(5))
    stream = bench.drained(left)
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()
    assert not list(left)


@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_loader_and_backend_are_timed_on_the_same_views(shards, jitter):
    """Also over the end of an epoch, here after each batch."""
    config = AugmentConfig(size=48, jitter=jitter).for_images(RGB8, {})
    streams = bench.Streams(shards, config, 4, 2, CPU)
    batches = list(streams.batches(3))
    assert [len(set(encoded)) for encoded, _ in batches] == [4] * 3
    loader, backend = streams.loader(), streams.backend(batches)
    pairs = list(zip(backend, loader, strict=False))
    assert len(pairs) == 3 and all(torch.equal(alone, loaded) for alone, loaded in pairs)
    loader.close()


def test_the_largest_steady_state_repeats_no_image():
    ahead = LoaderConfig().prefetch + 2  # see `Prefetcher`
    assert bench.STEADY_BATCH * (bench.SKIPPED + bench.TIMED) <= bench.DISTINCT and ahead < bench.SKIPPED


def test_kornia_and_dali_take_large_batches_on_a_gpu():
    data = SimpleNamespace(samples=np.arange(1000))
    on_cpu = {"kornia": bench.BATCH // 2, "dali": 2 * bench.BATCH}
    for device, limits in ((CPU, on_cpu), (torch.device("cuda"), {"kornia": 256, "dali": 256})):
        found = bench.counts(data, device)
        assert found == {name: limits[name] for name in found}


def test_a_ratio_is_the_median_over_the_rounds():
    assert bench._ratio([2.0, 40.0, 3.0], [1.0, 10.0, 6.0]) == 2.0


def test_the_plot_is_drawn_from_the_rows(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    monkeypatch.setattr(plot, "read_rows", lambda name: [{k: str(v) for k, v in row.items()} for row in rows])
    assert plot.plot_pipeline().stat().st_size > 10_000


@pytest.fixture
def filled(rows, tmp_path, monkeypatch):
    """Function that fills a table of a page twice and returns its lines of cells; the page around it stays."""
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    columns = dict.fromkeys(name for row in rows for name in row)  # a CSV has every column in every row
    monkeypatch.setattr(plot, "read_rows", lambda _: [{k: str(row.get(k, "")) for k in columns} for row in rows])

    def fill(table, page, mark):
        marks = (f"<!-- {mark} -->", f"<!-- /{mark} -->")
        document = tmp_path / page
        document.write_text(f"before\n\n{marks[0]}\n\nold\n\n{marks[1]}\n\nafter\n")
        for _ in range(2):  # filling it again changes nothing
            table()
            before, content, after = (part.strip() for part in re.split("|".join(marks), document.read_text()))
            assert (before, after) == ("before", "after")
        lines = [line for line in content.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]

    return fill


def test_the_loader_table_is_filled_from_the_rows(rows, filled):
    _, _, *lines = filled(plot.fill_loader_table, "benchmarks.md", "pipeline:loader")
    named = {(row["implementation"], row["jitter"]): row for row in rows if row["stage"] == "all"}
    for jitter, cells in zip(("exact", "affine"), lines, strict=True):
        alone, loader = (named[name, jitter] for name in ("opencv", "loader"))
        rates = [str(row["images_per_s"]) for row in (alone, loader)]
        assert cells == ["small", jitter, *rates, str(loader["ratio_to_backend"])]


def test_the_table_of_views_is_filled_from_the_rows(rows, filled):
    header, _, first, *lines = filled(plot.fill_views_table, "augmentation.md", "pipeline:views")
    assert header[0] == "" and header[1].startswith("small, ") and first[0] == "decoding alone"
    assert first[1].endswith("(1.00)")
    (exact,) = (
        row for row in rows if (row["implementation"], row["jitter"], row["stage"]) == ("opencv", "exact", "all")
    )
    assert ["OpenCV backend, exact jitter", f"{exact['images_per_s']:.0f} ({exact['ratio_to_decode']:.2f})"] in lines
    assert not any("loader" in name for name, _ in lines)


def test_stages_of_opencv_keep_the_images(shards, monkeypatch):
    """Compiled functions read an image by its address, which does not keep it."""
    decoded = []
    monkeypatch.setattr(stages, "decode", lambda file: decoded.append(ref(image := decode(file))) or image)
    config = AugmentConfig(size=48).for_images(RGB8, {})
    candidates = list(stages.opencv_stages(stages.Prepared(shards, config, 2, 4, 4), config, CPU))
    assert len(candidates) == 7 and len(decoded) == 4 and all(image() is not None for image in decoded)


def test_each_stage_of_dali_receives_the_output_of_the_previous_one(tmp_path):
    """Crops match those of the OpenCV backend, and the other stages start from such crops."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")
    images = [bench.with_short_side(bench.photograph(number), 64) for number in range(4)]
    config = AugmentConfig(size=48).for_images(RGB8, {})
    data = stages.Prepared(bench.make_shards(images, tmp_path), config, 2, 4, 4)
    found = {(c.stage, c.jitter): c.call for c in stages.dali_stages(data, config, 4, CPU)}
    sizes = [file.shape for file in map(decode, data.encoded)]
    assert [tuple(size) for size in found["decode by DALI", ""]()[0].shape()] == sizes
    crops = np.array([crop for view in found["geometry", ""]() for crop in view.as_array()])
    at = np.ndindex(2, 4)
    expected = [
        resized_crop(decode(data.encoded[i]), data.params, v, i, 48)[:, :: 1 - 2 * data.params.flip[v, i]]
        for v, i in at
    ]
    assert np.abs(crops - expected).mean() < 1
    for stage in (("color", "exact"), ("color", "affine"), ("blur", ""), ("normalize", "")):
        outputs = found[stage]()
        assert len(outputs) == 2 and all(output.as_array().shape == (4, 48, 48, 3) for output in outputs)
    assert np.abs(found["normalize", ""]()[0].as_array()).max() < 3 < np.abs(found["blur", ""]()[0].as_array()).max()


def test_graphs_of_dali_stages_on_a_gpu_are_valid():
    """Without a GPU they can be constructed and serialized, which checks every operator, type and device."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")
    options = {"batch_size": 4, "num_threads": 1, "device_id": None}
    graphs = stages.dali_graphs(AugmentConfig(size=48).for_images(RGB8, {}), True, options)
    assert len(graphs) == 6 and all(len(graph.serialize()) > 100 for graph in graphs.values())
