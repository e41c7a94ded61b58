"""What the scripts print while they run: dry runs, progress, lines in a file."""

import json
import re
import sys

import pytest
import torch
from accelerate.state import AcceleratorState

import distill
import finetune
import train
from common import progress_bar
from engine import run_lock
from engine.dry_run import STEPS
from engine.loop import PROGRESS
from presets import DISTILL, FINETUNE, PRETRAIN, parse
from tests.small_sets import texture_shards

SCRIPTS = {"train.py": (PRETRAIN, train.pretrain), "finetune.py": (FINETUNE, finetune.finetune)}
SCRIPTS["distill.py"] = (DISTILL, distill.distill)
SMALL = ["--preset", "textures", "--batch-size", "16", "--encoder.width", "0.125", "--precision", "fp32", "--no-report"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """160 train and 20 test textures of ten classes, as shards."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=160, test=20)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run("train.py", *options) in this process, in an empty folder."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)

    def run(script, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        presets, stage = SCRIPTS[script]
        try:
            stage(parse(presets, [*map(str, options), *SMALL], prog=script))
        finally:
            run_lock.release_all()

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "distill.py"])
def test_a_dry_run_prints_configuration_and_cost_and_writes_nothing(script, run, data, tmp_path, capsys):
    options = ["--data", data]
    if script == "distill.py":
        run("finetune.py", *options, "--out", tmp_path / "teacher", "--epochs", 1, "--labels.fraction", 1)
        options += ["--teacher", tmp_path / "teacher"]
        capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    run(script, *options, "--epochs", 30, "--labels.fraction", 1, "--dry-run") if script == "finetune.py" else run(
        script, *options, "--epochs", 30, "--dry-run"
    )
    printed = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    start = printed.index("{\n")
    record, _ = json.JSONDecoder().raw_decode(printed[start:])
    assert record["epochs"] == 30 and record["encoder"]["width"] == 0.125 and record["data"] == str(data)
    shown = dict(re.findall(r"│ ([\w ]+?) +│ (.+?) +│", printed[start:]))
    assert shown["steps per epoch"] == "10" and "images/s" in shown["time per step"]
    assert {
        "parameters of encoder",
        "peak memory of the process",
        "time per epoch",
        "time of 30 epochs",
    } <= shown.keys()
    assert STEPS < 10 and "kNN" not in printed and "top-1" not in printed  # no evaluation


def test_a_dry_run_measures_views_of_full_size(run, data, monkeypatch, capsys):
    """Their memory is the largest of the run; the printed configuration keeps the schedule."""
    forward, sizes = train.SimCLR.forward, set()

    def record_size(net, views):
        sizes.add(views.shape[-1])
        return forward(net, views)

    monkeypatch.setattr(train.SimCLR, "forward", record_size)
    run("train.py", "--data", data, "--views.size-schedule", "16:1", "--epochs", 2, "--dry-run")
    assert sizes == {32} and "16:1" in capsys.readouterr().out


def test_the_options_a_dry_run_prints_start_the_same_run(run, data, tmp_path, capsys):
    run("train.py", "--data", data, "--dry-run", "--seed", 5)
    printed = capsys.readouterr().out
    record, _ = json.JSONDecoder().raw_decode(printed[printed.index("{\n") :])
    (tmp_path / "config.json").write_text(json.dumps(record))
    config = parse(PRETRAIN, ["--config", str(tmp_path), "--no-dry-run"], prog="train.py")
    assert (config.seed, config.batch_size, config.encoder.width, config.dry_run) == (5, 16, 0.125, False)


def test_output_into_a_file_has_times_and_neither_bars_nor_colors(run, data, tmp_path, capsys):
    run("train.py", "--data", data, "--out", tmp_path / "run", "--epochs", 2, "--eval.knn-every", 1)
    printed = capsys.readouterr()
    assert re.search(r"^\d\d:\d\d:\d\d epoch 1: loss \d\.\d{3}, knn \d\.\d{3}$", printed.out, re.MULTILINE)
    assert "\x1b" not in printed.out + printed.err and "\r" not in printed.out + printed.err
    assert "images/s" not in printed.err  # the progress bar is for terminals


@pytest.mark.parametrize("columns", [60, 100])
def test_the_progress_bar_fits_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # for rich, which otherwise asks the pipe
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(1000, fields=PROGRESS, epoch=1, row="") as update:
        update(completed=300, epoch=12, row="  loss 4.123  knn 0.512  2,345 images/s")
    printed = capsys.readouterr().err
    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", printed)]
    assert max(map(len, lines)) <= columns and re.search(r"\x1b\[[34]\dm", printed) is None
    assert any("epoch 12" in line and "loss 4.123" in line for line in lines)
    if columns == 100:
        assert any(all(part in line for part in ("knn 0.512", "2,345 images/s", "300/1000")) for line in lines)
