"""Arithmetic of the benchmarks, on small shapes."""

import csv
import re
from itertools import count

import pytest
import torch

from bench import harness, loss_kernel, rates
from bench.implementations import dense
from loss import nt_xent

CPU = torch.device("cpu")


def test_functions_are_timed_in_turn():
    turns = []
    functions = {name: lambda name=name: turns.append(name) for name in "ab"}
    times = harness.interleave(functions, seconds=0.0, device=CPU)
    assert turns == ["a", "b"] * 4, "one warm-up round, three timed rounds"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_only_the_steady_state_of_a_stream_is_timed(monkeypatch):
    """The clock runs from the last skipped batch to the last timed one; start and end of the stream are outside."""
    now, closed = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def stream():
        now[0] += 100
        try:
            for number in count():
                now[0] += 10 if number < 2 else 1
                yield number
        finally:
            now[0] += 1000
            closed.append(number)

    steady = harness.SteadyState(stream, skipped=2, count=5, device=CPU)
    assert harness.interleave({"stream": steady}, seconds=0.0, device=CPU) == {"stream": [5.0] * 3}
    assert closed == [6] * 4, "closed after every turn, and no batch beyond the last one was taken"


def test_a_shuffled_function_has_every_predecessor(monkeypatch):
    monkeypatch.setattr(harness.time, "perf_counter", count().__next__)  # 7 readings per round
    turns = []
    functions = {name: lambda name=name: turns.append(name) for name in "abc"}
    times = harness.interleave(functions, seconds=7 * 30, device=CPU, shuffled=True)
    rounds = ["".join(turns[i : i + 3]) for i in range(3, len(turns), 3)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"} and len(set(rounds)) == 6
    assert {len(values) for values in times.values()} == {len(rounds)}


def test_percentiles():
    timing = harness.percentiles_ms([n / 1000 for n in range(1, 12)])
    assert timing == {"p20_ms": 3.0, "median_ms": 6.0, "p80_ms": 9.0, "runs": 11}


def test_csv_rows_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    path = harness.write_rows("timings", [{"a": 1, "b": 2.5}, {"a": 3, "c": "x"}])
    assert list(csv.reader(path.open())) == [["a", "b", "c"], ["1", "2.5", ""], ["3", "", "x"]]
    assert harness.read_rows("timings")[1] == {"a": "3", "b": "", "c": "x"}


def test_compared_implementations_agree():
    z = loss_kernel.projections(34, 16, torch.float64, CPU)
    assert torch.nn.functional.cosine_similarity(*z.chunk(2)).mean() > 0.9
    torch.testing.assert_close(dense(z, 0.1), nt_xent(z, 0.1, impl="reference"))


def test_a_row_describes_its_measurement(monkeypatch):
    monkeypatch.setattr(loss_kernel, "implementations", lambda device: {"dense": dense})
    (row,) = loss_kernel.measure(64, 16, "float32", CPU, seconds=0.0, memory=False)
    assert row["implementation"] == "dense" and (row["M"], row["D"]) == (64, 16)
    assert row["ratio_to_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"], rel=0.01, abs=0.01)
    assert row["pairs_per_s"] == pytest.approx(64 * 64 / row["median_ms"] * 1000, rel=0.01)
    assert float(row["gradient_error"]) < 1e-5
    assert row["torch"] == torch.__version__


def test_every_shape_is_compiled(monkeypatch):
    """Not only the first eight, after which torch runs a function uncompiled."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs[0]))
        return graph.forward

    def once(functions, seconds, device, shuffled=False):
        return {name: [1.0, 1.0] for name, function in functions.items() if [function()]}

    monkeypatch.setattr(loss_kernel, "interleave", once)
    monkeypatch.setattr(
        loss_kernel,
        "implementations",
        lambda device: {"dense compiled": torch.compile(dense, dynamic=False, backend=backend)},
    )
    monkeypatch.setattr(loss_kernel, "matrix_product", lambda dtype, device: rates.Work(lambda: True, 1))
    monkeypatch.setattr(loss_kernel, "exponentials", lambda device: rates.Work(lambda: True, 1))
    shapes = range(8, 8 + 2 * 10, 2)
    for m in shapes:
        loss_kernel.measure(m, 4, "float32", CPU, seconds=0.0, memory=False)
    assert set(compiled) == set(shapes)


def test_exponentials_stay_in_registers():
    """The measured loop holds nothing but exponentials: no load, store or scaling that would take longer."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.exp_kernel import exp2_kernel

    signature = {"out_ptr": "*fp32", "repeats": "i32", "BLOCK": "constexpr"}
    source = ASTSource(exp2_kernel, signature, {"BLOCK": 1024}, {(0,): [["tt.divisibility", 16]]})
    ptx = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4}).asm["ptx"]
    (loop,) = re.findall(r"Inner Loop Header.*?bra", ptx, flags=re.DOTALL)
    assert loop.count("ex2.approx.ftz.f32") == 1024 // 128
    assert "ld." not in loop and "st." not in loop and "mul" not in loop


@pytest.mark.parametrize("options", [["--rows", "777"], ["--quick", "--rows", "1024"]])
def test_unknown_rows_are_refused(monkeypatch, capsys, options):
    monkeypatch.setattr("sys.argv", ["loss_kernel.py", *options])
    with pytest.raises(SystemExit) as ended:
        loss_kernel.main()
    assert ended.value.code == 2 and "argument --rows" in capsys.readouterr().err


def test_memory_is_measured_in_a_separate_process():
    extra = loss_kernel.peak_extra_mb("dense", 2048, 16, "float32", CPU)
    assert extra > 2 * 2048 * 2048 * 4 / 1e6, "at least the similarities and their gradient"
