"""One pretraining of bench/ablation.py: `python -m bench.scored_run ARGUMENTS OUT`, both ARGUMENTS and result in JSON.

It computes on one thread. On networks this small, two runs next to each other take less time than one after the other
on two threads, and a result does not depend on the number of cores.
"""

import json
import os
import sys
from pathlib import Path

import train
from bench.harness import read_metrics
from presets import PRETRAIN, parse

ONLY_SCORES = ["--no-report", "--eval.knn-every", "0", "--no-eval.baselines", "--trackers", "none"]
"""Options of train.py that leave out everything but the training and its final evaluation."""


def scores(arguments: list[str], out: Path) -> dict[str, float]:
    """Train on one thread in the new folder `out`; returns `knn_top1` and `linear_top1` of the trained encoder.

    Args:
        arguments: command line of train.py, without --out.
        out: the run folder.

    Raises:
        RuntimeError: the run was stopped, or its images have no labels.
    """
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # as if every core had such a process
    train.pretrain(parse(PRETRAIN, [*arguments, *ONLY_SCORES, "--out", str(out)], prog="train.py"))
    for row in read_metrics(out):
        if row.get("features") == "trained":
            return {name: row[name] for name in ("knn_top1", "linear_top1")}
    raise RuntimeError(f"The run ended without an evaluation: train.py {' '.join(arguments)}")


if __name__ == "__main__":
    print(json.dumps(scores(json.loads(sys.argv[1]), Path(sys.argv[2]))))
