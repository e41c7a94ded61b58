"""Feature files, named by a checksum of everything that determines the features.

Embedding a training set takes far longer than evaluating it, and an encoder is usually evaluated more than once. Files
are replaced atomically, so a file of the expected name is complete, whichever process wrote it.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .common import PIPELINE, UserError, replacing, save_tensors

FORMAT = "streamclr-features-1"
"""Must change whenever the content of these files changes."""
ABANDONED_AFTER_S = 24 * 3600


def feature_name(made_from: dict[str, Any]) -> str:
    """File name of features: a SHA-256 of everything that determines them."""
    text = json.dumps({"format": FORMAT, **made_from}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest() + ".safetensors"


def code_checksum(*packages: ModuleType) -> str:
    """SHA-256 of the source files of packages."""
    files = sorted(path for package in packages for path in Path(package.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@contextmanager
def feature_folder(folder: Path | None) -> Iterator[Path]:
    """Create the folder of feature files; None for a temporary one, deleted at the end of the block.

    Raises:
        UserError: the folder cannot be created.
    """
    if folder is None:
        with TemporaryDirectory(prefix="streamclr-features-") as temporary:
            yield Path(temporary)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} can't store features ({error}); set $STREAMCLR_CACHE to a writable folder or use --no-cache."
        ) from error
    yield folder


def load_features(path: Path) -> tuple[Tensor, Tensor] | None:
    """Load a feature file; None if it is missing, truncated or of another format.

    Returns:
        Features (N, D) float32, mapped into memory rather than read, and their samples (N,) int64.
    """
    try:
        with safe_open(path, "pt") as file:
            features, index = file.get_tensor("features"), file.get_tensor("index")
    except (OSError, SafetensorError):
        return None
    fits = features.dim() == 2 and index.shape == features.shape[:1]
    return (features, index) if fits and (features.dtype, index.dtype) == (torch.float32, torch.int64) else None


def save_features(path: Path, parts: Iterable[tuple[Tensor, Tensor, Tensor]], made_from: dict[str, Any]) -> None:
    """Write a feature file, holding one batch in memory at a time.

    Args:
        path: file to write; its folder must exist.
        parts: batches from `evaluation.features.embed`.
        made_from: everything that determines the features; written to the metadata.

    Raises:
        UserError: a feature is not finite, there are no features, or the disk is full; no file is left.
    """
    _delete_abandoned(path.parent)
    index, non_finite, width = [], 0, 0
    with replacing(path) as temporary:
        rows = temporary.with_suffix(".rows")
        with rows.open("wb") as file:
            for features, _, samples in parts:
                width = features.shape[1]
                non_finite += int((~features.isfinite().all(1)).sum())
                index.append(samples.cpu())
                file.write(features.float().cpu().contiguous().numpy())
        if not (count := sum(map(len, index))):
            raise UserError(f"No image can be decoded; check the shards with `python -m {PIPELINE}.shards verify`.")
        if non_finite:
            raise UserError(
                f"{non_finite} of {count} features are not finite, because the encoder has diverged or overflows; use "
                "--precision fp32 or another run."
            )
        # mapped into memory, since the features of a training set may exceed it
        features = torch.from_file(str(rows), shared=True, size=count * width).view(count, width)
        tensors = {"features": features, "index": torch.cat(index)}
        save_tensors(tensors, temporary, {"made_from": json.dumps(made_from)})


def _delete_abandoned(folder: Path) -> None:
    """Delete the temporary folders of killed processes; a running process has changed its files recently."""
    for left in folder.glob("*unfinished-*"):
        with suppress(OSError):  # another process is deleting it too, or it belongs to another user
            if max(path.stat().st_mtime for path in (left, *left.iterdir())) < time.time() - ABANDONED_AFTER_S:
                shutil.rmtree(left)
