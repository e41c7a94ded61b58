"""The encoder that is evaluated, and the images it expects."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common import UserError

VIEW_OPTIONS = ("size", "mean", "std", "crop_area", "crop_aspect")


@dataclass(frozen=True)
class EvalTarget:
    """An encoder file and the settings that belong to it."""

    encoder: Path  # the encoder.safetensors
    folder: Path  # run folder, or the folder of the encoder file
    views: dict[str, Any]  # options of the views: size, mean and std; for a run also how it crops
    data: str  # shards; "" for the built-in textures
    k: int  # number of neighbors in the run's own kNN evaluation
    pixels: dict[str, int] | None = None  # channels and bits of the run's images; None for an encoder file


def find_target(run: str, data: str = "", **views: Any) -> EvalTarget:
    """Find the encoder of a run folder, or an encoder file.

    Args:
        run: run folder or encoder.safetensors.
        data: shards; "" for those of the run.
        views: size, mean and std that override those of the run; None for no override.

    Raises:
        UserError: there is no encoder, its run is unfinished or damaged, or an encoder file is used without the
            settings that only a run folder provides.
    """
    path, views = Path(run), {name: value for name, value in views.items() if value is not None}
    if path.is_dir():
        return _of_run(path, data, views)
    if not path.exists():
        raise UserError(f"There is nothing at {path}; use a run folder or an encoder.safetensors.")
    settings = {"data": data, **views}
    if missing := [f"--{name}" for name in ("data", "size", "mean", "std") if not settings.get(name)]:
        raise UserError(
            f"{path} does not contain the settings of its images; set {' '.join(missing)} or use its run folder."
        )
    return EvalTarget(path, path.parent, views, data, k=20)


def _of_run(folder: Path, data: str, views: dict[str, Any]) -> EvalTarget:
    encoder = folder / "encoder.safetensors"
    if not encoder.exists():
        if (folder / "checkpoints").is_dir():
            raise UserError(
                f"The run in {folder} is not finished, it has checkpoints but no encoder.safetensors; resume it with "
                f"the same command and --out {folder}."
            )
        raise UserError(
            f"{folder} is not the folder of a finished run, it has no encoder.safetensors; use another folder."
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        found = {name: config["views"][name] for name in VIEW_OPTIONS}
        data = data or config["data"]
        if not data and config.get("preset") != "textures":
            raise KeyError("data")
        k, pixels = config.get("eval", {}).get("k", 20), config.get("pixels", {"channels": 3, "bits": 8})
        if not isinstance(data, str):
            raise ValueError(f"data is {data}")
        channels = pixels["channels"]
        for name, count in {"mean": channels, "std": channels, "crop_area": 2, "crop_aspect": 2}.items():
            found[name] = tuple(found[name])
            if len(found[name]) != count or not all(map(math.isfinite, found[name])):
                raise ValueError(f"views.{name} is {found[name]}")
        for name, number, smallest in (("views.size", found["size"], 8), ("eval.k", k, 1)):
            if not isinstance(number, int) or number < smallest:
                raise ValueError(f"{name} is {number}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}/config.json is missing or incomplete ({error}); use {encoder} with --data --size --mean --std "
            "instead."
        ) from error
    return EvalTarget(encoder, folder, found | views, data, k, pixels)
