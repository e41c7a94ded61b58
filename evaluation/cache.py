"""Features on the disk, in a file named by what they were made from: embedding a training set takes far longer than
judging it, and one encoder is judged more than once.

A file is written aside and renamed, so that one of that name is whole, whichever process made it.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .common import UserError, save_tensors

FORMAT = "streamclr-features-1"
"""To be changed whenever these files hold something else."""
ABANDONED_AFTER_S = 24 * 3600


def feature_name(made_from: dict[str, Any]) -> str:
    """The file name of features: a SHA-256 of everything that decides them."""
    text = json.dumps({"format": FORMAT, **made_from}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest() + ".safetensors"


def load_features(path: Path) -> tuple[Tensor, Tensor] | None:
    """features (N, D) float32, mapped into memory instead of read, and their samples (N,) int64; None if not there.

    A file that is cut short or holds something else counts as not there, so it is replaced.
    """
    try:
        with safe_open(path, "pt") as file:
            features, index = file.get_tensor("features"), file.get_tensor("index")
    except (OSError, SafetensorError):
        return None
    fits = features.dim() == 2 and index.shape == features.shape[:1]
    return (features, index) if fits and (features.dtype, index.dtype) == (torch.float32, torch.int64) else None


def save_features(path: Path, parts: Iterable[tuple[Tensor, Tensor, Tensor]], made_from: dict[str, Any]) -> None:
    """Write what `evaluation.features.embed` yields, in a memory of one batch.

    Raises:
        UserError: a feature is not a finite number, there is none, or the disk is full; no file is left.
    """
    _delete_abandoned(path.parent)
    with TemporaryDirectory(dir=path.parent, prefix="unfinished-") as folder:
        rows, index, broken, width = Path(folder) / "rows", [], 0, 0
        for features, _, samples in parts:
            width = features.shape[1]
            broken += int((~features.isfinite().all(1)).sum())
            index.append(samples.cpu())
            with _disk_errors_explained(path.parent), rows.open("ab") as file:
                file.write(features.float().cpu().contiguous().numpy())
        if not (kept := sum(map(len, index))):
            raise UserError(
                "None of the images can be decoded: see what is wrong by `python -m pipeline.shards verify`."
            )
        if broken:
            raise UserError(
                f"{broken} of {kept} features hold values that are not finite numbers: the encoder has diverged, or "
                "needs --precision fp32."
            )
        # mapped, since a training set's features may exceed the memory
        features = torch.from_file(str(rows), shared=True, size=kept * width).view(kept, width)
        about = {"made_from": json.dumps(made_from)}
        with _disk_errors_explained(path.parent):
            save_tensors({"features": features, "index": torch.cat(index)}, Path(folder) / "whole", about)
            os.replace(Path(folder) / "whole", path)


@contextmanager
def _disk_errors_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Features can't be kept in {folder} ({error.strerror or error}): free some space, or set $STREAMCLR_CACHE "
            "(with --no-cache, $TMPDIR) to another folder."
        ) from error


def _delete_abandoned(folder: Path) -> None:
    """Delete what processes that were killed have left; a process that is still writing has changed its files since."""
    for left in folder.glob("unfinished-*"):
        with suppress(OSError):  # another process deletes it too, or it is another user's
            if max(path.stat().st_mtime for path in (left, *left.iterdir())) < time.time() - ABANDONED_AFTER_S:
                shutil.rmtree(left)
