"""Tests of the preview command: contents of the contact sheet, and its error messages."""

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from common import UserError
from pipeline.augment.__main__ import GAP, LINE, TILE, contact_sheet, describe, main, save_image
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import draw_params
from pipeline.shards.dataset import ShardSet, open_shards
from tests.pipeline.augment import reference_views as reference
from tests.pipeline.image_sets import run_module, write_folder

ROW = TILE + 3 * LINE + 2 * GAP
NAMES = ["opencv", "kornia", *(["dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else [])]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    root = tmp_path_factory.mktemp("preview")
    files = reference.photographs(4, seed=31, sizes=((150, 200), (90, 80)))
    write_folder(root / "in", {f"field/{number}.jpg": file for number, file in enumerate(files)})
    assert run_module("pipeline.convert", "folder", root / "in", root / "out").returncode == 0
    return open_shards(str(root / "out" / "train"))


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = GAP + LINE + row * ROW, GAP + column * (TILE + GAP)
    return sheet[top : top + TILE, left : left + TILE].astype(float)


def text_below(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = GAP + LINE + row * ROW + TILE, GAP + column * (TILE + GAP)
    return sheet[top : top + 3 * LINE, left : left + TILE]


def test_contact_sheet(shards):
    sheet = contact_sheet(shards, AugmentConfig(size=TILE), NAMES, 3, 0)
    columns = 1 + 2 * len(NAMES)
    assert sheet.shape == (GAP + LINE + 3 * ROW, GAP + columns * (TILE + GAP), 3) and sheet.dtype == np.uint8
    for row in range(3):
        assert all((text_below(sheet, row, column) < 128).any() for column in range(columns))
        for v in (0, 1):  # the same view by every backend; the other view differs
            views = [tile(sheet, row, 1 + 2 * number + v) for number in range(len(NAMES))]
            assert all(np.abs(view - views[0]).mean() < 4 for view in views)
        assert np.abs(tile(sheet, row, 1) - tile(sheet, row, 2)).mean() > 4


def test_small_views_are_enlarged_and_depend_on_the_seed(shards):
    one, again, other = (contact_sheet(shards, AugmentConfig(size=16), ["opencv"], 9, seed) for seed in (1, 1, 2))
    assert one.shape == (GAP + LINE + 4 * ROW, GAP + 3 * (TILE + GAP), 3)  # no more rows than images
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    pixels = tile(one, 0, 1).reshape(16, TILE // 16, 16, TILE // 16, 3)
    assert (pixels == pixels[:, :1, :, :1]).all()  # every pixel of the view became a square


def test_the_description_contains_every_parameter():
    drawn = draw_params(AugmentConfig(), 0, 0, np.arange(200), np.full(200, 300), np.full(200, 400))
    texts = [describe(drawn, 0, i) for i in range(200)]
    top, left, height, width = drawn.crop[0, 7]
    assert texts[7][0].startswith(f"{width}x{height} at {left},{top}")
    for i, (crop, jitter, effects) in enumerate(texts):
        assert ("flipped" in crop) == drawn.flip[0, i]
        assert ("gray" in effects.replace("no gray", "")) == drawn.gray[0, i]
        assert (f"blur {drawn.sigma[0, i]:.2f}" in effects) == (drawn.sigma[0, i] > 0)
        if not drawn.jittered[0, i]:
            assert jitter == "no jitter"
            continue
        letters = "".join(part[0] for part in jitter.split())
        assert [("BCSH").index(letter) for letter in letters] == drawn.order[0, i].tolist()
        assert f"B{drawn.brightness[0, i]:.2f}" in jitter and f"H{drawn.hue[0, i]:+.3f}" in jitter


def test_the_command(shards, tmp_path):
    out = tmp_path / "grid.png"
    options = ("--data", shards.root, "--out", out, "--samples", 2, "--views.jitter", "affine")
    done = run_module("pipeline.augment", "preview", *options)
    assert done.returncode == 0 and str(out) in done.stdout and not done.stderr
    assert cv2.imread(str(out)).shape == (GAP + LINE + 2 * (224 + 3 * LINE + 2 * GAP), GAP + 3 * (224 + GAP), 3)


def test_a_folder_of_images_is_converted_like_the_shards(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
    folder, sheets = Path(shards.root).parents[1] / "in", []
    for number, data in enumerate((folder, shards.root)):
        out = tmp_path / f"{number}.png"
        options = ["--data", str(data), "--out", str(out), "--samples", "1"]
        monkeypatch.setattr("sys.argv", ["augment", "preview", *options])
        main()
        sheets.append(cv2.imread(str(out)))
    assert np.array_equal(*sheets)


def run(monkeypatch, *options: object) -> object:
    """Exit code of the command in this process."""
    monkeypatch.setattr("sys.argv", ["augment", "preview", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--samples", "0"], "--samples is 0; it must be at least 1"),
        (["--views.size-schedule", "16:1"], "one size; omit --views.size-schedule and use --views.size"),
        (["--views.size", "3"], "--views.size is 3; it must be at least 8"),
        (["--views.size", "100000"], "--views.size is 100000; it must be at most"),
        (["--out", "grid.txt"], "does not name an image"),
        (["--out", "missing/grid.png"], "can't be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_errors_are_one_sentence(shards, tmp_path, monkeypatch, options, cause):
    monkeypatch.chdir(tmp_path)
    code = run(monkeypatch, "--data", shards.root, "--out", "grid.png", "--samples", 1, *options)
    assert isinstance(code, str) and cause in code and "\n" not in code  # a string exits with status 1
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("options", [["--backend", "opengl"], ["--views.jitter", "fast"], ["--sample", "1"]])
def test_invalid_options_are_named(shards, tmp_path, monkeypatch, capsys, options):
    assert run(monkeypatch, "--data", shards.root, "--out", tmp_path / "grid.png", *options) == 2
    assert all(word in capsys.readouterr().err for word in options[:1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (MemoryError(), "The image does not fit into memory; use fewer --samples or a smaller --views.size."),
        (OSError(5, "Input/output error", "a.tar"), "[Errno 5] Input/output error: 'a.tar'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_interrupt_or_a_failure_prints_no_traceback(shards, tmp_path, monkeypatch, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr("pipeline.augment.__main__.contact_sheet", fail)
    assert run(monkeypatch, "--data", shards.root, "--out", tmp_path / "grid.png") == code


def test_an_image_too_large_for_its_format(tmp_path):
    with pytest.raises(UserError, match=r"An image of 8 x 66000 pixels is too large for \.jpg; use \.png or fewer"):
        save_image(np.zeros((66_000, 8, 3), np.uint8), tmp_path / "grid.jpg")
    assert not list(tmp_path.iterdir())
