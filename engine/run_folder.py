"""The run folder: which one, whether a run in it continues, and the files it holds from the start."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from . import checkpoint, run_lock
from .common import UNFINISHED, UserError, replacing
from .metrics import MetricsFile

BEFORE_FIRST_CHECKPOINT = {"config.json", "metrics.jsonl", "bad_samples.jsonl", "checkpoints", "diverged.json"}
TRACKER_FILES = {"tensorboard", "wandb", "mlflow", "trackers.json"}
"""Files of a run that was stopped or killed before its first checkpoint; it starts again from step 0."""


def run_folder(out: str, resume: str, default: str) -> tuple[Path, Path | None]:
    """Lock the run folder for this process, and decide how to start.

    Args:
        out: folder chosen by the user; "" for the default, or for the folder of the run that `resume` names.
        resume: "auto" to continue what `out` holds, "none" if it must be new, else a run folder or a checkpoint.

    Returns:
        The run folder, and the checkpoint to continue from if there is one.

    Raises:
        UserError: another process uses the folder, or it holds something else than a run that can continue.
    """
    if "://" in out:
        raise UserError(f"{out} is a URL, but a run folder is local; use a folder and copy it afterwards.")
    start = own = None
    if resume not in ("auto", "none"):
        start = checkpoint.find(Path(resume).resolve())
        own = start.parents[1] if start.parent.name == "checkpoints" else None
        if not out and own is None:
            raise UserError(f"{start} is not inside a run folder; set --out as well.")
        out = out or str(own)
    folder = Path(out or default)
    if folder.is_file():
        raise UserError(f"{folder} is a file; choose another --out.")
    run_lock.acquire(folder)
    try:
        if start is None:
            return folder, _latest(folder, resume)
        if not _files(folder) or folder.resolve() == own:
            return folder, start
        if _started_from(folder, resume):  # by the same command, which now continues what it began
            return folder, _latest(folder, "auto") or start
        raise UserError(f"{folder} holds other files than the run that --resume names; choose another --out.")
    except BaseException:
        run_lock.release(folder)
        raise


def _files(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name != run_lock.NAME and not name.startswith(UNFINISHED)}


def _started_from(folder: Path, resume: str) -> bool:
    try:
        return json.loads((folder / "config.json").read_text())["resume"] == resume
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _latest(folder: Path, resume: str) -> Path | None:
    """The newest checkpoint of the run in the folder; None for a run that starts."""
    names, latest = _files(folder), checkpoint.Checkpoints(folder / "checkpoints", keep=1).latest()
    starts = not names or "config.json" in names <= BEFORE_FIRST_CHECKPOINT | TRACKER_FILES
    if (names and resume == "none") or (latest is None and not starts):
        raise UserError(f"{folder} holds a run or other files already; choose another --out or delete it.")
    return latest


def start_run(out: Path, record: dict[str, Any], step: int) -> MetricsFile:
    """Write config.json into the run folder and open its metrics; rows and checkpoints after `step` are dropped.

    At step 0, what trackers recorded of an earlier attempt is deleted: that attempt may have had other options.
    """
    with replacing(out / "config.json") as path:  # the one of an earlier part must survive a full disk
        path.write_text(json.dumps(record, indent=2) + "\n")
    checkpoint.Checkpoints(out / "checkpoints", keep=1).discard_after(step)
    for path in (out / name for name in TRACKER_FILES if step == 0):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return MetricsFile(out / "metrics.jsonl", step)
