import numpy as np
import pytest

from evaluation.report.charts import POINTS, confusion_matrix, curves
from evaluation.report.page import RunPictures, most_confused, option_rows, score_rows
from evaluation.report.record import RunRecord


def record(name="one", rows=None, **changes):
    rows = rows or [{"step": step, "epoch": 1 + step // 6, "loss": 5.0 - step / 10} for step in (5, 10)]
    fields = {"config": {}, "validations": [], "results": {}, "summary": {}, "bad_samples": []} | changes
    return RunRecord(name=name, rows=rows, **fields)


def values(plot):
    data = plot.renderers[0].data_source.data
    return list(data["epoch"]), list(data["value"])


def test_curves_are_over_epochs_and_leave_out_what_was_not_finite():
    rows = [
        {"step": 5, "epoch": 1, "loss": 5.0, "data_wait_ms": 10.0, "step_ms": 40.0},
        {"step": 10, "epoch": 1, "loss": None, "data_wait_ms": 20.0, "step_ms": 40.0},
        {"step": 20, "epoch": 2, "loss": 3.0, "data_wait_ms": 30.0, "step_ms": 40.0},
    ]
    figures = curves([record(rows=rows)])
    assert values(figures["Loss"]) == ([0.5, 2.0], [5.0, 3.0])
    assert values(figures["Share of the time waiting for data"]) == ([0.5, 1.0, 2.0], [0.25, 0.5, 0.75])
    assert "Learning rate" not in figures  # nothing was written


def test_a_long_curve_is_averaged():
    rows = [{"step": step, "epoch": -(-step // 100), "loss": float(step % 2)} for step in range(1, 20 * POINTS + 1)]
    epochs, losses = values(curves([record(rows=rows)])["Loss"])
    assert len(epochs) == POINTS and set(losses) == {0.5}


def test_scores_before_during_and_after_training_are_one_curve():
    validations = [{"step": 5, "epoch": 1, "knn_top1": 0.4}]
    results = {"raw pixels": {"step": 0, "knn_top1": 0.9}, "untrained": {"step": 0, "knn_top1": 0.2},
               "trained": {"step": 10, "knn_top1": 0.6}}  # fmt: skip
    plot = curves([record(validations=validations, results=results)])["kNN, top-1"]
    assert values(plot) == ([0.0, 1.0, 2.0], [0.2, 0.4, 0.6])


def test_runs_share_a_chart():
    plot = curves([record("one"), record("two")])["Loss"]
    assert [item.label.value for item in plot.legend[0].items] == ["one", "two"]


@pytest.mark.parametrize(("classes", "drawn"), [(3, True), (51, False)])
def test_a_confusion_matrix_shows_shares_of_the_true_class(classes, drawn):
    counts = np.arange(classes**2).reshape(classes, -1)
    plot = confusion_matrix(counts, [f"class {i}" for i in range(classes)])
    assert (plot is not None) == drawn
    if drawn:
        data = plot.renderers[0].data_source.data
        np.testing.assert_allclose(data["share"].reshape(3, 3).sum(1), 1)
        assert (data["true"][1], data["predicted"][1], data["count"][1]) == ("0: class 0", "1: class 1", 1)


def shown(confusion, classes):
    return RunPictures([], [], np.zeros((0, 2)), [], [], 1.0, 1, 1, np.array(confusion), classes, "a probe")


def test_the_most_frequent_confusions_leave_out_what_is_right():
    pairs = most_confused(shown([[8, 2, 0], [0, 9, 0], [3, 0, 1]], ["ant", "bee", "cat"]))
    assert pairs == [("cat", "ant", 3, 0.75), ("ant", "bee", 2, 0.2)]


def test_options_that_differ_come_first():
    one, two = ({"seed": 0, "optim": {"name": "lars", "lr": lr}} for lr in (0.1, 0.2))
    rows = option_rows([record("one", config=one), record("two", config=two)])
    assert rows[0] == ("optim.lr", ["0.1", "0.2"], True)
    assert [row[2] for row in rows] == [True, False, False]


def test_scores_have_only_the_columns_that_occur():
    table = score_rows([record(results={"finetune": {"step": 3, "top1": 0.5, "top5": 0.9}})])
    assert table == {"columns": ["top-1", "top-5"], "rows": [("one", "finetune", [0.5, 0.9])]}
