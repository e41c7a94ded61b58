"""Rows of finished runs."""

import json

import pytest

from bench.preset import row_of
from common import UserError


@pytest.fixture
def run(tmp_path):
    config = {
        "preset": "p",
        "data": str(tmp_path / "set"),
        "batch_size": 1000,
        "epochs": 2,
        "seed": 3,
        "eval": {"k": 20},
        "optim": {"weight_decay": 0.01},
    }
    views = {"size": 32, "size_schedule": ["16:1"], "crop_area": [0.2, 1.0]}
    config |= {"views": views, "timm_name": "net", "timm_kwargs": {"width": 0.25}}
    summary = {"hardware": {"device": "CPU", "processes": 1, "CPU cores per process": 2}, "versions": {"torch": "2"}}
    summary |= {"precision": "bf16"}
    (tmp_path / "set" / "val").mkdir(parents=True)
    (tmp_path / "set" / "val" / "dataset.json").write_text('{"class_counts": [3, 4]}')
    rows = [
        {"step": 10, "step_ms": 6000.0},
        {"step": 15, "step_ms": 12000.0},  # rows may be of windows of different length
        {"step": 15, "epoch": 1, "knn_top1": 0.4},
        {"features": "raw pixels", "knn_top1": 0.1, "linear_top1": 0.1},
        {"features": "trained", "knn_top1": 0.5, "linear_top1": 0.6},
    ]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_time_is_that_of_all_steps(run):
    row = row_of(run)
    assert row["minutes"] == 2.0 and row["images"] == 15_000 and row["test_images"] == 7
    assert (row["images_per_s"], row["precision"], row["weight_decay"]) == (125, "bf16", 0.01)
    assert (row["knn_top1"], row["linear_top1"]) == (0.5, 0.6)
    assert row["size_schedule"] == "16:1" and row["data"] == "set" and row["encoder"] == 'net {"width": 0.25}'


def test_an_unfinished_run_is_refused(run):
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"is not the folder of a finished run with scores"):
        row_of(run)
