"""The training loop around a linear model: steps, rows, validations, hooks, stopping and resuming."""

import json
import math
import re
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from common import UserError
from engine import run_lock
from engine.checkpoint import CheckpointConfig
from engine.loop import Instruments, LoopConfig, TrainingLoop
from engine.session import Session
from pipeline.loader.sampler import ShardSampler

STEPS_PER_EPOCH = 4


class Loader:
    """Batches (4, 3) that depend on epoch and position alone, with the interface of a view loader."""

    backend_name, filling = "none", ""

    def __init__(self, bad_step: int | None = None):
        self.epoch = self.position = 0
        self.bad_step, self.closed = bad_step, False
        self.bad_samples = SimpleNamespace(replaced=0, check=lambda replaced, epoch: None)
        self.sampler = SimpleNamespace(dropped=0)
        self.shards = type("Shards", (), {"checksum": "abc", "root": "data", "__len__": lambda self: 16})()

    def __len__(self):
        return STEPS_PER_EPOCH

    def __iter__(self):
        while self.position < STEPS_PER_EPOCH:
            step = STEPS_PER_EPOCH * self.epoch + self.position
            self.position += 1
            batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            yield batch * math.nan if step + 1 == self.bad_step else batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"] + state["position"] // len(self), state["position"] % len(self)

    def close(self):
        self.closed = True


@pytest.fixture
def create(tmp_path):
    """create(**options) of a loop in tmp_path/run; returns (loop, model, loader)."""
    threads = torch.get_num_threads()

    def run(resume="auto", bad_step=None, instruments=None, validate_every=0, **options):
        run_lock.release_all()
        AcceleratorState._reset_state(reset_partial_state=True)
        session = Session("fp32")
        session.open_run(str(tmp_path / "run"), resume, name="test")
        config = LoopConfig(**{"epochs": 3, "batch_size": 4, "log_every": 2} | options)
        model, loader = nn.Linear(3, 1), Loader(bad_step)
        optimizer = torch.optim.SGD(model.parameters(), 1.0, fused=True)
        loop = TrainingLoop(
            session,
            config,
            model,
            loader,
            [optimizer],
            lambda step: 0.1 / (step + 1),
            validate_every=validate_every,
            instruments=instruments,
        )
        return loop, model, loader

    yield run
    run_lock.release_all()
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def train(loop, model, after_step=lambda loop: None):
    """Run the loop to its end; returns the loss of every step."""
    losses = []
    with loop:
        for x in loop:
            loss = (model(x) - 1).square().mean()
            loop.backward(loss)
            loop.step(loss=loss, output=model.bias.detach()[0])
            losses.append(loss.item())
            after_step(loop)
    return losses


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_loop_runs_every_epoch_and_writes_rows(create, tmp_path):
    loop, model, loader = create()
    rates = []
    losses = train(loop, model, lambda loop: rates.append(loop.optimizers[0].param_groups[0]["lr"]))
    assert loop.global_step == len(losses) == 12 and loader.closed and not loop.stopped
    assert rates == [0.1 / step for step in range(1, 13)], "of the optimizer"
    written = rows(tmp_path)
    assert [row["step"] for row in written] == [2, 4, 6, 8, 10, 12] and [row["epoch"] for row in written][-1] == 3
    for row in written:
        assert row["loss"] == pytest.approx(sum(losses[row["step"] - 2 : row["step"]]) / 2), "mean since the last row"
        assert row["lr"] == pytest.approx(0.1 / row["step"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 3


def test_checkpoints_are_written_when_their_time_has_come(create, tmp_path):
    loop, model, _ = create(checkpoint=CheckpointConfig(every_minutes=1e-9, keep=20))
    train(loop, model)
    written = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert written == [2, 4, 6, 8, 10, 12]


def test_without_a_terminal_every_epoch_prints_a_line(create, capsys):
    loop, model, _ = create(log_every=1)
    train(loop, model)
    printed = re.findall(r"^\d\d:\d\d:\d\d (epoch .*)$", capsys.readouterr().out, re.MULTILINE)
    assert [line.split(":")[0] for line in printed] == [f"epoch {n + 1}, step {4 * n + 1} of 12" for n in range(3)]


def test_the_progress_bar_moves_with_every_step_and_shows_a_loss_once_there_is_one(create, monkeypatch):
    updates = []

    @contextmanager
    def recorded(total, fields, shown, **values):
        updates.append(values)
        yield lambda **values: updates.append(values)

    monkeypatch.setattr("engine.loop.progress_bar", recorded)
    loop, model, _ = create(log_every=6)
    train(loop, model)
    assert [values["completed"] for values in updates if "completed" in values] == list(range(1, 13))
    shown = [values["row"] for values in updates if "row" in values]
    assert shown[0] == "" and len(shown) == 3
    assert all(re.match("  loss [0-9.]+  [0-9,]+ images/s", row) for row in shown[1:])


@pytest.mark.parametrize(("capable", "advice"), [(True, "--precision auto"), (False, "hardware that computes in bf16")])
def test_a_run_in_fp32_is_told_how_bf16_is_available(create, monkeypatch, capable, advice):
    monkeypatch.setattr("engine.loop.computes_in_bf16", lambda device: capable)
    loop, model, _ = create()
    train(loop, model)
    monkeypatch.setattr(loop.timer, "summary", lambda batch_size: (100.0, 0.0))  # nothing waits for data
    assert loop._summary()["sentences"][1].endswith(f"{advice} would help.")


def test_validation_is_due_at_the_end_of_epochs_except_the_last(create, tmp_path):
    due = []
    loop, model, _ = create(validate_every=1, log_every=100)

    def validate(loop):
        if loop.validation_due:
            due.append(loop.global_step)
            loop.log(top1=0.5)

    train(loop, model, validate)
    assert due == [4, 8]
    assert [(row["step"], row.get("top1")) for row in rows(tmp_path)] == [
        (4, None),
        (4, 0.5),
        (8, None),
        (8, 0.5),
        (12, None),
    ]


def test_resumed_loop_continues_bit_for_bit(create, tmp_path):
    torch.manual_seed(0)
    loop, model, _ = create(checkpoint=CheckpointConfig(every_steps=1, keep=20))
    losses, whole = train(loop, model), rows(tmp_path)
    expected = model.state_dict()
    for step in (3, 4):  # in the middle of an epoch and of a row; at the end of an epoch
        loop, model, _ = create(
            resume=str(tmp_path / "run" / "checkpoints" / f"step-{step:08d}"), checkpoint=CheckpointConfig(1, keep=20)
        )
        assert train(loop, model) == losses[step:]
        assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
        assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in whole]


def test_stop_signal_ends_the_loop_after_the_step(create, tmp_path, capsys):
    loop, model, _ = create(log_every=100)
    losses = train(loop, model, lambda loop: loop.global_step == 5 and signal.raise_signal(signal.SIGTERM))
    assert loop.stopped and len(losses) == 6, "a signal after step 5 is seen in step 6"
    assert "Stopped after step 6 of 12" in " ".join(capsys.readouterr().out.split())
    loop, model, _ = create(log_every=100)
    assert loop.global_step == 6 and len(train(loop, model)) == 6


def test_step_with_a_non_finite_gradient_is_skipped(create, tmp_path):
    loop, model, _ = create(bad_step=2, log_every=1)
    losses = train(loop, model)
    assert math.isnan(losses[1]) and all(map(math.isfinite, losses[2:]))
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0] + 11 * [1]
    assert rows(tmp_path)[1]["loss"] is None


class Recorder(Instruments):
    def __init__(self):
        self.parts = []

    def mark(self, part):
        self.parts.append(part)

    def batches(self, loader):
        return list(loader)[:2]


def test_instruments_see_the_parts_of_every_step(create):
    recorder = Recorder()
    loop, model, _ = create(instruments=recorder)
    assert len(train(loop, model)) == 2, "the instruments choose the batches"
    assert recorder.parts == 2 * ["forward", "loss", "backward", "other", "optimizer", "other"]
    assert not model._forward_hooks and not model._forward_pre_hooks, "removed with the end of the loop"


@pytest.mark.parametrize(
    ("options", "message"), [({"seed": 1}, r"--seed 0 \(now 1\)"), ({"batch_size": 8}, r"--batch-size 4 \(now 8\)")]
)
def test_other_options_cannot_resume(create, options, message):
    loop, model, _ = create(epochs=1)
    train(loop, model)
    with pytest.raises(UserError, match=message):
        create(epochs=1, **options)


def test_start_and_baselines_are_not_training_time(create, tmp_path):
    loop, model, _ = create(log_every=1)
    loop.timer.since -= 1000  # as if they had taken so many seconds
    train(loop, model)
    assert max(row["step_ms"] for row in rows(tmp_path)) < 100_000


LAUNCH = "accelerate launch --multi_gpu --num_processes"


@pytest.mark.parametrize(
    ("ranks", "local", "device", "command"),
    [
        (1, 1, "cuda", "accelerate launch train.py --seed 1 --out run"),
        (8, 8, "cuda", f"{LAUNCH}=8 train.py --seed 1 --out run"),
        (2, 2, "cpu", f"env ACCELERATE_USE_CPU=true {LAUNCH}=2 train.py --seed 1 --out run"),
        (8, 4, "cuda", f"{LAUNCH}=8 train.py --seed 1 --out run, with the launcher's options for several machines"),
    ],
)
def test_the_command_that_continues_starts_as_many_processes(ranks, local, device, command, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--out", "elsewhere", "--seed", "1", "--resume=none"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    session = SimpleNamespace(world_size=ranks, device=torch.device(device), out="run")
    assert TrainingLoop._command(SimpleNamespace(session=session)) == command


def test_divergence_lists_the_images_of_every_node_group(tmp_path):
    loader, step = Loader(), 3
    loader.sampler = sampler = ShardSampler(np.arange(0, 900, 100), batch_size=16, seed=0, node_groups=2)
    loader.shards.index = {"key": np.arange(800).astype("S4")}
    session = SimpleNamespace(out=tmp_path, is_main=True, world_size=4)
    error = TrainingLoop._diverged(SimpleNamespace(loader=loader, session=session), 6, step)
    listed = json.loads((tmp_path / "diverged.json").read_text())
    together = np.sort(np.concatenate([sampler.batch(0, step - 1, rank, 4) for rank in range(4)]))
    assert listed == {"step": step, "images": [str(sample) for sample in together]}
    assert "in 6 consecutive steps, the last of them step 3" in str(error)


def test_a_stop_is_saved_before_the_validation(create, tmp_path):
    """Whoever asked to stop may not wait for the validation."""
    loop, model, _ = create(validate_every=1, log_every=100)
    saved = []

    def after_step(loop):
        if loop.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        if loop.validation_due:
            saved.append((tmp_path / "run" / "checkpoints" / "step-00000004").exists())
            loop.log(top1=0.5)

    train(loop, model, after_step)
    assert saved == [True] and loop.stopped


def test_a_signal_ends_a_dry_run(create, capsys):
    loop, model, _ = create(dry_run=True)
    losses = train(loop, model, lambda loop: loop.global_step == 1 and signal.raise_signal(signal.SIGTERM))
    assert loop.stopped and len(losses) == 2, "a signal after step 1 is seen in step 2"
    assert "steps per epoch" in capsys.readouterr().out
