"""Ablations: what each change alters, which runs are trained, their statistics and the table of docs/training.md."""

import csv
import math
import re
import subprocess
from collections import Counter
from dataclasses import asdict, replace
from threading import Barrier

import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console

from bench import ablation, harness, plot, scored_run
from bench.ablation import BASE, CHANGES, Run, Setting
from common import UserError
from tests.small_sets import texture_shards

SETTING = Setting("", "textures", 64, "0123", 3)
RUNS = [Run(seed, batch, change) for seed in (0, 1) for batch in (16, 32) for change in (BASE, "gray 0.1")]


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Folder of the CSV."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return texture_shards(tmp_path_factory.mktemp("ablation"), train=32, test=20)


def options(config, prefix=""):
    """Options of a configuration as flat names."""
    found = {}
    for name, value in config.items():
        found |= options(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_a_change_alters_its_options_only():
    altered = {
        "decoupled loss": {"loss.decoupled": True},
        "learned temperature": {"loss.learn_temperature": True},
        "queue of 1024": {"loss.queue": 1024},
        "queue of 4096": {"loss.queue": 4096},
        "gray 0.1": {"views.gray_p": 0.1},
        "crops from 0.2": {"views.crop_area": (0.2, 1.0)},
    }
    base = options(asdict(SETTING.config(Run(1, 16, BASE))))
    assert (base["seed"], base["batch_size"], base["epochs"], base["data"]) == (1, 16, 3, "")
    assert (base["views.gray_p"], base["views.crop_area"], base["loss.decoupled"]) == (0.2, (0.08, 1.0), False)
    photographs = replace(SETTING, data="SHARDS").config(RUNS[0])
    assert (base["views.jitter_strength"], photographs.views.jitter_strength) == (1, 0.5)
    assert set(CHANGES) == {BASE, *altered}
    for change, expected in altered.items():
        changed = options(asdict(SETTING.config(Run(1, 16, change))))
        assert {name: value for name, value in changed.items() if value != base[name]} == expected


def test_a_run_is_train_py_on_one_thread(data, tmp_path, monkeypatch):
    """Nothing but the training and its final evaluation, for images given by --data."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # restored afterwards
    monkeypatch.chdir(data.parent)
    setting, threads = ablation.open_setting(data.name, 1), torch.get_num_threads()
    assert (setting.images, setting.data) == (32, str(data)), "a path that holds in any folder"
    small = [*setting.arguments(Run(0, 16, "queue of 1024")), "--encoder.width", "0.125"]
    torch.set_num_threads(2)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        found = scored_run.scores(small, tmp_path / "run")
        assert torch.get_num_threads() == 1
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)
    assert set(found) == {"knn_top1", "linear_top1"} and all(0 <= score <= 1 for score in found.values())
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_run_without_evaluation_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    monkeypatch.setattr(scored_run.train, "pretrain", lambda config: None)
    with pytest.raises(RuntimeError, match="ended without an evaluation"):
        scored_run.scores(SETTING.arguments(RUNS[0]), tmp_path)


def test_every_run_has_a_row_and_is_trained_once(results):
    trained, together = Counter(), Barrier(2, timeout=10)

    def train(arguments):
        together.wait()  # ends only if two runs are in progress at a time
        trained[tuple(arguments)] += 1
        return {"knn_top1": 0.123456, "linear_top1": 0.5}

    assert ablation.measure(SETTING, RUNS[:4], 2, train) == []
    first = (results / "ablation.csv").read_text()
    assert ablation.measure(SETTING, RUNS, 2, train) == []
    assert (results / "ablation.csv").read_text().startswith(first), "rows are appended"
    assert trained == {tuple(SETTING.arguments(run)): 1 for run in RUNS}
    rows = list(csv.DictReader((results / "ablation.csv").open()))
    assert {(int(row["seed"]), int(row["batch"]), row["change"]) for row in rows} == set(RUNS)
    for row in rows:
        assert (row["knn_top1"], row["linear_top1"], row["threads"]) == ("0.1235", "0.5", "1")
        assert (row["data"], row["images"], row["epochs"]) == ("textures", "64", "3")
        assert row["encoder"] == "resnet18 x 0.25, standard stem"
        assert "--optim.lr 5.3e-4 --optim.scaling sqrt" in row["recipe"]
    ablation.measure(replace(SETTING, epochs=4), RUNS[:2], 2, train)
    assert len(harness.read_rows("ablation")) == len(RUNS) + 2, "other epochs are other runs"
    ablation.measure(replace(SETTING, sha256="4567"), RUNS[:2], 2, train)
    assert len(harness.read_rows("ablation")) == len(RUNS) + 4, "images of the same name and number, too"


def test_a_failed_run_stops_no_other_and_is_tried_again():
    def fail_once(arguments):
        if arguments == SETTING.arguments(RUNS[0]):
            raise subprocess.CalledProcessError(1, "train.py")
        return {"knn_top1": 0.5, "linear_top1": 0.5}

    assert ablation.measure(SETTING, RUNS, 1, fail_once) == [RUNS[0]]
    assert len(harness.read_rows("ablation")) == len(RUNS) - 1
    assert ablation.measure(SETTING, RUNS, 1, lambda arguments: {"knn_top1": 0.5, "linear_top1": 0.5}) == []
    assert len(harness.read_rows("ablation")) == len(RUNS)


def rows_of(scores, batch=64):
    """CSV rows from change -> seed -> kNN accuracy."""
    return [
        {key: str(value) for key, value in SETTING.columns(Run(seed, batch, change)).items()}
        | {"batch": str(batch), "knn_top1": str(score), "linear_top1": str(1 - score)}
        for change, own in scores.items()
        for seed, score in own.items()
    ]


SCORES = {BASE: {0: 0.5, 1: 0.6, 2: 0.4}, "gray 0.1": {0: 0.52, 1: 0.63, 2: 0.41, 3: 0.9}, "queue of 1024": {1: 0.59}}


@pytest.fixture
def rows(monkeypatch):
    """Rows of three changes at batch 64, of two at batch 32, and of one whose base is missing."""
    monkeypatch.setattr(ablation.Setting, "config", lambda *_: ablation.PRETRAIN["textures"]())
    monkeypatch.setattr(ablation, "device_name", lambda device: "a CPU")
    others = {BASE: {0: 0.25}, "decoupled loss": {0: 0.25}}
    return [*rows_of(SCORES), *rows_of(others, 32), *rows_of({"gray 0.1": {0: 0.9}}, 16)]


def test_differences_are_paired_by_seed(rows):
    """Differences of 2, 3 and 1 points have the mean 2 and the standard deviation 1; accuracies vary by 10 points."""
    found = ablation.effects(rows, "knn_top1")
    assert set(found) == {*((change, 64) for change in SCORES), (BASE, 32), ("decoupled loss", 32)}
    assert found["gray 0.1", 64] == pytest.approx((3, 52.0, 2.0, 1 / math.sqrt(3)))
    assert found[BASE, 64] == pytest.approx((3, 50.0, 0.0, 0.0))
    alone = found["queue of 1024", 64]
    assert alone[:3] == pytest.approx((1, 59.0, -1.0)) and math.isnan(alone.error)
    assert [ablation.shown(found[name, 64]) for name in ("gray 0.1", "queue of 1024")] == ["+2.0 ± 0.6", "-1.0"]


def test_the_summary_shows_every_effect(rows, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "console", Console(width=120))
    ablation.show(rows)
    lines = [re.findall(r"[^│ ](?:[^│]*[^│ ])?", line) for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert lines == [
        [BASE, "32", "1", "25.0", "+0.0", "75.0", "+0.0"],
        ["decoupled loss", "32", "1", "25.0", "+0.0", "75.0", "+0.0"],
        [BASE, "64", "3", "50.0", "+0.0 ± 0.0", "50.0", "+0.0 ± 0.0"],
        ["queue of 1024", "64", "1", "59.0", "-1.0", "41.0", "+1.0"],
        ["gray 0.1", "64", "3", "52.0", "+2.0 ± 0.6", "48.0", "-2.0 ± 0.6"],
    ]


def test_the_table_is_filled_from_the_rows(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    document = tmp_path / "training.md"
    document.write_text("before\n\n<!-- ablation -->\n\nold\n\n<!-- /ablation -->\n\nafter\n")
    other = [{**row, "device": "a GPU"} for row in rows_of({BASE: {0: 0.75}})]
    monkeypatch.setattr(plot, "read_rows", lambda name: rows + other)
    for _ in range(2):  # filling it again changes nothing
        plot.fill_ablation_table()
        assert document.read_text() == (
            "before\n\n<!-- ablation -->\n\n"
            "textures, 64 training images, 3 epochs, resnet10t x 0.25, standard stem, a CPU; seeds: 1 to 3\n\n"
            "| change | batch 32 | batch 64 |\n| --- | --- | --- |\n| base: kNN, % | 25.0 | 50.0 |\n"
            "| decoupled loss | +0.0 |  |\n| queue of 1024 |  | -1.0 |\n| gray 0.1 |  | +2.0 ± 0.6 |\n\n"
            "textures, 64 training images, 3 epochs, resnet10t x 0.25, standard stem, a GPU; seeds: 1\n\n"
            "| change | batch 64 |\n| --- | --- |\n| base: kNN, % | 75.0 |\n\n"
            "<!-- /ablation -->\n\nafter\n"
        )


def test_the_committed_table_is_that_of_the_committed_rows(tmp_path, monkeypatch):
    page = (plot.DOCS / "training.md").read_text()
    monkeypatch.setattr(harness, "RESULTS", harness.ROOT / "bench" / "results")
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    (tmp_path / "training.md").write_text(page)
    assert "<!-- ablation -->" in page and plot.fill_ablation_table().read_text() == page


def test_options_that_fit_no_run_are_refused(data):
    with pytest.raises(UserError, match="no test split"):
        ablation.open_setting(str(data / "train"), 1)
    with pytest.raises(UserError, match="Batches of 65 exceed the 64 images"):
        ablation.measure(SETTING, [Run(0, 65, BASE)], 1)
    with pytest.raises(UserError, match="--epochs is 0"):
        ablation.measure(replace(SETTING, epochs=0), RUNS[:1], 1)


def test_the_command_line_trains_a_whole_seed_first(data, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    (tmp_path / "training.md").write_text("<!-- ablation -->\n<!-- /ablation -->")

    def measure(setting, runs, processes):
        asked.append((setting, runs, processes))
        ablation.write_rows("ablation", [setting.columns(run) | {"knn_top1": 0.5, "linear_top1": 0.5} for run in runs])
        return runs[:2]

    monkeypatch.setattr(ablation, "measure", measure)
    monkeypatch.setattr("sys.argv", ["ablation", "--data", str(data), "--epochs", "4", "--batches", "16", "32"])
    with pytest.raises(SystemExit, match="2 runs failed; the same command tries them again"):
        ablation.main()
    ((setting, runs, processes),) = asked
    assert (setting.data, setting.epochs, processes) == (str(data), 4, 2) and len(runs) == len(set(runs)) == 3 * 2 * 7
    assert [run.seed for run in runs] == [0] * 14 + [1] * 14 + [2] * 14 and runs[0] == Run(0, 16, BASE)
    assert capsys.readouterr().out.count("+0.0 ± 0.0") == 2 * 2 * 7
    assert (tmp_path / "training.md").read_text().count("+0.0 ± 0.0") == 2 * 6
    monkeypatch.setattr("sys.argv", ["ablation", "--data", str(data), "--processes", "0"])
    with pytest.raises(SystemExit, match="--processes is 0"):
        ablation.main()
