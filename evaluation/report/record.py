"""What a finished run wrote into its folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common import UserError


@dataclass(frozen=True)
class RunRecord:
    """Files of a run folder, read and checked."""

    name: str
    """Name of the folder."""
    config: dict[str, Any]
    """config.json: every option, and the encoder's timm name and arguments."""
    rows: list[dict[str, Any]]
    """Metrics of the training steps; a value that was not finite is None."""
    validations: list[dict[str, Any]]
    """Scores during training, by step and epoch."""
    results: dict[str, dict[str, float]]
    """Scores of the final table, by kind of features."""
    summary: dict[str, Any]
    """summary.json: hardware, versions, speed and what limited it; empty for runs of version 0.2.0 and before."""
    bad_samples: list[dict[str, str]]
    """Unreadable images with shard, key and reason."""

    @property
    def stage(self) -> str:
        """Script that wrote the run: "pretrain", "distill" or "finetune"."""
        return "distill" if "teacher" in self.config else "finetune" if "labels" in self.config else "pretrain"


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a finished run.

    Raises:
        UserError: the folder is not that of a run, the run is not finished, or a file is damaged.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run folder, it has no config.json; use the folder of a finished run.")
    if not (folder / "encoder.safetensors").is_file():
        raise UserError(
            f"The run in {folder} is not finished, it has no encoder.safetensors; resume it with the same command and "
            f"--out {folder}."
        )
    config = _read(folder / "config.json")
    rows = _read_lines(folder / "metrics.jsonl")
    training = [row for row in rows if "loss" in row and "step" in row]
    if not isinstance(config, dict) or not isinstance(config.get("views"), dict) or not training:
        raise UserError(
            f"{folder} is incomplete or was written by another version, its config.json or metrics.jsonl lacks what a "
            "report shows; train again with this version."
        )
    return RunRecord(
        name=folder.resolve().name,
        config=config,
        rows=training,
        validations=[row for row in rows if "loss" not in row and "features" not in row],
        results={row.pop("features"): row for row in rows if "features" in row},
        summary=_read(folder / "summary.json") if (folder / "summary.json").is_file() else {},
        bad_samples=_read_lines(folder / "bad_samples.jsonl") if (folder / "bad_samples.jsonl").is_file() else [],
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); restore it or train again.") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); restore it or delete the damaged line.") from error
    return [row for row in rows if isinstance(row, dict)]
