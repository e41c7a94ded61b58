"""Time a training loop waits for data if its step is slower than the pipeline alone: `python -m bench.waiting`.

The loader prepares batches of the built-in textures on the host, while sleeping stands in for a step on an accelerator
and takes a multiple of the time of a batch. Writes bench/results/waiting.csv.
"""

import argparse
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import environment, write_rows
from engine.metrics import StepTimer
from pipeline.augment.config import AugmentConfig
from pipeline.convert.textures import ensure_textures
from pipeline.loader import LoaderConfig, ViewLoader
from pipeline.shards.dataset import open_shards

BATCH, WARM, STEPS, SIZE = 64, 4, 120, 96
STEP_TIMES = (0.8, 1.0, 1.2, 1.5)
"""Step times, as multiples of the time that a batch takes alone."""
CPU = torch.device("cpu")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ensure_textures(Path(folder))
        loader = ViewLoader(
            open_shards(f"{folder}/train"),
            AugmentConfig(size=SIZE),
            LoaderConfig(workers=torch.get_num_threads(), resident="off"),
            batch_size=BATCH,
            seed=0,
            device=CPU,
        )

        def batches():
            while True:
                yield from loader

        stream = batches()
        for times in STEP_TIMES:
            alone_s = batch_seconds(stream)
            timer = StepTimer()
            for _ in timer.watch(islice(stream, WARM)):
                time.sleep(times * alone_s)
            timer.pause()
            for _ in timer.watch(islice(stream, STEPS)):
                time.sleep(times * alone_s)
            metrics = timer.window(BATCH)
            rows.append(
                environment(CPU)
                | {"batch": BATCH, "size": SIZE, "steps": STEPS, "alone_ms": round(1000 * alone_s, 3)}
                | {"step_over_alone": times, "data_wait_ms": round(metrics["data_wait_ms"], 3)}
                | {"waiting": round(metrics["data_wait_ms"] / metrics["step_ms"], 4)}
            )
        loader.close()
    table = Table("step / batch alone", "batch alone, ms", "waiting for data")
    for row in rows:
        table.add_row(str(row["step_over_alone"]), f"{row['alone_ms']:.1f}", f"{row['waiting']:.1%}")
    Console().print(table)
    Console().print(f"written: {write_rows('waiting', rows)}")


def batch_seconds(stream) -> float:
    """Mean time of a batch if the consumer does nothing else."""
    seconds = []
    for _ in range(STEPS // 2):
        started = time.perf_counter()
        next(stream)
        seconds.append(time.perf_counter() - started)
    return statistics.mean(seconds[WARM:])


if __name__ == "__main__":
    main()
