"""Validation on a GPU, dry on a CPU: what a part reports, what its checks notice, and what it needs."""

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import loss
import train
from bench import harness, trainers
from bench.gpu import __main__ as command
from bench.gpu import checks, correctness, files, loss_speed, step_speed, tables, views
from bench.gpu.checks import Case, Check, Measurement, Outcome, Report, Setup, run_part

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NOT_ON_A_GPU_BOX = {"tyro", "kornia", "webdataset", "nvidia", "lightly", "pytorch_metric_learning", "matplotlib"}


@pytest.fixture
def setup(tmp_path):
    return Setup(CPU, True, tmp_path / "scratch", tmp_path / "out")


def check(*results, name="example", seconds=60.0, **options):
    """A check whose cases yield `results`; a result that is an error is raised."""

    def run(result):
        if isinstance(result, Exception):
            raise result
        yield result

    def cases(setup):
        return [Case(f"case {number}", partial(run, result)) for number, result in enumerate(results)]

    cases.__name__ = name
    return Check(cases, seconds, **options)


def rows_of(folder: Path, name: str) -> list[dict]:
    with (folder / f"gpu_{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_outcomes_pass_up_to_their_limit():
    assert Outcome("", 1.0, 1.0).passed and Outcome("", -1, 0).passed
    assert not Outcome("", 1.1, 1.0).passed and not Outcome("", float("nan"), float("inf")).passed


def test_a_part_reports_every_check(setup, capsys):
    given = [
        check(Outcome("error", 1, 2), Outcome("error", 3, 2), Measurement("speed", {"ms": 4}), checks.Skipped("why")),
        check(ValueError("broken\nsecond line"), Outcome("error", 0, 0), name="raises"),
        check(Outcome("error", 0, 0), name="lacks", needs=("json", "no_such_module")),
        check(name="without_cases"),
        check(Outcome("error", 0, 0), Outcome("error", 0, 0), name="slow", seconds=0.0),
        check(Outcome("error", 0, 0), name="last", seconds=0.0),
    ]
    assert not run_part(given, setup, Report("part", CPU, setup.out), 60)
    found = [(row["check"], row["case"], row["status"], row["note"]) for row in rows_of(setup.out, "checks")]
    assert found == [
        ("example", "case 0", "passed", ""),
        ("example", "case 1", "failed", ""),
        ("example", "case 3", "skipped", "why"),
        ("raises", "case 0", "failed", "ValueError: broken"),
        ("raises", "case 1", "passed", ""),
        ("lacks", "", "skipped", "no_such_module can't be imported"),
        ("without_cases", "", "skipped", "nothing to check with the packages that are installed"),
        ("slow", "", "not reached", "no time for 2 cases: case 0, case 1 ..."),
        ("last", "case 0", "passed", ""),
    ]
    (measured,) = rows_of(setup.out, "speed")
    assert measured["ms"] == "4" and measured["part"] == "part" and measured["torch"] == torch.__version__
    assert {"device", "triton", "timm", "cuda", "date"} <= measured.keys()
    printed = capsys.readouterr().out
    assert "FAIL  example: 1 passed, 1 failed" in printed and "failed: case 1, error 3, limit 2" in printed


def test_a_part_stops_when_its_time_is_up(setup):
    assert run_part([check(Outcome("error", 0, 0))], setup, Report("part", CPU, setup.out), 0)
    assert [row["note"] for row in rows_of(setup.out, "checks")] == ["the time of the part was up"]


def test_checks_share_the_time_of_a_part(setup, monkeypatch):
    """40 s for checks of 60 and 20 s: cases of the first start within 30 s, and of the last until the end."""
    now = [0.0]
    monkeypatch.setattr(checks.time, "monotonic", lambda: now[0])

    class Slow(Outcome):
        @property
        def passed(self):
            now[0] += 8
            return True

    given = [check(*[Slow("", 0, 0)] * 9, seconds=60), check(*[Slow("", 0, 0)] * 9, name="last", seconds=20)]
    run_part(given, setup, Report("part", CPU, setup.out), 40)
    found = [(row["check"], row["status"]) for row in rows_of(setup.out, "checks")]
    assert found.count(("example", "passed")) == 4 and found.count(("last", "passed")) == 1
    assert found.count(("example", "not reached")) == found.count(("last", "not reached")) == 1


def test_nothing_runs_after_the_device_failed(setup, monkeypatch):
    monkeypatch.setattr(checks, "_device_works", lambda device: False)
    given = [check(RuntimeError("illegal access"), Outcome("error", 0, 0)), check(Outcome("error", 0, 0), name="next")]
    assert not run_part(given, setup, Report("part", CPU, setup.out), 60)
    statuses = [(row["check"], row["status"], row["note"]) for row in rows_of(setup.out, "checks")]
    assert statuses[1:] == [("example", "not reached", "the device failed in case 0"),
                            ("next", "not reached", "the device failed")]  # fmt: skip


def test_rows_of_other_parts_are_kept(setup):
    for part, value in (("a", 1), ("b", 2), ("a", 3)):
        run_part([check(Outcome("error", value, 9))], setup, Report(part, CPU, setup.out), 60)
    assert [(row["part"], row["value"]) for row in rows_of(setup.out, "checks")] == [("b", "2"), ("a", "3")]
    run_part([check(Outcome("error", 4, 9), name="other")], setup, Report("a", CPU, setup.out), 60)
    assert [row["value"] for row in rows_of(setup.out, "checks")] == ["2", "3", "4"], "of checks that did not run, too"
    for name, value in (("one", 1), ("two", 2), ("one", 3)):
        run_part([check(Measurement("speed", {"ms": value}), name=name)], setup, Report("a", CPU, setup.out), 60)
    assert [(row["check"], row["ms"]) for row in rows_of(setup.out, "speed")] == [("two", "2"), ("one", "3")]


def test_rows_are_written_after_every_case(setup):
    seen = []

    def look():
        seen.append([row["case"] for row in rows_of(setup.out, "checks")])
        return []

    def cases(setup):
        yield checks.Case("first", lambda: [Outcome("error", 0, 0)])
        yield checks.Case("second", look)

    run_part([checks.Check(cases, 60)], setup, Report("part", CPU, setup.out), 60)
    assert seen == [["first"]]


@pytest.mark.parametrize(("value", "code"), [(0, 0), (1, 1)])
def test_exit_code(tmp_path, monkeypatch, value, code):
    monkeypatch.setattr(command, "MODULES", dict.fromkeys(command.PARTS, "correctness"))
    monkeypatch.setattr(correctness, "CHECKS", [check(Outcome("error", value, 0))])
    monkeypatch.setattr("os.environ", dict(os.environ))
    arguments = ["all", "--device", "cpu", "--small", "--out", str(tmp_path)]
    assert command.main(arguments) == code
    assert len(rows_of(tmp_path, "checks")) == 4
    assert ("1 | 0" if code == 0 else "0 | 1") in (tmp_path / "gpu_summary.md").read_text()
    with pytest.raises(SystemExit, match="no check 'nothing' in these parts; use example"):
        command.main([*arguments, "--only", "nothing"])


def test_a_dry_run_does_not_write_where_the_documents_read():
    with pytest.raises(SystemExit, match="use another --out"):
        command.main(["all", "--device", "cpu", "--out", str(harness.RESULTS)])


def test_no_gpu_is_an_error_and_not_a_pass():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match="finds no NVIDIA GPU"):
        command.main(["correctness"])


# ---- what it needs


PROGRAM = """
import sys

class Blocker:
    blocked = {blocked!r} | {{"cv2", "rich", "scipy"}}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, blocker := Blocker())
from bench.gpu.__main__ import main
arguments = ["all", "--device", "cpu", "--small", "--out", {out!r}]
failed = main([*arguments, "--only", "optimizers", "host_waits", "image_files", "step_speed", "dali_overlap"])

blocker.blocked = {blocked!r} | {{"scipy"}}  # OpenCV, Numba and rich may be there; training then needs nothing else
import train, finetune, distill, bench.trainers, bench.stages
sys.exit(failed)
"""


def test_packages_that_a_gpu_box_lacks_are_not_needed(tmp_path):
    program = PROGRAM.format(blocked=NOT_ON_A_GPU_BOX, out=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "pass  optimizers: 14 passed" in run.stdout and "skipped: cv2 can't be imported" in run.stdout
    assert {row["check"]: row["status"] for row in rows_of(tmp_path, "checks")} == {
        "optimizers": "passed",
        "host_waits": "skipped",
        "image_files": "skipped",
        "step_speed": "skipped",
        "dali_overlap": "skipped",
    }


# ---- what the checks notice


def test_loss_checks_in_the_interpreter(tmp_path):
    run = [sys.executable, "-W", "ignore", "-m", "bench.gpu", "correctness", "loss", "--device", "cpu", "--small"]
    only = ["loss_accuracy", "loss_speed", "tile_sweep"]
    run += ["--out", str(tmp_path), "--only", *only]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["check"] for row in rows_of(tmp_path, "checks")} == {*only} - {"loss_speed"}
    assert {row["status"] for row in rows_of(tmp_path, "checks")} == {"passed"}
    assert {row["kernel"] for row in rows_of(tmp_path, "tiles")} == {"lse_triangle", "lse_forward", "grad_matmul"}
    summary = (tmp_path / "gpu_summary.md").read_text()
    assert "| triton | forward | 32 | 32 | ieee |" in summary and summary.count("Not measured yet") == 4


def test_an_inaccurate_loss_fails(setup, monkeypatch):
    def inaccurate(z, temperature, impl, precision=None):
        return loss.nt_xent(z, temperature, impl="reference") * (1.001 if impl == "triton" else 1)

    monkeypatch.setattr(correctness, "nt_xent", inaccurate)
    for name in ("fp32", "fp16"):
        outcomes = list(correctness.compare_with_float64(setup, 66, 37, 0.1, name))
        assert [outcome.what for outcome in outcomes] == ["loss", "dL/dz", "dL/dtau"]
        assert not outcomes[0].passed and not outcomes[1 if name == "fp32" else 0].passed


def test_optimizers_that_step_on_an_infinite_gradient_fail(setup, monkeypatch):
    monkeypatch.setattr(correctness.NonFiniteGuard, "after_backward", lambda self, step: None)
    weights, skipped = correctness.compare_with_cpu(setup, "sgd", 0.9)
    assert not weights.passed and not skipped.passed


def test_image_files(setup):
    examples = files.example_files()
    assert examples["color"].startswith(examples["truncated at 50%"]) and len(examples) == 9
    outcomes = [list(case.run()) for case in files.image_files(setup)]
    assert len(outcomes) >= 3 and all(outcome.passed for found in outcomes for outcome in found)
    assert {len(found) for found in outcomes} == {1, 2}, "refused files have no views to compare"


def test_views_of_another_backend_must_be_alike(setup, monkeypatch):
    (found,) = ([*case.run()] for case in views.view_accuracy(setup) if case.name == "kornia, affine")
    assert len(found) == 3 and all(outcome.passed for outcome in found)
    monkeypatch.setattr("pipeline.augment.kornia.blur", lambda x, params, config: None)
    found = list(views.compare_views(setup, "kornia", "affine"))
    assert [outcome.passed for outcome in found] == [False, True, True]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_steps_are_timed_and_traced(setup, one_thread):
    cases = {case.name: case for case in step_speed.step_speed(setup)}
    assert list(cases)[:3] == [f"{next(iter(step_speed.SMALL_NETWORKS))}, {source}" for source in
                               ("views in memory", "opencv")] + ["profiler trace"]  # fmt: skip
    (measured,) = cases["ResNet-10 x 1/8, 32 px, views in memory"].run()
    row = measured.row
    assert row["batch"] == 8 and row["images_per_s"] == pytest.approx(
        8000 / row["step_ms"], rel=0.01, abs=0.06
    )  # rounded to 0.1
    parts = sum(row[f"{part}_ms"] for part in ("wait", "forward", "loss", "backward", "optimizer", "other"))
    assert parts == pytest.approx(row["step_ms"], rel=0.01) and row["runs"] == step_speed.TRACED_STEPS
    assert row["verdict"].startswith("Compute-bound")
    assert list(cases["ResNet-10 x 1/8, 32 px, CUDA graph"].run()) == [checks.Skipped("CUDA graphs need a GPU")]
    kernels = [result.row for result in cases["profiler trace"].run()]
    assert 0 < sum(kernel["share"] for kernel in kernels) <= 1 and "conv" in str(kernels)
    assert (setup.out / "gpu_trace.json.gz").stat().st_size > 10_000


def test_resident_images_are_timed_in_the_second_of_three_epochs(setup, monkeypatch, tmp_path):
    """Waits last as many seconds as tell epoch and step; the marks of an epoch's end come after a longer pause."""
    now, configs = [0.0], []

    def pretrain(config, instruments):
        configs.append(config)
        for epoch in range(config.epochs):

            def loader(epoch=epoch):
                for step in range(step_speed.epoch_steps(4)):
                    now[0] += 100 * epoch + step
                    yield step
                now[0] += 1000

            assert sum(1 for _ in instruments.batches(loader())) == 9

    monkeypatch.setattr(train, "pretrain", pretrain)
    monkeypatch.setattr(trainers.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(step_speed, "shards", lambda *_: tmp_path)
    (case,) = (case for case in step_speed.step_speed(setup) if case.name.endswith("32 px, opencv, resident"))
    (measured,) = case.run()
    assert measured.row["wait_ms"] == 1000 * (101 + 102 + 103) / 3 and measured.row["runs"] == 3
    (config,) = configs
    assert (config.epochs, config.loader.resident, config.loader.backend) == (3, "on", "opencv")


# ---- tables


def test_documents_show_the_committed_rows():
    for name in tables.DOCUMENTS:
        text = (ROOT / name).read_text()
        assert "<!-- gpu:" in text and tables.fill(text) == text, f"run python -m bench.gpu.tables for {name}"


def test_tables_are_filled_from_rows(tmp_path):
    text = "before <!-- gpu:step -->\nold\n<!-- /gpu:step --> after"
    assert "Not measured yet: no row of `python -m bench.gpu step`" in tables.fill(text, tmp_path)
    row = {"date": "2000-01-01", "device": "a GPU", "torch": "1", "triton": "2", "network": "net", "batch": "4"}
    row |= {"source": "opencv", "compiled": "True", "images_per_s": "5", "step_ms": "6", "peak_mb": "7"}
    row |= {"cuda_graph": "True"}
    harness.write_rows("gpu_step", [row | {"wait_share": "0.25", "verdict": "Data-bound: 25 %"}], tmp_path)
    filled = tables.fill(text, tmp_path)
    assert "Measured on 2000-01-01, a GPU, torch 1, Triton 2." in filled and "old" not in filled
    assert "| net | 4 | opencv, compiled, CUDA graph | 5 | 6 | 7 | 25.0% | Data-bound |" in filled
    assert tables.fill(filled, tmp_path) == filled and filled.startswith("before ") and filled.endswith(" after")


# ---- times on a GPU


def test_calls_on_a_gpu_are_timed_between_two_events(monkeypatch):
    """A turn is as many calls as fill it, and the host waits for its end only."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = log.count("call")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 4.0 * (other.at - self.at)  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    times = harness.interleave({"f": lambda: log.append("call")}, 0, torch.device("cuda"))
    assert times["f"] == [pytest.approx(0.004)] * 3
    turn = ["event", *["call"] * 5, "event", "wait"]  # 5 calls of 4 ms fill 20 ms
    assert log == ["call", "event", "call", "event", "wait", *3 * turn]


def test_rates_of_the_loss_count_the_pairs_of_each_pass(setup, monkeypatch):
    def one_microsecond(functions, seconds, device):
        return {name: [1e-6] * 3 for name in functions}

    monkeypatch.setattr(loss_speed, "interleave", one_microsecond)
    monkeypatch.setattr(loss_speed, "nt_xent", lambda z, t, impl, precision: loss.nt_xent(z, t, impl="reference"))
    monkeypatch.setattr(loss_speed, "on_triangle", lambda z, precision: True)
    found = {}
    for measurement in loss_speed.time_passes(setup, 256, 128, "ieee"):
        row = measurement.row
        found[row["implementation"], row["pass"]] = row["triangle"], row["tflop_per_s"]
    unit = 2 * 256 * 256 * 128 / 1e-6 / 1e12  # a product of all pairs
    assert found == {
        ("triton", "forward"): (True, pytest.approx(unit / 2, abs=0.01)),
        ("triton", "backward"): (False, pytest.approx(2 * unit, abs=0.01)),
        ("triton_square", "forward"): (False, pytest.approx(unit, abs=0.01)),
        ("dense", "forward"): (False, pytest.approx(unit, abs=0.01)),
        ("dense", "backward"): (False, pytest.approx(2 * unit, abs=0.01)),
    }
