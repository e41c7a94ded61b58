"""The demonstration with the command of the README. Takes minutes: `make soak`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1])
def test_demonstration_learns(tmp_path, seed):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train.py"), "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--seed", str(seed)], cwd=tmp_path, env=environment, check=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    knn = {row["features"]: row["knn_top1"] for row in rows if "features" in row}
    assert knn["raw pixels"] < 0.35 and knn["untrained"] < 0.45
    assert knn["trained"] >= 0.95
