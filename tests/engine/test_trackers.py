"""Trackers: what TensorBoard, W&B and MLflow recorded is read back and compared with metrics.jsonl."""

import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from common import UserError, flatten
from engine import run_lock
from engine.loop import LoopConfig, TrainingLoop
from engine.session import Session
from engine.trackers import Trackers, choose_trackers, view_sheet
from presets import PRETRAIN, parse
from tests.engine.test_loop import Loader

ROOT = Path(__file__).parents[2]
STEPS = 8  # two epochs; a checkpoint ends each
NAMES = {"epoch", "lr", "loss", "gradient_norm", "images_per_s", "data_wait_ms", "step_ms", "replaced_images"}
NAMES |= {"skipped_steps"}


class Killed(Exception):
    """Ends a run between two steps."""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(*trackers, killed_after=None, **options) of a linear model in tmp_path/run; returns the loop."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # nobody is logged in
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()

    def run(*trackers, killed_after=None, **options):
        run_lock.release_all()
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        session = Session("fp32")
        session.open_run(str(tmp_path / "run"), "auto", name="test")
        options = {"epochs": 2, "batch_size": 4, "log_every": 1} | options
        model = nn.Linear(3, 1)
        loop = TrainingLoop(
            session,
            LoopConfig(trackers=trackers, **options),
            model,
            Loader(),
            [torch.optim.SGD(model.parameters(), 1.0, fused=True)],
            lambda step: 0.1 / (step + 1),
            validate_every=1,
            draw_views=lambda batch: torch.full((2, 4, 3), 10 + loop.global_step, dtype=torch.uint8),
        )
        with loop:
            if loop.global_step == 0:
                loop.add_result("untrained", knn_top1=0.25)
            for x in loop:
                loss = (model(x) - 1).square().mean()
                loop.backward(loss)
                loop.step(loss=loss)
                if loop.global_step == killed_after:
                    raise Killed
                if loop.validation_due:
                    loop.log(knn_top1=0.5)
        loop.add_result("trained", knn_top1=0.75)
        loop.finish()
        return loop

    yield run
    run_lock.release_all()
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture
def run_folder(tmp_path):
    return tmp_path / "run"


def kill_and_resume(train, *trackers):
    """A run that is killed two steps after a checkpoint and then resumed to its end."""
    with pytest.raises(Killed):
        train(*trackers, killed_after=6)
    killed_s = int(time.time())
    while int(time.time()) == killed_s:  # TensorBoard sorts its files by the second in which they were created
        time.sleep(0.02)
    assert train(*trackers).global_step == STEPS


def expected(run_folder):
    """name -> {step: value}, from metrics.jsonl."""
    values = {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        prefix = f"{row.pop('features')}/" if "features" in row else ""
        step = row.pop("step")
        for name, value in row.items():
            values.setdefault(prefix + name, {})[step] = value
    assert set(values) == NAMES | {"knn_top1", "untrained/knn_top1", "trained/knn_top1"}
    assert set(values["loss"]) == set(range(1, STEPS + 1)) and set(values["knn_top1"]) == {4}
    return values


def event_scalars(run_folder):
    """name -> [(step, value), ...], and the decoded pictures [(step, (H, W, 3) uint8), ...]."""
    import cv2
    import numpy as np
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    pictures = [
        (e.step, cv2.imdecode(np.frombuffer(e.encoded_image_string, np.uint8), cv2.IMREAD_COLOR))
        for name in events.Tags()["images"]
        for e in events.Images(name)
    ]
    return scalars, pictures


def assert_same(recorded, truth, names):
    """Every step of every name once, in order, with the value of metrics.jsonl up to float32."""
    for name in names:
        assert [step for step, _ in recorded[name]] == list(truth[name]), name
        assert [value for _, value in recorded[name]] == pytest.approx(list(truth[name].values()), rel=1e-6), name


def test_tensorboard_shows_a_resumed_run_as_one_curve(train, run_folder):
    pytest.importorskip("tensorboard")
    kill_and_resume(train, "tensorboard")
    truth = expected(run_folder)
    scalars, pictures = event_scalars(run_folder)
    assert scalars.keys() == truth.keys()
    assert_same(scalars, truth, truth)
    ((step, picture),) = pictures
    assert step == 0 and picture.shape == (2, 4, 3) and (picture == 10).all(), "views of the first batch"
    hparams = [path for path in run_folder.glob("tensorboard/*/*.yml")]
    assert len(hparams) == 1 and "checkpoint.every_minutes: 10" in hparams[0].read_text()

    finished = train("tensorboard")  # nothing is left to train; the final scores are computed and written again
    assert finished.global_step == STEPS
    assert_same(event_scalars(run_folder)[0], expected(run_folder), truth)
    assert train("none").global_step == STEPS, "a resumed run may have other trackers"


def test_run_without_a_checkpoint_starts_again_with_empty_trackers(train, run_folder):
    pytest.importorskip("tensorboard")
    with pytest.raises(Killed):
        train("tensorboard", killed_after=2, seed=5)
    assert (run_folder / "trackers.json").exists()
    train("tensorboard", seed=6)
    scalars, pictures = event_scalars(run_folder)
    assert_same(scalars, expected(run_folder), scalars)
    assert len(list(run_folder.glob("tensorboard/events*"))) == len(pictures) == 1

    (run_folder / "checkpoints").rename(run_folder / "mine")
    with pytest.raises(UserError, match="choose another --out"):
        train("none")
    assert (run_folder / "tensorboard").exists(), "a refused folder is unchanged"


def test_mlflow_continues_the_same_run_in_the_run_folder(train, run_folder):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    with pytest.raises(Killed):
        train("mlflow", killed_after=6)
    client = MlflowClient((run_folder / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'streamclr'")
    assert client.search_runs([experiment.experiment_id])[0].info.status == "FAILED"
    train("mlflow")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "2" and run.data.params["optim.name"] == asdict(LoopConfig())["optim"]["name"]
    truth = expected(run_folder)
    assert run.data.metrics.keys() == truth.keys()
    recorded = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in truth
    }
    assert_same(recorded, truth, truth.keys() - {"images_per_s", "data_wait_ms", "step_ms"})
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["views.png"]
    state = json.loads((run_folder / "trackers.json").read_text())
    assert state == {"mlflow": {"id": run.info.run_id, "drawn": True}}


def wandb_records(file):
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits: the block is padded
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_runs(run_folder):
    """Of each part of a run: id, configuration, exit code and history [{name: value}, ...]."""
    for file in sorted(run_folder.glob("wandb/offline-run-*/*.wandb")):
        records, history, config = list(wandb_records(file)), [], {}
        for record in records:
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                history.append({(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items})
        for record in records:
            for update in (record.run.config.update, record.config.update):
                config |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update}
        codes = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
        yield next(record.run.run_id for record in records if record.run.run_id), config, codes, history


def test_wandb_records_offline_without_a_login_and_keeps_its_id(train, run_folder, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    kill_and_resume(train, "wandb")
    wandb.teardown()  # writes what is left
    (first_id, config, first_codes, before), (second_id, _, codes, after) = wandb_runs(run_folder)
    assert first_id == second_id == json.loads((run_folder / "trackers.json").read_text())["wandb"]["id"]
    assert config["epochs"] == 2 and config["optim.name"] == LoopConfig().optim.name
    assert first_codes == [1] and codes == [0]
    recorded = {}
    for row in before + after:
        for name, value in row.items():
            recorded.setdefault(name, []).append((row["_step"], value))
    truth = expected(run_folder)
    assert_same(recorded, truth, truth.keys() - {"images_per_s", "data_wait_ms", "step_ms"})
    assert [step for step, _ in recorded["views"]] == [0]
    assert list(run_folder.glob("wandb/offline-run-*/files/media/images/views_0_*.png"))
    assert " ".join(capsys.readouterr().out.split()).count("W&B is not logged in, so it records offline") == 2


OFFLINE = """
import socket, sys
from pathlib import Path
import torch
from engine.session import Session
from engine.trackers import Trackers

def look_up(host, *_, **options):
    print("looked for", host, file=sys.stderr)
    raise socket.gaierror

socket.getaddrinfo = look_up
session = Session("fp32")
session.out = Path(sys.argv[1])
trackers = Trackers(session)
trackers.start(["tensorboard", "wandb", "mlflow"], 0, {})
trackers.log(1, {"loss": 0.5})
trackers.draw_views(1, torch.zeros(2, 2, 3, dtype=torch.uint8))
assert set(trackers.trackers) == {"tensorboard", "wandb", "mlflow"}
trackers.close()
"""


def test_no_tracker_looks_for_a_server(tmp_path):
    """In a process of its own, because both W&B and MLflow send telemetry in threads, and not under pytest."""
    for name in ("tensorboard", "wandb", "mlflow"):
        pytest.importorskip(name)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "looked for" not in done.stderr
    assert {"tensorboard", "wandb", "mlflow", "trackers.json"} <= {path.name for path in tmp_path.iterdir()}


def test_failing_tracker_is_reported_once_and_does_not_end_the_run(train, run_folder, monkeypatch, capsys):
    """A disk is full from step 3 on, or a server never answers."""
    created = []

    class Tracker:
        def __init__(self, name, fails_at):
            self.name, self.fails_at, self.steps = name, fails_at, []
            self.tracker = SimpleNamespace(id="1", info=SimpleNamespace(run_id="1"))

        def start(self):
            if self.fails_at == 0:
                raise ConnectionError("server unreachable\nlong explanation")

        def log(self, values, step):
            self.steps.append(step)
            if step == self.fails_at:
                raise OSError(28, "No space left on device")

        def store_init_configuration(self, values):
            pass

        def log_images(self, values, step, **layout):
            pass

        def finish(self):
            self.steps.append("finish")

    def create(session, kind, **options):
        created.append(Tracker(kind, {"tensorboard": 3, "mlflow": 0, "wandb": None}[kind]))
        return created[-1]

    monkeypatch.setattr(Session, "create_tracker", create)
    monkeypatch.setattr("engine.trackers.is_installed", lambda name: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda **_: True))
    fake_mlflow = SimpleNamespace(set_tracking_uri=lambda uri: None, log_image=lambda *_: None)
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow)
    loop = train("tensorboard", "mlflow", "wandb")
    assert loop.global_step == STEPS and (run_folder / "summary.json").exists()
    steps = {tracker.name: list(dict.fromkeys(tracker.steps)) for tracker in created}
    assert steps == {"tensorboard": [0, 1, 2, 3], "mlflow": [], "wandb": [*range(STEPS + 1), "finish"]}
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("tensorboard failed") == printed.count("No space left on device") == 1
    assert printed.count("mlflow failed") == 1 and "server unreachable" in printed and "explanation" not in printed


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_damaged_record_of_trackers_does_not_stop_a_resumed_run(content, train, run_folder):
    with pytest.raises(Killed):
        train("tensorboard", killed_after=6)
    (run_folder / "trackers.json").write_text(content)
    assert train("tensorboard").global_step == STEPS
    assert json.loads((run_folder / "trackers.json").read_text())["tensorboard"]["drawn"]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_starts_trackers(rank, train, monkeypatch):
    started = []
    monkeypatch.setattr("engine.trackers.is_installed", lambda name: True)
    monkeypatch.setattr(Trackers, "start", lambda trackers, *_: started.append(trackers))
    open_run = Session.open_run

    def open_as_rank(session, *arguments, **options):
        open_run(session, *arguments, **options)
        session.rank = rank

    monkeypatch.setattr(Session, "open_run", open_as_rank)
    loop = train("tensorboard")
    assert loop.global_step == STEPS and started == [loop.trackers] * (rank == 0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], r"no tracker 'tensorbord' \(did you mean tensorboard\?\)"),
        (["W&B"], r"no tracker 'W&B' \(did you mean \w+\?\)"),
        (["none", "wandb"], "--trackers none wandb is contradictory; use none alone"),
    ],
)
def test_invalid_trackers_are_refused_by_the_command_line(names, message, monkeypatch):
    monkeypatch.setattr("engine.trackers.is_installed", lambda name: True)
    with pytest.raises(UserError, match=message):
        parse(PRETRAIN, ["--trackers", *names], prog="train.py")


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow-skinny")]
)
def test_missing_package_is_named_before_anything_is_written(name, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"--trackers {name} needs {package}, .*; run `pip install {package}`"):
        parse(PRETRAIN, ["--out", str(tmp_path / "run"), "--trackers", name], prog="train.py")
    assert not (tmp_path / "run").exists()
    assert choose_trackers(["auto"]) == choose_trackers([]) or name != "tensorboard"


def test_chosen_trackers(monkeypatch, tmp_path):
    monkeypatch.setattr("engine.trackers.is_installed", lambda name: True)
    assert choose_trackers(["auto"]) == ["tensorboard"]
    assert choose_trackers(["wandb", "auto", "tensorboard"]) == ["wandb", "tensorboard"]
    assert choose_trackers(["none"]) == choose_trackers([]) == []
    assert parse(PRETRAIN, ["--trackers"], prog="train.py").trackers == ()
    assert parse(PRETRAIN, ["--trackers", "mlflow", "wandb"], prog="train.py").trackers == ("mlflow", "wandb")
    monkeypatch.undo()

    (tmp_path / "wandb").mkdir()  # what W&B leaves in the folder of a script
    (tmp_path / "wandb" / "debug.log").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="pip install wandb"):
        choose_trackers(["wandb"])


def test_options_are_flattened_under_their_names():
    options = {"seed": 3, "compile": False, "views": {"mean": (0.5, 0.25), "blur": {}}, "kwargs": {"stem": None}}
    assert flatten(options) == {"seed": 3, "compile": False, "views.mean": "0.5 0.25", "kwargs.stem": "None"}


def test_sheet_has_a_column_for_each_image_and_a_row_for_each_view():
    levels = torch.arange(2 * 10 * 3).reshape(20, 3, 1, 1) * 4  # views of image i at rows i and 10 + i
    views = levels.to(torch.uint8).expand(-1, -1, 2, 2)
    sheet = view_sheet(SimpleNamespace(views=views, label=torch.zeros(10)), lambda views: views.movedim(2, -1))
    assert sheet.shape == (2 * 2, 8 * 2, 3) and sheet.dtype == torch.uint8
    for view in range(2):
        for image in range(8):
            corner = sheet[2 * view, 2 * image]
            assert corner.tolist() == [4 * (3 * (10 * view + image) + c) for c in range(3)]
    assert sheet[:2, :2].float().var((0, 1)).sum() == 0, "a view is uniform"
