"""Benchmark of the training step: marks, trainers on a few textures, and the arithmetic of the rows."""

import json
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import train
from bench import train_step as bench
from bench import trainers
from bench.trainers import PARTS, LoopMarks, Marks, take_turn
from engine import session
from loss import nt_xent
from presets import PRETRAIN, parse

CPU = torch.device("cpu")
SMALL = ["--preset", "textures", "--encoder.width", "0.125", "--head.hidden", "32", "--head.out", "16"]
SETTING = bench.Setting(SMALL, batch=8, image=bench.texture, warm=1, steps=2)


def config_of(arguments: list[str]):
    return parse(PRETRAIN, arguments, prog="train.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 textures, as files and as shards."""
    path = tmp_path_factory.mktemp("bench")
    bench.make_images(path, SETTING, (SETTING.warm + SETTING.steps + bench.AHEAD) * SETTING.batch)
    return path


@pytest.fixture
def bf16(monkeypatch):
    """A machine that computes in bf16."""
    monkeypatch.setattr(bench, "computes_in_bf16", lambda device: True)


@pytest.fixture
def turns(folder, bf16, monkeypatch):
    """(trainer, precision, source) -> turn in this process, on one thread because the tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(session, "available_cores", lambda: 1)
    found = bench.contestants(SETTING, folder, CPU)
    yield {(t.trainer, t.precision, t.source): replace(t, workers=0) for t in found}
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def test_step_lasts_from_one_wait_to_the_next(monkeypatch):
    readings = iter([0, 3, 4, 9, 11, 11.5, 20, 50, 51, 53])
    monkeypatch.setattr(trainers.time, "perf_counter", lambda: next(readings))
    marks = Marks(CPU)
    for _ in marks.batches("a"):  # wait from 0 to 3
        for part in ("forward", "other", "backward", "other"):  # 4 to 9, 11 to 11.5
            marks(part)
    for _ in marks.batches("b"):  # the first epoch ends at 20; 30 s that belong to no step; wait from 50 to 51
        pass
    first, second = marks.steps_ms()
    zeros = dict.fromkeys(PARTS, 0.0)
    assert first == zeros | {"wait": 3000, "forward": 5000, "backward": 500, "other": 11500}
    assert second == zeros | {"wait": 1000, "other": 2000}


def test_peak_memory_of_a_gpu_starts_after_the_warm_up(monkeypatch):
    """In the warm-up cuDNN tries algorithms whose memory training never needs again."""
    log = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    for batch in trainers.supplied(iter(range(9)), "images", 2, 3, torch.device("cuda")):
        log.append(batch)
    assert log == [0, 1, "reset", 2, 3, 4]


def test_pretrain_with_its_parts_marked(turns, tmp_path):
    turn = replace(turns["ours", "fp32", "images"], warm=0, steps=3)
    steps = take_turn(turn, tmp_path / "run")["steps_ms"]
    assert len(steps) == 3
    assert all(set(step) == set(PARTS) and min(step.values()) > 0 for step in steps)
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 3  # the timer of the run starts before the first step and ends within the last one
    assert sum(step["wait"] for step in steps) <= 3 * row["data_wait_ms"]
    assert sum(sum(step.values()) for step in steps[:2]) <= 3 * row["step_ms"]


def test_slices_are_marked(turns, tmp_path):
    marks, arguments = Marks(CPU), turns["ours", "fp32", "images"].arguments
    config = config_of([*arguments, "--micro-batch", "2", "--out", str(tmp_path / "run")])
    train.pretrain(config, LoopMarks(marks, lambda batches: islice(batches, 2)))
    parts = [part for part, _ in marks.taken]
    assert parts.count("forward") == 2 * (4 + 4), "four slices, encoded without a graph and with one"
    assert parts.count("backward") == 2 * (1 + 4), "the loss and every slice"
    assert len(marks.steps_ms()) == 2 and all(min(step.values()) > 0 for step in marks.steps_ms())


def test_marks_do_not_change_the_losses(turns, tmp_path):
    losses = []
    for name, instruments in (("marked", LoopMarks(Marks(CPU), iter)), ("plain", None)):
        AcceleratorState._reset_state(reset_partial_state=True)
        out = tmp_path / name
        options = ["--epochs", "1", "--log-every", "1", "--precision", "fp32", "--out", str(out)]
        train.pretrain(config_of([*turns["ours", "fp32", "images"].arguments, *options]), instruments)
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] and len(losses[0]) == 8


@pytest.fixture(params=["plain", "lightly"])
def peer(request) -> str:
    if request.param == "lightly":
        pytest.importorskip("lightly", reason="`make bench` installs lightly")
    return request.param


@pytest.mark.parametrize(("precision", "source"), [("bf16", "images"), ("fp32", "same batch")])
def test_peers_train(turns, tmp_path, peer, precision, source):
    result = take_turn(turns[peer, precision, source], tmp_path)
    assert len(result["steps_ms"]) == 2 and math.isfinite(result["loss"])
    assert all(set(step) == set(PARTS) and min(step.values()) > 0 for step in result["steps_ms"])


def test_peers_have_the_same_objective(folder, peer):
    config = config_of([*SMALL, "--data", str(folder)])
    peer = getattr(trainers, peer)(config, 24)
    views = peer.transform(Image.open(next((folder / "images").rglob("*.jpg"))))
    assert [view.shape for view in views] == [(3, 32, 32)] * 2 and not views[0].equal(views[1])
    first, second = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0)).double().unbind()
    z = torch.cat([first, second])
    encoded = peer.encode(lambda x: x, first, second)
    torch.testing.assert_close(torch.cat(encoded), z)
    torch.testing.assert_close(peer.contrast(*encoded), nt_xent(z, config.loss.temperature, impl="reference"))
    assert peer.head(z.float()).shape == (12, config.head.out)


def test_diverging_trainer_is_not_compared(turns, tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "dense", lambda z, temperature: (z * math.nan).sum())
    with pytest.raises(RuntimeError, match="plain in fp32 ended with a loss of nan"):
        take_turn(turns["plain", "fp32", "same batch"], tmp_path)


def test_turn_runs_in_a_new_process(turns, folder):
    result = bench.in_a_process(turns["ours", "bf16", "same batch"], folder)
    assert len(result["steps_ms"]) == 2 and result["peak_mb"] > 100
    assert sorted(path.name for path in folder.iterdir()) == ["images", "train"]


def test_every_trainer_takes_its_turns(folder, bf16, monkeypatch):
    monkeypatch.setattr(bench, "available_cores", lambda: 8)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    turns = [(t.trainer, t.precision, t.source, t.workers) for t in bench.contestants(SETTING, folder, CPU)]
    for precision in ("bf16", "fp32"):
        assert [turn for turn in turns if turn[1] == precision] == [
            ("ours", precision, "images", 0),
            *(("plain", precision, "images", workers) for workers in (0, 1, 4, 8)),
            ("ours", precision, "same batch", 0),
            ("plain", precision, "same batch", 1),
        ]
    monkeypatch.setattr(bench, "find_spec", lambda name: object())
    assert {turn.trainer for turn in bench.contestants(SETTING, folder, CPU)} == {"ours", "plain", "lightly"}
    monkeypatch.setattr(bench, "computes_in_bf16", lambda device: False)
    assert {turn.precision for turn in bench.contestants(SETTING, folder, CPU)} == {"fp32"}


def test_rows(monkeypatch):
    """Two steps whose parts take equally long; peers are slower by known factors, and slowest with one worker."""
    clock = iter([0, *(3 * n for n in range(1, 99))])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    calls = []

    def take(turn):
        calls.append(turn)
        count = sum((t.trainer, t.precision, t.source) == (turn.trainer, turn.precision, turn.source) for t in calls)
        ms = {"ours": 1, "plain": 2, "lightly": 3}[turn.trainer] * {"bf16": 1, "fp32": 2}[turn.precision]
        ms *= (2 if turn.workers == 1 and turn.source == "images" else 1) * (10 if count == 3 else 1)
        return {"steps_ms": [dict.fromkeys(PARTS, ms / 2), dict.fromkeys(PARTS, ms * 1.5)], "peak_mb": 100 + count}

    first = bench.Turn("ours", "bf16", "images", ["--micro-batch", "4"], "", 0, 1, 2)
    turns = [
        replace(first, trainer=trainer, precision=precision, workers=workers)
        for precision in ("bf16", "fp32")
        for trainer, workers in (("ours", 0), ("plain", 1), ("plain", 2), ("lightly", 1), ("lightly", 2))
    ]
    measured = bench.in_turns(turns, take, seconds=13)
    assert [len(results) for _, results in measured] == [3] * 6 and len(calls) == 10 + 2 * 6
    rows = {(row["trainer"], row["precision"]): row for row in bench.rows_of("small", SETTING, measured, CPU)}
    for (trainer, _), row in rows.items():
        assert row["workers"] == (0 if trainer == "ours" else 2) and row["rounds"] == 3 and row["setting"] == "small"
        assert row["micro_batch"] == 4 and row["batch"] == 8
        assert sum(row[f"{part}_ms"] for part in PARTS) == pytest.approx(row["step_ms"])
        assert row["images_per_s"] == pytest.approx(8000 / row["step_ms"], rel=1e-3)
    ours = rows["ours", "bf16"]
    assert ours["step_ms"] == 6 and ours["forward_ms"] == 1 and ours["peak_mb"] == 103
    assert (ours["ratio_to_lightly_fp32"], ours["ratio_to_lightly"], ours["ratio_to_plain"]) == (6, 3, 2)
    assert rows["ours", "fp32"]["ratio_to_lightly_fp32"] == 3 and rows["lightly", "fp32"]["ratio_to_plain"] == 0.667
    alone = bench.rows_of("small", SETTING, measured[:1], CPU)[0]
    assert alone["ratio_to_lightly"] is None and alone["ratio_to_plain"] is None
    bench.show([ours, alone])


def test_resident_images_are_compared_with_loaded_ones(bf16, monkeypatch):
    """In turns; a loss that depends on them is an error."""
    taken, changed = [], 0.0

    def take(turn, folder):
        taken.append(turn)
        resident = config_of(turn.arguments).loader.resident
        ms = {"off": 3, "on": 2}[resident] if turn.source != "same batch" else 1
        return {"steps_ms": [dict.fromkeys(PARTS, ms)], "peak_mb": 100, "loss": 0.5 + changed * (resident == "on")}

    monkeypatch.setattr(bench, "make_images", lambda *_: None)
    monkeypatch.setattr(bench, "in_a_process", take)
    rows = bench.measure_resident(bench.RESIDENT, bench.EPOCH, 0, CPU)
    ratios = {(r["precision"], r["source"]): (r["ratio_to_loaded"], r["ratio_to_same_batch"]) for r in rows}
    sources = {"images": (1, 0.333), "resident": (1.5, 0.5), "same batch": (3, 1)}
    assert ratios == {(p, source): ratio for p in ("bf16", "fp32") for source, ratio in sources.items()}
    assert all(row["setting"] == "resident" and row["trainer"] == "ours" for row in rows)
    config = config_of(taken[0].arguments)
    assert config.epochs == 3 and config.batch_size == 128 and taken[0].warm > bench.EPOCH
    assert taken[0].warm + taken[0].steps == 2 * bench.EPOCH  # the whole second epoch, but for its first steps
    changed = 1e-9
    with pytest.raises(RuntimeError, match="resident images changed the loss in bf16"):
        bench.measure_resident(bench.RESIDENT, bench.EPOCH, 0, CPU)


def test_settings_are_valid_options_of_train_py(tmp_path):
    for name, setting in [*bench.SETTINGS.items(), ("memory", bench.MEMORY)]:
        config = config_of([*setting.arguments, "--data", str(tmp_path), "--batch-size", str(setting.batch)])
        assert config.preset == (name if name in bench.SETTINGS else "cifar10") and config.batch_size == setting.batch
    assert bench.tile(3) != bench.tile(4)
