"""The folder of a run: which one, whether a run in it goes on, and what it holds from the beginning."""

import json
import os
from pathlib import Path
from typing import Any

from engine import checkpoint
from engine.metrics import MetricsFile
from errors import UserError


def run_folder(out: str, resume: str, default: str) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to go on from if there is one.

    Args:
        out: as given by the user; "" for the default, or for the folder of the run that `resume` names.
        resume: "auto" to go on with what `out` holds, "none" if it has to be new, else a run folder or a checkpoint.

    Raises:
        UserError: the folder holds something else than a run that can go on.
    """
    if resume not in ("auto", "none"):
        begun_at = checkpoint.find(Path(resume).resolve())
        own = begun_at.parents[1] if begun_at.parent.name == "checkpoints" else None
        if not out and own is None:
            raise UserError(f"{begun_at} lies in no run folder: give --out as well.")
        folder = Path(out or own)
        if _is_new(folder) or folder.resolve() == own:
            return folder, begun_at
        raise UserError(f"{folder} holds other files than the run that --resume names: choose another --out.")
    folder = Path(out or default)
    if _is_new(folder):
        return folder, None
    begun_at = checkpoint.Checkpoints(folder / "checkpoints", keep=1).latest()
    names = set(os.listdir(folder))
    hardly_begun = "config.json" in names <= {"config.json", "metrics.jsonl", "quarantine.jsonl", "checkpoints"}
    if resume == "none" or (begun_at is None and not hardly_begun):
        raise UserError(f"{folder} holds a run or other files already: choose another --out or delete it.")
    return folder, begun_at


def _is_new(folder: Path) -> bool:
    if folder.is_file():
        raise UserError(f"{folder} is a file: choose another --out.")
    return not (folder.is_dir() and any(folder.iterdir()))


def start_run(out: Path, record: dict[str, Any], step: int) -> MetricsFile:
    """Make the run folder with its config.json and open its metrics, those of an earlier part until `step`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    return MetricsFile(out / "metrics.jsonl", step)
