import json
import math
import re
import time

import pytest
import torch

from engine.metrics import MetricsFile, RunningMeans, StepTimer, verdict


def test_the_clock_tells_waiting_from_working():
    clock = StepTimer()
    waited = worked = 0.0

    def slow():
        nonlocal waited
        for batch in range(3):
            start = time.perf_counter()
            time.sleep(0.03)
            waited += time.perf_counter() - start
            yield batch

    begun = time.perf_counter()
    seen = []
    for batch in clock.watch(slow()):
        start = time.perf_counter()
        time.sleep(0.01)
        worked += time.perf_counter() - start
        seen.append(batch)
    row = clock.window(batch_size=8)
    elapsed = time.perf_counter() - begun
    assert seen == [0, 1, 2]
    assert waited / 3 <= row["data_wait_ms"] / 1000 <= (elapsed - worked) / 3
    assert (waited + worked) / 3 <= row["step_ms"] / 1000 <= elapsed / 3
    images_per_s, share = clock.summary(batch_size=8)
    assert images_per_s == row["images_per_s"]
    assert share == pytest.approx(row["data_wait_ms"] / row["step_ms"])


def test_a_pause_does_not_count():
    clock = StepTimer()
    time.sleep(0.05)
    clock.pause()
    for _ in clock.watch([0]):
        pass
    assert clock.window(1)["step_ms"] < 50


def test_running_means_start_anew_after_each_take():
    means, taken = RunningMeans(("loss", "top1"), torch.device("cpu")), torch.tensor(True)
    for value in (1.0, 2.0, 6.0):
        means.add(taken, torch.tensor(value), torch.tensor(-value, dtype=torch.bfloat16))
    assert means.take().tolist() == [3.0, -3.0]
    means.add(taken, torch.tensor(5.0), torch.tensor(0.0))
    assert means.take(7).tolist() == [5.0, 0.0, 7.0]


def test_skipped_steps_do_not_count_in_the_means():
    means = RunningMeans(("loss",), torch.device("cpu"))
    for value, taken in ((1.0, True), (math.nan, False), (3.0, True)):
        means.add(torch.tensor(taken), torch.tensor(value))
    assert means.take().tolist() == [2.0]
    means.add(torch.tensor(False), torch.tensor(math.inf))
    assert math.isnan(means.take().item())


@pytest.mark.parametrize(
    ("waiting", "communicating", "said"),
    [
        (0.30, 0.20, "Data-bound: 30.0% of the time .*--loader.workers"),
        (0.20, 0.30, "Communication-bound: 30.0% of the time .*larger --batch-size"),
        (0.01, 0.02, "Compute-bound: 97.0% of the time .*; --compile would help"),
        (0.049, 0.099, "Compute-bound: 85.2%"),
    ],
)
def test_the_verdict_names_share_and_cure(waiting, communicating, said):
    assert re.fullmatch(said + ".*", verdict(waiting, communicating, "--compile"))


def test_a_mean_that_is_not_a_number_is_null(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write(step=1, loss=math.nan)
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_rows_are_on_disk_at_once(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write(step=1, loss=0.5)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    metrics.close()


def test_a_damaged_row_stops_no_resume(tmp_path):
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
