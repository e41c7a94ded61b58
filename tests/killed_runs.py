"""Kill train.py at random moments and resume it: `python tests/killed_runs.py KILLS FOLDER OPTIONS...`.

train.py is imported once and every run is a fork, which saves the seconds of the import. Prints one JSON object: the
number of kills, how many of them interrupted the writing of a checkpoint, and whether losses and weights of the killed
runs equal those of an uninterrupted run.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file

import train
from engine import checkpoint


def forked(arguments: list[str], kill_after_s: float | None = None, kill_in_save: bool = False) -> int:
    """Run train.py in a fork; returns its exit status, or the negative number of the signal that ended it."""
    process = os.fork()
    if process == 0:
        if kill_in_save:
            save_tensors = checkpoint.save_tensors

            def half_save(tensors, path, metadata):
                save_tensors(tensors, path, metadata)
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

            checkpoint.save_tensors = half_save
        log = os.open(os.environ["KILLED_RUNS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["train.py", *arguments]
        try:
            train.main()
            status = 0
        except SystemExit as exit_:
            print(exit_.code, file=sys.stderr)
            status = exit_.code if isinstance(exit_.code, int) else 1
        sys.stderr.flush()
        os._exit(status)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def losses(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "epoch", "loss", "lr", "probe_top1", "knn_top1", "linear_top1", "features")
    return [{name: row[name] for name in kept if name in row} for row in rows]


def main() -> None:
    kills, out, options = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    os.environ["KILLED_RUNS_LOG"] = str(out / "log.txt")
    rng = random.Random(0)
    started = time.monotonic()
    assert forked([*options, "--out", str(out / "whole")]) == 0
    whole_s = time.monotonic() - started
    done, in_save, runs = 0, 0, []
    while done < kills:
        runs.append(out / f"killed-{len(runs)}")
        while True:
            remaining = done < kills
            during_save = remaining and done % 3 == 1
            delay = rng.uniform(0, whole_s) if remaining and not during_save else None
            status = forked([*options, "--out", str(runs[-1])], delay, during_save)
            if status == 0:
                break
            assert status == -signal.SIGKILL, f"exit status {status}: see {out / 'log.txt'}"
            done += 1
            in_save += during_save
    # read only now: loading tensors may start threads, which do not survive a fork
    expected, encoder = losses(out / "whole"), load_file(out / "whole" / "encoder.safetensors")
    same = True
    for run in runs:
        weights = load_file(run / "encoder.safetensors")
        same &= expected == losses(run) and all(torch.equal(encoder[name], weights[name]) for name in encoder)
    print(json.dumps({"kills": done, "in_save": in_save, "runs": len(runs), "same": same}))


if __name__ == "__main__":
    main()
