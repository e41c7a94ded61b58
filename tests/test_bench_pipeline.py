"""The bench of the pipeline: what it renders, what it compares, and the arithmetic of its rows, on a few images."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from bench import pipeline as bench
from bench import plot
from pipeline.images import decode
from pipeline.recipe import Recipe, ViewParameters, draw_views


def test_rendered_photographs():
    images = [decode(bench.photograph(number)) for number in range(4)]
    assert [image.shape[:2] for image in images] == [(500, 400), (400, 500), (400, 500), (500, 400)]
    assert bench.photograph(2) == bench.photograph(2) != bench.photograph(1)
    for image in images:
        assert image.std() > 25 and image.min() < 60 and image.max() > 190  # light and shade
    small = decode(bench.with_short_side(bench.photograph(1), 256))
    assert small.shape == (256, 320, 3)


def test_leaving_stages_out():
    drawn = draw_views(Recipe(), 0, 0, np.arange(50), np.full(50, 90), np.full(50, 80))
    plain = bench.without(drawn, colour=True, blur=True)
    assert not (plain.jittered.any() or plain.gray.any() or plain.sigma.any())
    sharp = bench.without(drawn, blur=True)
    changed = {
        f.name for f in fields(ViewParameters) if not np.array_equal(getattr(sharp, f.name), getattr(drawn, f.name))
    }
    assert changed == {"sigma"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """A bench of four small images, without the processes of the peers' workers."""
    patch = pytest.MonkeyPatch()
    patch.setattr(bench, "BATCH", 4)
    patch.setattr(bench, "DataLoader", lambda dataset, batch, **_: torch.utils.data.DataLoader(dataset, batch))
    images = [bench.with_short_side(bench.photograph(number), 64) for number in range(5)]
    shards = bench.make_shards(images, tmp_path_factory.mktemp("bench"))
    yield bench.measure(shards, "small", Recipe(size=48), threads=2, seconds=0)
    patch.undo()


def test_rows(rows):
    named = {(row["implementation"], row["jitter"], row["stage"]): row for row in rows}
    assert len(named) == len(rows)  # none twice
    for name in ("host", "kornia", "loader"):
        assert {(name, "exact", "all"), (name, "affine", "all")} <= set(named)
    for stage in (
        ("", "read"),
        ("", "decode"),
        ("", "geometry"),
        ("exact", "colour"),
        ("affine", "pack"),
        ("", "blur"),
    ):
        assert ("host", *stage) in named
    assert ("torchvision", "exact", "all") in named
    for row in rows:
        assert row["runs"] == 3 and row["images"] in (2, 4) and row["workers"] == 2 and row["shards"] == "small"
        assert row["images_per_s"] == pytest.approx(1000 * row["images"] / row["median_ms"], rel=0.01)
    assert named["host", "", "decode"]["ratio_to_decode"] == 1
    peers = [row for row in rows if row["implementation"] in ("torchvision", "lightly")]
    assert max(peers, key=lambda row: row["images_per_s"])["ratio_to_best_peer"] == 1


def test_a_ratio_is_the_median_over_the_turns():
    assert bench._ratio([2.0, 40.0, 3.0], [1.0, 10.0, 6.0]) == 2.0


def test_the_plot_comes_from_the_rows(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    monkeypatch.setattr(plot, "read_rows", lambda name: [{k: str(v) for k, v in row.items()} for row in rows])
    assert plot.plot_pipeline().stat().st_size > 10_000
