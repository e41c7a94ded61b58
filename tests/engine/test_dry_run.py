import torch
from torch import nn

from engine.dry_run import STEPS, DryRun, duration


def cells(table):
    names, values = (list(column.cells) for column in table.columns)
    return dict(zip(names, values, strict=True))


def test_time_is_that_of_the_steps_after_the_first(monkeypatch):
    clock = iter(200 + 0.5 * step for step in range(STEPS))
    monkeypatch.setattr("engine.dry_run.time.perf_counter", lambda: next(clock))
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))  # children "0", "1" and "2"
    dry = DryRun(net, torch.device("cpu"), steps_per_epoch=240, epochs=10)
    assert [dry.step() for _ in range(STEPS)] == [False] * (STEPS - 1) + [True]
    shown = cells(dry.table(batch_size=64))
    assert shown["parameters of 0"] == "16" and shown["parameters of 2"] == "10" and "parameters of 1" not in shown
    assert shown["time per step"] == "500 ms (128 images/s)" and shown["steps per epoch"] == "240"
    assert shown["time per epoch"] == "2 min 00 s" and shown["time of 10 epochs"] == "20 min 00 s"
    assert 50 < float(shown["peak memory of the process"].removesuffix(" MB").replace(",", "")) < 50_000


def test_a_run_of_one_step_cannot_be_timed():
    dry = DryRun(nn.Linear(1, 1), torch.device("cpu"), steps_per_epoch=1, epochs=1)
    assert dry.step() and "time per step" not in cells(dry.table(8))


def test_durations():
    seconds = (8.2, 59.94, 60, 250.4, 3 * 3600 + 299.6, 86400 * 12 + 2 * 3600)
    assert list(map(duration, seconds)) == ["8.2 s", "59.9 s", "1 min 00 s", "4 min 10 s", "3 h 05 min", "12 d 02 h"]
