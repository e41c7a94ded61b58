"""Features on the disk, in a file named by what they were made from: embedding a training set takes far longer than
judging it, and one encoder is judged more than once.

A file is written aside and renamed, so that one of that name is whole, whichever process made it.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError

FORMAT = "streamclr-features-1"
"""To be changed whenever the same encoder and images would give other features."""


def feature_name(made_from: dict[str, Any]) -> str:
    """The file name of features: a SHA-256 of everything that decides them."""
    text = json.dumps({"format": FORMAT, **made_from}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest() + ".safetensors"


def load_features(path: Path) -> tuple[Tensor, Tensor] | None:
    """features (N, D) float32, mapped into memory instead of read, and their samples (N,) int64; None if not there."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("features"), file.get_tensor("index")
    except (OSError, SafetensorError):  # not there, or cut short: made anew
        return None


def save_features(
    path: Path, parts: Iterable[tuple[Tensor, Tensor, Tensor]], count: int, made_from: dict[str, Any]
) -> None:
    """Write what `evaluation.features.embed` yields for `count` samples, in a memory of one batch.

    Raises:
        UserError: a feature is not a finite number, or there is none; no file is left.
    """
    with TemporaryDirectory(dir=path.parent, prefix="unfinished-") as folder:
        rows, index, broken = None, [], 0
        for features, _, samples in parts:
            if rows is None:  # a file, mapped: a training set's features may exceed the memory
                size = count * features.shape[1]
                rows = torch.from_file(f"{folder}/rows", shared=True, size=size).view(count, -1)
            broken += int((~features.isfinite().all(1)).sum())
            begin = sum(map(len, index))
            rows[begin : begin + len(samples)] = features.cpu()
            index.append(samples.cpu())
        if not (kept := sum(map(len, index))):
            raise UserError(
                "None of the images can be decoded: see what is wrong by `python -m pipeline.shards verify`."
            )
        if broken:
            raise UserError(
                f"{broken} of {kept} features hold values that are not finite numbers: the encoder has diverged, or "
                "needs --precision fp32."
            )
        about = {"made_from": json.dumps(made_from)}
        save_file({"features": rows[:kept], "index": torch.cat(index)}, f"{folder}/whole", about)
        os.replace(f"{folder}/whole", path)
