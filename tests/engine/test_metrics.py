"""Metrics: means on the device, step times and metrics.jsonl."""

import json
import math
import re
import time

import pytest
import torch

from engine.metrics import MetricsFile, RunningMeans, StepTimer, divide_pairs, verdict


def test_timer_separates_waiting_from_working():
    timer = StepTimer()
    waited = worked = 0.0

    def slow():
        nonlocal waited
        for batch in range(3):
            start = time.perf_counter()
            time.sleep(0.03)
            waited += time.perf_counter() - start
            yield batch

    started = time.perf_counter()
    seen = []
    for batch in timer.watch(slow()):
        start = time.perf_counter()
        time.sleep(0.01)
        worked += time.perf_counter() - start
        seen.append(batch)
    row = timer.window(batch_size=8)
    elapsed = time.perf_counter() - started
    assert seen == [0, 1, 2]
    assert waited / 3 <= row["data_wait_ms"] / 1000 <= (elapsed - worked) / 3
    assert (waited + worked) / 3 <= row["step_ms"] / 1000 <= elapsed / 3
    images_per_s, share = timer.summary(batch_size=8)
    assert images_per_s == row["images_per_s"]
    assert share == pytest.approx(row["data_wait_ms"] / row["step_ms"])


def test_paused_time_does_not_count(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr("engine.metrics.time.perf_counter", lambda: now_s)
    timer = StepTimer()
    now_s += 50
    timer.pause()
    for _ in timer.watch([0]):
        now_s += 2
    assert timer.window(1)["step_ms"] == 2000


def test_means_restart_after_each_reset():
    means, taken = RunningMeans(), torch.tensor(True)
    for value in (1.0, 2.0, 6.0):
        means.add(taken, loss=torch.tensor(value), top1=torch.tensor(-value, dtype=torch.bfloat16))
    assert means.compute_and_reset() == {"loss": 3.0, "top1": -3.0}
    means.add(taken, loss=torch.tensor(5.0), top1=torch.tensor(0.0))
    assert means.compute_and_reset() == {"loss": 5.0, "top1": 0.0}


def test_skipped_steps_do_not_count_in_the_means():
    means = RunningMeans()
    for value, taken in ((1.0, True), (math.nan, False), (3.0, True)):
        means.add(torch.tensor(taken), loss=torch.tensor(value))
    assert means.compute_and_reset() == {"loss": 2.0}
    means.add(torch.tensor(False), loss=torch.tensor(math.inf))
    assert math.isnan(means.compute_and_reset()["loss"])


def test_pairs_are_summed_before_they_are_divided():
    """2 of 4 and 1 of 1 labeled images are right: 3 of 5, not the mean of the two shares."""
    means, taken = RunningMeans(), torch.tensor(True)
    for correct, labeled in ((2.0, 4.0), (1.0, 1.0)):
        means.add(taken, loss=torch.tensor(1.0), top1=(torch.tensor(correct), torch.tensor(labeled)))
    row = {name: value.item() for name, value in means.compute_and_reset().items()}
    assert divide_pairs(row) == {"loss": 1.0, "top1": pytest.approx(0.6)}
    assert math.isnan(divide_pairs({"top1": 0.0, "top1/weight": 0.0})["top1"]), "no labeled image: no accuracy"


def test_means_continue_with_the_sums_of_a_checkpoint():
    taken, means, resumed = torch.tensor(True), RunningMeans(), RunningMeans()
    means.add(taken, loss=torch.tensor(1.0))
    resumed.load(means.names, means.sums)
    resumed.add(taken, loss=torch.tensor(4.0))
    assert resumed.compute_and_reset() == {"loss": 2.5}


@pytest.mark.parametrize(
    ("waiting", "communicating", "message"),
    [
        (0.30, 0.20, "Data-bound: 30.0% of the time .*--loader.workers"),
        (0.20, 0.30, "Communication-bound: 30.0% of the time .*larger --batch-size"),
        (0.01, 0.02, "Compute-bound: 97.0% of the time .*; --compile would help"),
        (0.049, 0.099, "Compute-bound: 85.2%"),
    ],
)
def test_verdict_names_share_and_remedy(waiting, communicating, message):
    assert re.fullmatch(message + ".*", verdict(waiting, communicating, "--compile"))


def test_nan_is_written_as_null(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write(step=1, loss=math.nan)
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_rows_are_written_immediately(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write(step=1, loss=0.5)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    metrics.close()


def test_damaged_row_does_not_prevent_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n{"step": 3, "loss": 0.3}\n'
    for place in range(len(good)):
        for bit in (0, 7):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            MetricsFile(path, step=9).close()
            kept = path.read_bytes().splitlines()
            assert 1 <= len(kept) <= 3 and all(isinstance(json.loads(row)["step"], int) for row in kept)


def test_damaged_rows_are_counted_and_later_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        b'{"step": 1}',
        b'{"step": 2, "x": "\xff"}',
        b"[3]",
        b"{}",
        b'{"step": null}',
        b'{"step": 4}',
        b'{"step": 5}',
    ]
    path.write_bytes(b"\n".join([*rows, b'{"step": 5, "features": "trained"}', b'{"step": 4, "lo']))
    metrics = MetricsFile(path, step=4)
    assert metrics.damaged == 4
    metrics.write(step=5, loss=math.inf, features="text")
    metrics.close()
    expected = '{"step": 1}\n{"step": 4}\n{"step": 5, "loss": null, "features": "text"}\n'
    assert path.read_text() == expected
