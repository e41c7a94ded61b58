"""Benchmark of the demonstration: `accelerate launch train.py` on newly rendered textures.

python -m bench.demo          write bench/results/demo.csv
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from bench.harness import environment, launch, write_rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wall_s, metrics = launch("train.py", folder=Path(folder), out="run")
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = environment(device) | {
        "steps": metrics[-1]["step"],
        "wall_s": round(wall_s, 1),
        "images_per_s": round(summary["images_per_s"]),
        "data_wait_share": round(summary["data_wait_share"], 4),
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
