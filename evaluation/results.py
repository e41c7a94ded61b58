"""Files that evaluate.py writes: JSON results, and features in safetensors."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .common import UserError, replacing, save_tensors
from .store import SplitFeatures


def prepare_out(out: Path) -> None:
    """Create the folder of a result, before anything is computed.

    Raises:
        UserError: the file cannot be written, or exists and is not an earlier result.
    """
    if out.exists() and not _is_result(out):
        raise UserError(f"{out} exists and is not a result of evaluate.py; use another --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}); use another --out.") from error
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out} can't be written because {out.parent} is read-only; use another --out.")


def write_results(record: dict[str, Any], out: Path) -> None:
    """Write a record as JSON.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def write_features(splits: dict[str, SplitFeatures], record: dict[str, Any], out: Path) -> None:
    """Write <split>.features, <split>.label and <split>.index of every split, and the record as metadata.

    The features are mapped from one file to the other rather than held in memory.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    tensors = {}
    for name, found in splits.items():
        for part in ("features", "label", "index"):
            tensors[f"{name}.{part}"] = getattr(found, part)
    with replacing(out) as temporary:
        save_tensors(tensors, temporary, {"record": json.dumps(record)})


def _is_result(path: Path) -> bool:
    """Whether a file is empty or was written by an evaluation, so that it may be replaced."""
    if not path.is_file():
        return False
    if path.stat().st_size == 0:
        return True
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})["record"])
    except (SafetensorError, OSError, ValueError, KeyError):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            return False
    return isinstance(record, dict) and {"what", "encoder_sha256"} <= record.keys()
