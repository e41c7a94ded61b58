"""Images beyond 8-bit RGB, from files to scores: every stage sees what 16 bits and eight channels show."""

import base64
import io
import json
import re
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import distill
import evaluate
import finetune
import model
import train
from common import UserError
from engine import run_lock, session
from model.export import export_encoder
from pipeline.augment.config import AugmentConfig
from pipeline.convert import __main__ as convert
from pipeline.images.pixel_format import decode_pixels
from pipeline.shards.dataset import open_shards
from pipeline.shards.reader import Reader
from presets import DISTILL, FINETUNE, PRETRAIN, parse
from tests.pipeline.loaders import center_crops

CLASSES = ("columns", "rows", "checks")
COUNTS = {"train": 32, "test": 12}
"""Images per class and split."""
STAGES = {
    "train": (PRETRAIN, train.pretrain),
    "finetune": (FINETUNE, finetune.finetune),
    "distill": (DISTILL, distill.distill),
}
SMALL = ["--views.size", 24, "--precision", "fp32", "--trackers", "none", "--loader.workers", 1, "--log-every", 1]
SMALL += ["--encoder.name", "resnet18", "--encoder.width", 0.125, "--encoder.stem", "standard"]


def pattern(name, random):
    """(32, 32) in -1..1: stripes or checks of random frequency and phase."""
    y, x = np.mgrid[:32, :32] / 32
    columns, rows = (np.sin(2 * np.pi * (random.uniform(2, 4) * t + random.uniform())) for t in (x, y))
    return {"columns": columns, "rows": rows, "checks": columns * rows}[name]


def write_images(folder, write):
    """Class folders of both splits; write(path without suffix, pattern, random) writes an image."""
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                write(folder / split / name / str(number), pattern(name, random), random)
    return folder


def write_scan(path, shape, random):
    """The lowest seven bits of a 16-bit PNG: its upper bytes are zero."""
    levels = 64 + 40 * shape + random.uniform(-20, 20, shape.shape)
    assert cv2.imwrite(f"{path}.png", levels.round().astype(np.uint16))


def write_bands(path, shape, random):
    """Eight bands of 8 bits: the first four are noise, the others show the class."""
    levels = 128 + random.uniform(-50, 50, (*shape.shape, 8))
    levels[..., 4:] += 60 * shape[..., None]
    np.save(f"{path}.npy", levels.round().astype(np.uint8))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Shards of scans with 16 and with 8 bits, and of eight bands."""
    root, argv = tmp_path_factory.mktemp("sets"), sys.argv
    write_images(root / "scans", write_scan)
    write_images(root / "bands", write_bands)
    for source, out, *options in [("scans", "gray16"), ("scans", "gray8", "--bits", "8"), ("bands", "bands8")]:
        sys.argv = ["convert", "folder", str(root / source), str(root / out), "--split", "auto", "--workers", "1"]
        sys.argv += options
        convert.main()
    sys.argv = argv
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run("finetune", *options) in this process, with a cache of its own; returns the run folder."""
    threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    patch.setenv("STREAMCLR_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(session, "available_cores", lambda: 1)

    def run_stage(name, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        out, (presets, stage) = tmp_path_factory.mktemp("runs") / name, STAGES[name]
        try:
            stage(parse(presets, [str(option) for option in (*options, "--out", out, *SMALL)], prog=f"{name}.py"))
        finally:
            run_lock.release_all()
        return out

    yield run_stage
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="module")
def evaluated(run):
    """evaluated("knn", RUN, *options) in this process; returns the record that it writes."""

    def evaluate_run(command, folder, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        evaluate.evaluate(evaluate.parse([command, str(folder), *map(str, options)]))
        name = command + (f"-{options[1]}" if command == "linear" else "")
        file = folder / "evaluation" / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    return evaluate_run


PRETRAINING = ["--batch-size", 48, "--head.hidden", 32, "--head.out", 16, "--optim.lr", 3e-3, "--eval.knn-every", 0]
SCORES_ONLY = ["--eval.no-baselines", "--no-report"]
QUICKLY = ["--optim.lr", 3e-3, "--optim.warmup-epochs", 0, "--validate-every", 0]
PRETRAINING += ["--optim.warmup-epochs", 0]


@pytest.fixture(scope="module")
def scans(run, sets):
    return run("train", "--data", sets / "gray16", "--epochs", 12, *PRETRAINING)


@pytest.fixture(scope="module")
def bands(run, sets):
    return run("train", "--data", sets / "bands8", "--epochs", 8, *PRETRAINING, *SCORES_ONLY)


@pytest.fixture(scope="module")
def tuned(run, scans):
    return run("finetune", "--start.run", scans, "--epochs", 4, "--batch-size", 24, "--no-report", *QUICKLY)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def results(folder):
    """Rows of the final table, by features."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["features"]: row for row in rows if "features" in row}


def test_16_bits_show_what_8_bits_do_not(run, sets, scans, evaluated):
    """With a third as chance; the images of 8 bits are all the same."""
    config = config_of(scans)
    assert config["pixels"] == {"channels": 1, "bits": 16} and config["timm_kwargs"]["in_chans"] == 1
    assert config["views"]["gray_p"] == 0 and "(gray, 16 bits)" in config["reasons"]["data set"]
    (mean,), (std,) = (config["views"][name] for name in ("mean", "std"))
    assert mean == pytest.approx(64 / 65535, abs=2 / 65535) and 20 / 65535 < std < 40 / 65535
    assert results(scans)["trained"]["knn_top1"] > 0.6 and results(scans)["trained"]["linear_top1"] > 0.6
    record = evaluated("knn", scans, "--precision", "fp32")
    assert record["results"][0]["top1"] == results(scans)["trained"]["knn_top1"] and record["pixels"] == [1, 16]
    reduced = run("train", "--data", sets / "gray8", "--epochs", 1, *PRETRAINING, *SCORES_ONLY)
    assert "in_chans" not in config_of(reduced)["timm_kwargs"]
    scores = results(reduced)["trained"]
    assert [scores["knn_top1"], scores["linear_top1"]] == pytest.approx([1 / 3, 1 / 3])


def test_the_report_shows_scans_that_are_not_black(scans):
    pictures = re.findall(r'src="data:image/webp;base64,(.*?)"', (scans / "report.html").read_text())
    original, *views = (np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in pictures[:3])
    assert all(picture.std() > 30 for picture in (original, *views))


def test_the_code_of_the_model_card_computes_the_features_of_the_run(scans, sets, tmp_path, monkeypatch):
    export_encoder(scans, tmp_path / "scans-encoder", "huggingface")
    (code,) = re.findall("```python\n(.*?)```", (tmp_path / "scans-encoder" / "README.md").read_text(), re.DOTALL)
    test, config = open_shards(str(sets / "gray16" / "test")), config_of(scans)["views"]
    (encoded,) = Reader(test)(np.arange(1))
    monkeypatch.chdir(tmp_path)
    for name in ("streamclr", "streamclr.model"):  # the package consists of the same files
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(model=model))
    exec(code, scope := {"pixels": decode_pixels(encoded, test.pixel_format)})
    augment = AugmentConfig(size=24, mean=tuple(config["mean"]), std=tuple(config["std"]))
    (batch,) = center_crops(test, augment, np.arange(1), batch_size=1, device=torch.device("cpu"))
    levels = (batch.views[0] * augment.std[0] + augment.mean[0]) * 65535
    assert (scope["x"] * 65535 - levels).abs().max() < 0.51  # views are rounded to levels
    expected = model.load_encoder(scans / "encoder.safetensors")(batch.views)
    assert (scope["h"] - expected).norm() < 0.1 * expected.norm()


def test_a_classifier_of_scans_is_tuned_and_distilled(run, sets, tuned):
    assert results(tuned)["finetune"]["top1"] > 0.6
    student = run("distill", "--teacher", tuned, "--epochs", 1, "--batch-size", 24, "--no-report", *QUICKLY)
    assert results(student)["teacher"] == results(tuned)["finetune"] | {"features": "teacher", "step": 0}
    classifier, _ = model.load_classifier(student / "model.safetensors")
    assert classifier.encoder.conv1.in_channels == 1 and config_of(student)["pixels"] == {"channels": 1, "bits": 16}


def test_eight_channels_from_training_to_export(run, bands, evaluated, tmp_path):
    assert config_of(bands)["pixels"] == {"channels": 8, "bits": 8} and len(config_of(bands)["views"]["mean"]) == 8
    assert results(bands)["trained"]["knn_top1"] > 0.5
    fast = evaluated("linear", bands, "--protocol", "fast", "--precision", "fp32")
    assert fast["pixels"] == [8, 8] and fast["results"][0]["top1"] > 0.5
    simclr = evaluated("linear", bands, "--protocol", "simclr", "--epochs", 2, "--precision", "fp32")
    assert simclr["results"][0]["steps"] == 2 and simclr["data"]["test"]["from_cache"]
    tuned = run("finetune", "--start.run", bands, "--epochs", 1, "--batch-size", 24, "--no-report", *QUICKLY)
    assert model.load_classifier(tuned / "model.safetensors")[0].encoder.conv1.in_channels == 8
    export_encoder(bands, tmp_path / "out", "huggingface")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    x = torch.randn(2, 8, 24, 24)
    assert torch.equal(loaded(x), model.load_encoder(bands / "encoder.safetensors")(x))


def test_images_of_another_format_are_refused(run, sets, scans, bands, tuned, evaluated):
    for folder, data, expected in (
        (scans, "gray8", "are RGB, 8 bits, but those that the encoder takes are gray, 16 bits"),
        (bands, "gray16", "are gray, 16 bits, but those that the encoder takes are 8 channels, 8 bits"),
    ):
        with pytest.raises(UserError, match=expected):
            evaluated("knn", folder, "--data", sets / data)
    with pytest.raises(UserError, match="--mean must be one number, or 8"):
        evaluated("knn", bands, "--mean", 0.5, 0.5, 0.5)
    for folder, data, (known, found) in (
        (bands, "gray16", (r"\(8 channels, 8 bits\)", r"gray16.* \(gray, 16 bits\)")),
        (scans, "gray8", (r"\(gray, 16 bits\)", r"gray8.* \(RGB, 8 bits\)")),
    ):
        with pytest.raises(UserError, match=f"was trained on other images {known} than those of .*{found}; use --data"):
            run("finetune", "--start.run", folder, "--data", sets / data, "--batch-size", 24)
    with pytest.raises(
        UserError, match=r"teacher .* \(gray, 16 bits\) than those of .*bands8.* \(8 channels, 8 bits\)"
    ):
        run("distill", "--teacher", tuned, "--data", sets / "bands8", "--batch-size", 24)
