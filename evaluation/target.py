"""Which encoder is judged, and how it wants its images."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common import UserError
from .options import Options

OF_A_RUN = ("size", "mean", "std", "crop_area", "crop_aspect")


@dataclass(frozen=True)
class EvalTarget:
    """An encoder file and what belongs to it."""

    encoder: Path
    folder: Path
    """Of the run, or that the file lies in."""
    views: dict[str, Any]
    """Arguments of a AugmentConfig: size, mean and std; of a run also how it crops."""
    data: str
    """Shards; empty for those that the built-in preset makes."""
    k: int
    """Neighbors of the run's own kNN evaluation."""


def find_target(options: Options) -> EvalTarget:
    """From the run folder, and from the options where they say something else.

    Raises:
        UserError: there is no encoder, or what an encoder by itself does not tell is missing.
    """
    place = Path(options.encoder)
    views = {name: value for name in ("size", "mean", "std") if (value := getattr(options, name)) is not None}
    if place.is_dir():
        return _of_a_run(place, views, options.data)
    if not place.exists():
        raise UserError(f"There is nothing at {place}: give a run folder or an encoder.safetensors.")
    given = {"data": options.data, **views}
    if missing := [f"--{name}" for name in ("data", "size", "mean", "std") if not given.get(name)]:
        raise UserError(
            f"{place} does not tell what its images are: give {' '.join(missing)} as well, or its run folder instead."
        )
    return EvalTarget(place, place.parent, views, options.data, k=20)


def _of_a_run(folder: Path, views: dict[str, Any], data: str) -> EvalTarget:
    encoder = folder / "encoder.safetensors"
    if not encoder.exists():
        if (folder / "checkpoints").is_dir():
            raise UserError(
                f"The run in {folder} is not finished, it has checkpoints but no encoder.safetensors: let train.py go "
                f"on with it (--out {folder})."
            )
        raise UserError(f"{folder} is not the folder of a finished run, for it has no encoder.safetensors: give one.")
    try:
        config = json.loads((folder / "config.json").read_text())
        found = {name: config["views"][name] for name in OF_A_RUN}
        data = data or config["data"]
        if not data and config.get("preset") != "textures":
            raise KeyError("data")
        k = config.get("eval", {}).get("k", 20)
        if not isinstance(data, str):
            raise ValueError(f"data is {data}")
        for name, count in {"mean": 3, "std": 3, "crop_area": 2, "crop_aspect": 2}.items():
            if len(found[name]) != count or not all(map(math.isfinite, found[name])):
                raise ValueError(f"views.{name} is {found[name]}")
        for name, number, least in (("views.size", found["size"], 8), ("eval.k", k, 1)):
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{name} is {number}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}/config.json is missing or lacks something ({error}): give {encoder} with --data --size --mean "
            "--std instead."
        ) from error
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return EvalTarget(encoder, folder, tuples | views, data, k)
