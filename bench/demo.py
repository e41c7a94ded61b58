"""Benchmark of the demonstration: `accelerate launch train.py` on newly rendered textures.

python -m bench.demo          write bench/results/demo.csv
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.harness import environment, write_rows

ROOT = Path(__file__).parents[1]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train.py"), "--out", "run"]
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        wall_s = time.perf_counter() - started
        metrics = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "loss" in row]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = environment(device) | {
        "steps": steps[-1]["step"],
        "wall_s": round(wall_s, 1),
        "images_per_s": round(sorted(row["images_per_s"] for row in steps)[len(steps) // 2]),
        "data_wait_share": round(sum(r["data_wait_ms"] for r in steps) / sum(r["step_ms"] for r in steps), 4),
    }
    rows = [
        run | {"features": row["features"], **{name: round(row[name], 4) for name in ("knn_top1", "linear_top1")}}
        for row in metrics
        if "features" in row
    ]
    path = write_rows("demo", rows)
    print(f"{wall_s:.0f} s in total; {path}")


if __name__ == "__main__":
    main()
