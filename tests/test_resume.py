"""Resuming: after a kill, after a stop signal, from any checkpoint, and what is refused."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from common import UserError
from engine import checkpoint, run_lock
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from presets import PRETRAIN, parse
from tests.small_sets import texture_shards

ROOT = Path(__file__).parents[1]
OPTIONS = ["--no-report", "--encoder.width", "0.125", "--head.hidden", "32", "--head.out", "16", "--batch-size", "16"]
OPTIONS += ["--eval.no-baselines", "--eval.knn-every", "1", "--log-every", "2", "--precision", "fp32"]
OPTIONS += ["--preset", "textures", "--loss.learn-temperature", "--loss.queue", "100"]

GROWING = ["--views.size-schedule", "16:1", "24:1", "--epochs", "3", "--batch-size", "40", "--eval.knn-every", "0"]
GROWING += ["--checkpoint.every-steps", "1", "--checkpoint.keep", "9", "--optim.name", "muon"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 train and 20 test textures of ten classes, as shards."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=80, test=20)


@pytest.fixture(scope="module")
def pretrain():
    """pretrain(*options) in this process; options override OPTIONS."""
    threads = torch.get_num_threads()

    def run(*options):
        AcceleratorState._reset_state(reset_partial_state=True)
        train.pretrain(parse(PRETRAIN, [*OPTIONS, *map(str, options)], prog="train.py"))

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(pretrain, data, tmp_path_factory):
    """A run of two epochs, ten steps, with a checkpoint after each."""
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain("--data", data, "--out", out, "--epochs", 2, "--checkpoint.every-steps", 1, "--checkpoint.keep", 20)
    return out


def rows(out):
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if not name.endswith(("_ms", "_s"))} for row in read]


def assert_same(out, whole):
    assert rows(out) == rows(whole)
    actual, expected = (load_file(folder / "encoder.safetensors") for folder in (out, whole))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def killed_runs(kills, tmp_path, data, *options):
    command = [sys.executable, Path(__file__).with_name("killed_runs.py"), str(kills), tmp_path, "--data", data]
    command += [*OPTIONS, "--epochs", "2", "--checkpoint.every-steps", "1", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_runs_resume_bit_for_bit(data, tmp_path):
    result = killed_runs(3, tmp_path, data)
    assert result["same"] and result["kills"] == 3 and result["in_save"] == 1


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_kills(data, tmp_path, precision):
    result = killed_runs(20, tmp_path, data, "--precision", precision)
    assert result["same"] and result["kills"] == 20 and result["in_save"] >= 6


@pytest.mark.parametrize("step", [3, 5, 10])
def test_every_checkpoint_leads_to_the_same_result(pretrain, whole, data, tmp_path, step):
    """Checkpoints in the middle of an epoch and of a metrics row, at the end of an epoch, at the end of the run."""
    resume_from = whole / "checkpoints" / f"step-{step:08d}"
    pretrain("--data", data, "--out", tmp_path / "run", "--epochs", 2, "--resume", resume_from)
    known = rows(whole)
    assert rows(tmp_path / "run") == [row for row in known if row["step"] > step or "features" in row]
    actual, expected = (load_file(folder / "encoder.safetensors") for folder in (tmp_path / "run", whole))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def growing(pretrain, data, tmp_path_factory):
    """A run by Muon, of three epochs of two steps with views of 16, 24 and 32 px; a checkpoint after every step."""
    out = tmp_path_factory.mktemp("growing") / "run"
    pretrain("--data", data, "--out", out, *GROWING)
    return out


@pytest.mark.parametrize("step", [2, 3])
def test_growing_views_resume_bit_for_bit(pretrain, growing, data, tmp_path, step):
    """Between two phases and in the middle of one; tests/pipeline/loader/test_size_schedule.py tries every phase."""
    resume_from = growing / "checkpoints" / f"step-{step:08d}"
    pretrain("--data", data, "--out", tmp_path / "run", *GROWING, "--resume", resume_from)
    known = rows(growing)
    assert rows(tmp_path / "run") == [row for row in known if row["step"] > step or "features" in row]
    actual, expected = (load_file(folder / "encoder.safetensors") for folder in (tmp_path / "run", growing))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    views = json.loads((growing / "config.json").read_text())["views"]
    assert (views["size"], views["size_schedule"]) == (32, ["16:1", "24:1"])


def test_another_schedule_is_refused(pretrain, growing, data):
    with pytest.raises(UserError, match=r"started with --views\.size-schedule 16:1 24:1 \(now 16:2\)"):
        pretrain("--data", data, "--out", growing, *GROWING, "--views.size-schedule", "16:2")


def test_stop_signal_saves_and_the_same_command_continues(pretrain, whole, data, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", "--data", data, "--out", out, "--epochs", "2", *OPTIONS]
    environment = {**os.environ, "COLUMNS": "400"}
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    said = r"\d\d:\d\d:\d\d Stopped after step \d+ of 10; continue with: accelerate launch (.+)\n"
    arguments = shlex.split(re.search(said, printed)[1])
    assert arguments == [str(part) for part in command[1:] if part not in ("--out", out)] + ["--out", str(out)]
    assert not (out / "encoder.safetensors").exists()
    pretrain("--data", data, "--out", out, "--epochs", 2)
    assert_same(out, whole)


def test_finished_run_is_unchanged(pretrain, whole, data):
    before, summary = rows(whole), (whole / "summary.json").read_text()
    pretrain("--data", data, "--out", whole, "--epochs", 2)
    assert rows(whole) == before and (whole / "summary.json").read_text() == summary
    assert json.loads(summary)["images_per_s"] > 0


def test_run_in_use_is_refused(pretrain, whole, data):
    lock = "import sys, pathlib; from engine import run_lock; run_lock.acquire(pathlib.Path(sys.argv[1])); input()"
    run_lock.release_all()  # of the runs in this process
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", lock, str(whole)], cwd=ROOT, **pipes) as other:
        deadline = time.monotonic() + 60
        while not (whole / ".lock").exists() or not (whole / ".lock").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on .*, started \d+ s ago"):
            pretrain("--data", data, "--out", whole, "--epochs", 2)
        other.kill()
    pretrain("--data", data, "--out", whole, "--epochs", 2)
    assert not (whole / ".lock").exists()


def test_files_of_a_run_follow_the_umask(whole, tmp_path):
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert {path.name for path in whole.rglob("*") if path.is_file() and path.stat().st_mode != mode} == set()


def test_damaged_metrics_row_does_not_prevent_resuming(pretrain, whole, data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    first, *others = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join([first.replace(b"loss", b"l\xefss"), *others]))
    pretrain("--data", data, "--out", out, "--epochs", 2)
    assert rows(out) == rows(whole)[1:]
    assert "1 damaged rows of metrics.jsonl were dropped" in capsys.readouterr().out


def test_changed_options_are_refused_by_name(pretrain, whole, data):
    for options, message in (
        (["--seed", 1], r"--seed 0 \(now 1\)"),
        (["--loss.temperature", 0.5], r"--loss\.temperature 0\.2 \(now 0\.5\)"),
        (["--encoder.name", "resnet34", "--epochs", 3], r"--encoder\.name resnet10t .*--epochs 2 \(now 3\)"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain("--data", data, "--out", whole, "--epochs", 2, *options)
    resume_from = whole / "checkpoints" / "step-00000003"
    (whole.parent / "mine").mkdir()
    (whole.parent / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files than the run that --resume names"):
        pretrain("--data", data, "--out", whole.parent / "mine", "--epochs", 2, "--resume", resume_from)
    with pytest.raises(UserError, match="holds a run or other files already"):
        pretrain("--data", data, "--out", whole, "--epochs", 2, "--resume", "none")


def test_other_precision_is_refused_and_the_remedy_works(pretrain, whole, data, tmp_path):
    resume_from = whole / "checkpoints" / "step-00000008"
    options = ["--data", data, "--epochs", 2, "--resume", resume_from]
    with pytest.raises(UserError, match=r"was trained in fp32; .* or with --precision fp32"):
        pretrain(*options, "--out", tmp_path / "a", "--precision", "bf16")
    copy = tmp_path / "checkpoints" / resume_from.name
    shutil.copytree(resume_from, copy)
    record = json.loads((copy / "record.json").read_text())
    record["config"]["precision"] = "auto"  # as on hardware where auto means fp32
    del record["checksum"]
    record["checksum"] = checkpoint._checksum(record)
    (copy / "record.json").write_text(json.dumps(record))
    pretrain("--data", data, "--epochs", 2, "--resume", copy, "--out", tmp_path / "b")
    assert rows(tmp_path / "b")[0] == next(row for row in rows(whole) if row["step"] > 8)


def test_other_shards_are_refused(pretrain, whole, data, tmp_path):
    write_split(folder_source(data.parent / "images" / "test"), tmp_path, "train")
    with pytest.raises(UserError, match="was trained on other shards than"):
        pretrain("--data", tmp_path, "--out", whole, "--epochs", 2)


def test_damaged_checkpoint_is_named(pretrain, whole, data, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    for step in (4, 6):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for file in (whole / "checkpoints" / folder.name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes()[: 1000 if step == 6 else None])
    with pytest.raises(UserError, match=r"step-00000006/.*delete this checkpoint to continue"):
        pretrain("--data", data, "--out", tmp_path, "--epochs", 2)
    assert (tmp_path / "checkpoints" / "step-00000004" / "state.safetensors").exists()


def test_baselines_survive_resuming(pretrain, data, tmp_path):
    options = ["--data", data, "--epochs", 1, "--eval.baselines", "--checkpoint.every-steps", 1, "--checkpoint.keep", 9]
    pretrain(*options, "--out", tmp_path / "whole")
    pretrain(*options, "--out", tmp_path / "rest", "--resume", tmp_path / "whole" / "checkpoints" / "step-00000002")
    whole, rest = ([row for row in rows(tmp_path / name) if "features" in row] for name in ("whole", "rest"))
    assert whole == rest and [row["features"] for row in whole] == ["raw pixels", "untrained", "trained"]
