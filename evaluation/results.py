"""The file that evaluate.py writes: results as JSON, features in safetensors with a record as metadata, or a report."""

import json
import re
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError, safe_open

from .common import UserError


def prepare_out(out: Path) -> None:
    """Create the folder of a result, before anything is computed.

    Raises:
        UserError: the file cannot be written, or exists and is not an earlier result, or it is a URL.
    """
    if re.match(r"[a-z][a-z0-9+]+:/", str(out)):  # Path collapses the double slash
        raise UserError(f"{out} is a URL, but results are written to a local file; use another --out and copy it.")
    if out.exists() and not _is_result(out):
        raise UserError(f"{out} exists and is not a result of evaluate.py; use another --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}); use another --out.") from error


def _is_result(path: Path) -> bool:
    """Whether a file is empty, or was written by an evaluation or as a report, so that it may be replaced."""
    if not path.is_file() or path.stat().st_size == 0:
        return path.is_file()
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("record", "")
    except SafetensorError:
        text = path.read_text(errors="replace")
    if "StreamCLR report</title>" in text:
        return True
    try:
        record = json.loads(text)
    except ValueError:
        return False
    return isinstance(record, dict) and {"what", "encoder_sha256"} <= record.keys()
