"""The bench of the training step: its marks, its trainers on a few textures, and the arithmetic of its rows."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.optim import optimizer

import run
import train
from bench import train_step as bench
from bench import trainers
from bench.trainers import PARTS, Marks, marked_training, take_turn
from loss import nt_xent
from model import SimCLR
from pipeline.loader.loader import ViewLoader
from presets import parse

CPU = torch.device("cpu")
SMALL = ["--preset", "textures", "--encoder.width", "0.125", "--head.hidden", "32", "--head.out", "16"]
SETTING = bench.Setting(SMALL, batch=8, image=bench.texture, warm=1, steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 textures, as files and as shards."""
    path = tmp_path_factory.mktemp("bench")
    bench.make_images(path, SETTING, (SETTING.warm + SETTING.steps + bench.AHEAD) * SETTING.batch)
    return path


@pytest.fixture
def turns(folder, monkeypatch):
    """Name -> turn, all in this process and on one thread: on tensors this small more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(run, "available_cores", lambda: 1)
    found = bench.contestants(SETTING, folder)
    yield {(t.trainer, t.precision, t.source): replace(t, workers=0) for t in found}
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def patched() -> list:
    """What a marked run puts something else in the place of."""
    hooks = (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
    members = (ViewLoader.__iter__, SimCLR.__dict__.get("__call__"), train.nt_xent, torch.autograd.backward)
    return [*members, train.console.quiet, *map(len, hooks)]


def test_a_step_lasts_from_one_wait_to_the_next(monkeypatch):
    readings = iter([0, 3, 4, 9, 11, 11.5, 20, 50, 51, 53])
    monkeypatch.setattr(trainers.time, "perf_counter", lambda: next(readings))
    marks = Marks(CPU)
    for _ in marks.batches("a"):  # wait 0 to 3
        marks.around("forward", lambda: None)()  # 4 to 9
        marks.around("backward", lambda: None)()  # 11 to 11.5
    for _ in marks.batches("b"):  # until 20 the first epoch's; then 30 that are no step's; wait 50 to 51
        pass
    first, second = marks.steps_ms()
    nothing = dict.fromkeys(PARTS, 0.0)
    assert first == nothing | {"wait": 3000, "forward": 5000, "backward": 500, "other": 11500}
    assert second == nothing | {"wait": 1000, "other": 2000}


def test_a_part_ends_where_it_fails():
    marks = Marks(CPU)
    with pytest.raises(ZeroDivisionError):
        marks.around("loss", lambda: 1 / 0)()
    assert [part for part, _ in marks.taken] == ["loss", "other"]


def test_ours_is_pretrain_with_its_parts_marked(turns, tmp_path):
    turn, before = replace(turns["ours", "fp32", "images"], warm=0, steps=3), patched()
    steps = take_turn(turn, tmp_path / "run")["steps_ms"]
    assert len(steps) == 3
    assert all(set(step) == set(PARTS) and min(step.values()) > 0 for step in steps)
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 3  # and the run's own clock: it began before the first step, and ended within the last
    assert sum(step["wait"] for step in steps) <= 3 * row["data_wait_ms"]
    assert sum(sum(step.values()) for step in steps[:2]) <= 3 * row["step_ms"]
    assert patched() == before


def test_slices_are_marked_too(turns, tmp_path):
    marks, arguments = Marks(CPU), turns["ours", "fp32", "images"].arguments
    with marked_training(marks, lambda batches: islice(batches, 2)):
        train.pretrain(parse([*arguments, "--micro-batch", "2", "--out", str(tmp_path / "run")]))
    parts = [part for part, _ in marks.taken]
    assert parts.count("forward") == 2 * (4 + 4), "four slices, encoded without a graph and with one"
    assert parts.count("loss") == 2 and parts.count("backward") == 2 * (1 + 4)
    assert len(marks.steps_ms()) == 2


def test_marks_change_nothing(turns, tmp_path):
    losses = []
    for name in ("marked", "as it is"):
        AcceleratorState._reset_state(reset_partial_state=True)
        out = tmp_path / name
        arguments = ["--epochs", "1", "--log-every", "1", "--precision", "fp32", "--out", str(out)]
        training = partial(train.pretrain, parse([*turns["ours", "fp32", "images"].arguments, *arguments]))
        if name == "marked":
            with marked_training(Marks(CPU), iter):
                training()
        else:
            training()
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] and len(losses[0]) == 8


@pytest.fixture(params=["plain", "lightly"])
def peer(request) -> str:
    if request.param == "lightly":
        pytest.importorskip("lightly", reason="a peer, which `make bench` installs")
    return request.param


@pytest.mark.parametrize(("precision", "source"), [("bf16", "images"), ("fp32", "same batch")])
def test_peers_train(turns, tmp_path, peer, precision, source):
    result = take_turn(turns[peer, precision, source], tmp_path)
    assert len(result["steps_ms"]) == 2 and math.isfinite(result["loss"])
    assert all(set(step) == set(PARTS) and min(step.values()) > 0 for step in result["steps_ms"])


def test_peers_have_the_same_objective(folder, peer):
    config = parse([*SMALL, "--data", str(folder)])
    transform, head, encode, contrast = getattr(trainers, peer)(config, 24)
    views = transform(Image.open(next((folder / "images").rglob("*.jpg"))))
    assert [view.shape for view in views] == [(3, 32, 32)] * 2 and not views[0].equal(views[1])
    first, second = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0)).double().unbind()
    z = torch.cat([first, second])
    passed = encode(lambda x: x, first, second)
    torch.testing.assert_close(torch.cat(passed), z)
    torch.testing.assert_close(contrast(*passed), nt_xent(z, config.loss.temperature, impl="reference"))
    assert head(z.float()).shape == (12, config.head.out)


def test_a_trainer_that_diverges_is_not_compared(turns, tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "dense", lambda z, temperature: (z * math.nan).sum())
    with pytest.raises(RuntimeError, match="plain in fp32 ended with a loss of nan"):
        take_turn(turns["plain", "fp32", "same batch"], tmp_path)


def test_a_turn_has_a_process_of_its_own(turns, folder):
    result = bench.in_a_process(turns["ours", "bf16", "same batch"], folder)
    assert len(result["steps_ms"]) == 2 and result["peak_mb"] > 100
    assert sorted(path.name for path in folder.iterdir()) == ["images", "train"]


def test_contestants(folder, monkeypatch):
    monkeypatch.setattr(bench, "available_cores", lambda: 8)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    turns = [(t.trainer, t.precision, t.source, t.workers) for t in bench.contestants(SETTING, folder)]
    for precision in ("bf16", "fp32"):
        assert [turn for turn in turns if turn[1] == precision] == [
            ("ours", precision, "images", 0),
            *(("plain", precision, "images", workers) for workers in (1, 4, 8)),
            ("ours", precision, "same batch", 0),
            ("plain", precision, "same batch", 1),
        ]
    monkeypatch.setattr(bench, "find_spec", lambda name: object())
    assert {turn.trainer for turn in bench.contestants(SETTING, folder)} == {"ours", "plain", "lightly"}


def test_rows(monkeypatch):
    """Two steps of every part equally long; the peers slower by known factors, and slowest with one worker."""
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


def test_settings_are_what_train_py_takes(tmp_path):
    for name, setting in [*bench.SETTINGS.items(), ("memory", bench.MEMORY)]:
        config = parse([*setting.arguments, "--data", str(tmp_path), "--batch-size", str(setting.batch)])
        assert config.preset == (name if name in bench.SETTINGS else "cifar10") and config.batch_size == setting.batch
    assert bench.tile(3) != bench.tile(4)
