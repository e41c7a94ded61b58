"""Record of a finished run: how long it trained, and how accurate it is.

python -m bench.preset RUN [RUN ...]     add a row for each run to bench/results/presets.csv
"""

import argparse
import datetime
import json
from itertools import pairwise
from pathlib import Path

from bench.harness import read_metrics, read_rows, write_rows
from common import UserError


def row_of(run: Path) -> dict:
    """Row of a run of train.py.

    "minutes" is the time of all training steps and checkpoints, added up over the parts of a run that was resumed;
    start and evaluations are not in it.

    Raises:
        UserError: it is not the folder of a finished run with scores.
    """
    try:
        return _row(run)
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{run} is not the folder of a finished run with scores ({error!r}); use another.") from error


def _row(run: Path) -> dict:
    config, summary = (json.loads((run / name).read_text()) for name in ("config.json", "summary.json"))
    rows = read_metrics(run)
    scores = {row["features"]: row for row in rows if "features" in row}["trained"]
    steps = [row for row in rows if "step_ms" in row]
    train_s = sum((b["step"] - a["step"]) * b["step_ms"] for a, b in pairwise([{"step": 0}, *steps])) / 1000
    images = steps[-1]["step"] * config["batch_size"]
    return {
        "date": datetime.date.fromtimestamp((run / "summary.json").stat().st_mtime).isoformat(),
        "device": summary["hardware"]["device"],
        "processes": summary["hardware"]["processes"],
        "cores": summary["hardware"]["CPU cores per process"],
        "torch": summary["versions"]["torch"],
        "preset": config["preset"],
        "data": Path(config["data"]).name or "built-in",
        "encoder": f"{config['timm_name']} {json.dumps(config['timm_kwargs'])}",
        "epochs": config["epochs"],
        "size": config["views"]["size"],
        "size_schedule": " ".join(config["views"].get("size_schedule", [])),
        "crop_area": " ".join(map(str, config["views"]["crop_area"])),
        "weight_decay": config["optim"]["weight_decay"],
        "precision": summary["precision"],
        "seed": config["seed"],
        "minutes": round(train_s / 60, 1),
        "images": images,
        "images_per_s": round(images / train_s),
        "test_images": test_images(Path(config["data"])),
        "k": config["eval"]["k"],
        "knn_top1": round(scores["knn_top1"], 4),
        "linear_top1": round(scores["linear_top1"], 4),
    }


def test_images(data: Path) -> int | str:
    """Number of test images in a local folder of shards, which has them in test/ or else in val/; "" elsewhere."""
    manifests = [manifest for split in ("test", "val") if (manifest := data / split / "dataset.json").exists()]
    return sum(json.loads(manifests[0].read_text())["class_counts"]) if manifests else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs of train.py")
    try:
        rows = read_rows("presets") + [row_of(run) for run in parser.parse_args().runs]
    except UserError as error:
        parser.error(str(error))
    print(write_rows("presets", rows))


if __name__ == "__main__":
    main()
