"""The examples, run as a user runs them: from the root of the checkout, on data and a run made here."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import train
from common import available_cores
from engine import run_lock
from model import load_encoder
from model.export import export_encoder
from pipeline.images.files import png
from pipeline.loader import LoaderConfig, center_crop_batches
from pipeline.shards import open_shards
from presets import PRETRAIN, parse, textures
from tests.small_sets import texture_shards

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "open_run.ipynb"
ON_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
BOKEH_FIGURE = "application/vnd.bokehjs_exec.v0+json"
RUN = ["--no-report", "--epochs", "2", "--batch-size", "32", "--eval.no-baselines", "--eval.knn-every", "1"]
RUN += ["--precision", "fp32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of 200 train and 100 test textures of ten classes, as images/ and as shards/."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=200, test=100).parent


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Folder of a short pretraining."""
    threads, out = torch.get_num_threads(), tmp_path_factory.mktemp("runs") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train.pretrain(
            parse(
                PRETRAIN, ["--preset", "textures", "--data", f"{data}/shards", "--out", str(out), *RUN], prog="train.py"
            )
        )
    finally:
        run_lock.release_all()
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def encoder(run, tmp_path_factory):
    """Folder of the run's encoder, exported for timm."""
    export_encoder(run, out := tmp_path_factory.mktemp("exported") / "encoder", "huggingface")
    return out


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Class folders of noise that is red, green or blue: train/ with 60 images, test/ with 60."""
    root, rng = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for split in ("train", "test"):
        for channel, color in enumerate(("red", "green", "blue")):
            (folder := root / split / color).mkdir(parents=True)
            for i in range(20):
                pixels = rng.integers(0, 150, (40, 40, 3), np.uint8)
                pixels[..., channel] += 100
                (folder / f"{i}.png").write_bytes(png(pixels))
    return root


@pytest.fixture(scope="module")
def finished(data, run, encoder, colors, tmp_path_factory):
    """Example -> finished process, or executed notebook; side by side, because importing takes most of their time."""
    features = tmp_path_factory.mktemp("features") / "features.npz"
    arguments = {
        "own_loop": [data / "shards" / "train"],
        "loss_alone": [],
        "folder_features": [encoder, data / "images" / "test", features],
        "finetune_encoder": [encoder, colors],
    }
    with ThreadPoolExecutor(available_cores()) as threads:
        running = {"open_run": threads.submit(execute, run)}
        running |= {script: threads.submit(start, script, *arguments[script]) for script in arguments}
    return {example: future.result() for example, future in running.items()}


def start(script, *arguments):
    command = [sys.executable, "-m", f"examples.{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ON_CPU, capture_output=True, text=True, timeout=300)


def execute(run):
    """Execute the notebook as Jupyter does, in its own folder, after a user has set RUN."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    setting = next(cell for cell in notebook.cells if cell.cell_type == "code")
    setting.source, replaced = re.subn(r'Path\("runs/\S+"\)', f"Path({str(run)!r})", setting.source)
    assert replaced == 1
    resources = {"metadata": {"path": EXAMPLES}}
    return nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute(env=ON_CPU)


def printed_by(process):
    """Output of a script that must have succeeded."""
    assert process.returncode == 0, process.stderr
    return process.stdout


def numbers(pattern, printed):
    return [float(number) for number in re.findall(pattern + r" (-?\d+\.\d+)", printed)]


def test_every_example_is_in_the_readme():
    listed = re.findall(r"^\| `(\S+)` \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (*SCRIPTS, NOTEBOOK)) and len(listed) == 5


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_says_how_to_start_it(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 25
    assert f"python -m examples.{script.stem}" in ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_only_what_is_installed(script):
    shipped = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
            "only-include"
        ]
    )
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    own = {name for name in imported if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()}
    assert own and own <= shipped


def test_own_loop_learns(finished):
    loss = numbers("loss", printed_by(finished["own_loop"]))
    # without learning the difference is -0.06 ± 0.07, with it 0.44 ± 0.08, over initial weights
    assert len(loss) == 10 and np.mean(loss[:3]) - np.mean(loss[-3:]) > 0.15


def test_loss_alone_brings_pairs_together(finished):
    printed = printed_by(finished["loss_alone"])
    loss, cosine = numbers("loss", printed), numbers("pair", printed)
    assert loss == sorted(loss, reverse=True) and loss[-1] < 0.1
    assert abs(cosine[0]) < 0.2 and cosine[-1] > 0.99


def test_folder_features_are_those_of_the_evaluation(finished, data, run):
    printed, images = printed_by(finished["folder_features"]), data / "images" / "test"
    assert printed.startswith("100 images, 128 features each")
    saved = np.load(finished["folder_features"].args[-1])
    assert saved["path"].tolist() == sorted(map(str, images.rglob("*.jpg")))

    shards = open_shards(str(data / "shards" / "test"))
    place = {path.removesuffix(".jpg"): i for i, path in enumerate(saved["path"].tolist())}
    features = torch.from_numpy(saved["features"])[[place[f"{images}/{key.decode()}"] for key in shards.index["key"]]]
    options = {"samples": np.arange(100), "config": LoaderConfig(), "batch_size": 100, "device": torch.device("cpu")}
    (batch,) = center_crop_batches(shards, textures().views, **options)
    with torch.no_grad():
        distance = torch.cdist(features, load_encoder(run / "encoder.safetensors")(batch.views))
    same = distance.diagonal().clone()  # not zero, because decoders and bicubic filters round differently
    assert features.shape == (100, 128) and same.max() < distance.fill_diagonal_(torch.inf).min()


def test_finetune_encoder_beats_chance(finished):
    (accuracy,) = numbers("test accuracy:", printed_by(finished["finetune_encoder"]))
    assert accuracy > 0.9  # chance is 1/3


def test_the_notebook_is_short_and_has_no_outputs():
    code = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert sum(len(cell.source.splitlines()) for cell in code) <= 25


def test_the_notebook_shows_a_run(finished, run):
    outputs = [output for cell in finished["open_run"].cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "data" in output]
    curves, embedding, confusion = (data["application/javascript"] for data in shown if BOKEH_FIGURE in data)
    assert all(f'"text":"{title}"' in curves for title in ("Loss", "Online probe, top-1", "kNN, top-1"))
    assert embedding.count("data:image/webp") == 100  # hovering shows the picture of every test image
    assert '"axis_label":"predicted"' in confusion
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    table = next(data["text/plain"] for data in shown if "text/plain" in data)
    assert f"{rows[-1]['knn_top1']:.3f}" in table and f"{rows[-1]['linear_top1']:.3f}" in table
