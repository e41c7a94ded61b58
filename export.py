"""Take a trained encoder elsewhere.

    python export.py RUN encoder.safetensors                        plain weights for timm
    python export.py RUN resnet50.safetensors --format torchvision  weights for torchvision.models.resnet50
    python export.py RUN my-encoder --format huggingface            a folder for timm and the Hugging Face hub

RUN is a run folder of train.py, or an encoder.safetensors itself.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import timm
import torch
import torchvision
import tyro
from torch import Tensor, nn

from common import UserError, replacing, save_tensors
from model import load_encoder, read_spec

TORCHVISION = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
TORCHVISION += ["wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
"""Encoders that timm and torchvision build alike, under the same name and with the same names of weights."""
RECIPE = ("encoder", "head", "views", "loss", "optim")
"""Parts of a run's config.json that go onto the model card, after its plain options."""
NOT_RECIPE = ("data", "out", "resume", "log_every", "teacher", "timm_name", "timm_kwargs")


@dataclass(frozen=True)
class Export:
    """Take a trained encoder elsewhere."""

    source: tyro.conf.Positional[Path]
    """Run folder, or its encoder.safetensors."""
    out: tyro.conf.Positional[Path]
    """New .safetensors file, for huggingface a new folder."""
    format: Literal["timm", "torchvision", "huggingface"] = "timm"
    """timm and torchvision: a state dict. huggingface: a folder with config.json, weights and model card."""


def export(options: Export) -> None:
    """Write what is asked for, whole or not at all.

    Raises:
        UserError: the source holds no encoder, `out` is taken, or the format can't hold this encoder.
    """
    file = options.source / "encoder.safetensors" if options.source.is_dir() else options.source
    spec, encoder = read_spec(file), load_encoder(file)
    out, run = Path(os.path.abspath(options.out)), file.parent  # "." and ".." have no name of their own
    if out == Path.cwd():  # which a rename would pull away from under the shell
        raise UserError(f"{options.out} is the current folder: use another place.")
    if out.exists() and not (options.format == "huggingface" and out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another place or delete it.")
    if options.format == "huggingface":
        config = run_config(run)
        record = huggingface_config(encoder, spec, config)
        card = model_card(out.name, spec, config, run_scores(run), evaluations(run, file))
        with replacing(out) as folder:
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
            (folder / "README.md").write_text(card, encoding="utf-8")
            save_tensors(encoder.state_dict(), folder / "model.safetensors", {"format": "pt"})
        return
    if out.suffix != ".safetensors":
        raise UserError(f"{out} would be a safetensors file: give it a name that ends in .safetensors.")
    if options.format == "timm":
        with replacing(out) as partial:
            shutil.copyfile(file, partial)
    else:
        state = torchvision_state(encoder, spec)
        with replacing(out) as partial:
            save_tensors(state, partial, {"torchvision_name": spec[0]})


def torchvision_state(encoder: nn.Module, spec: tuple[str, dict]) -> dict[str, Tensor]:
    """The encoder's weights for the model of the same name in `torchvision.models`, without its classifier `fc`.

    There `load_state_dict(state, strict=False)` misses `fc.weight` and `fc.bias` and nothing else.

    Raises:
        UserError: torchvision has no such model.
    """
    name, kwargs = spec
    if name not in TORCHVISION or kwargs != {"num_classes": 0}:
        raise UserError(
            f"torchvision has no model for {name} with {kwargs}: only {', '.join(TORCHVISION)} with the standard stem "
            "and width 1 fit, so give --format timm or huggingface."
        )
    state = encoder.state_dict()
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
    shapes = {key: tensor.shape for key, tensor in theirs.items() if not key.startswith("fc.")}
    if {key: tensor.shape for key, tensor in state.items()} != shapes:
        raise UserError(f"This torchvision's {name} differs from timm's: use another version or --format timm.")
    return state


def run_config(run: Path) -> dict[str, Any]:
    """The config.json of a run folder.

    Raises:
        UserError: it is missing, or doesn't say how images are prepared.
    """
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        size, mean, std = (config["views"][key] for key in ("size", "mean", "std"))
        if not (type(size) is int and size > 0):
            raise ValueError(f"views.size is {size}")
        if not (len(mean) == len(std) == 3 and all(map(math.isfinite, [*mean, *std])) and min(std) > 0):
            raise ValueError(f"views.mean is {mean} and views.std {std}")
        for part in (*RECIPE, "start", "labels"):
            if not isinstance(config.get(part, {}), dict):
                raise ValueError(f"{part} is {config[part]}")
        if not isinstance(config.get("data", ""), str):
            raise ValueError(f"data is {config['data']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run} has no config.json of a run, which says how images are prepared ({type(error).__name__}: {error}): "
            "use the run folder."
        ) from error
    return config


def huggingface_config(encoder: nn.Module, spec: tuple[str, dict], config: dict[str, Any]) -> dict[str, Any]:
    """The config.json with which `timm.create_model("local-dir:FOLDER", pretrained=True)` builds the encoder.

    Args:
        config: a run's config.json, which knows size and normalization of the views.
    """
    name, kwargs = spec
    size = config["views"]["size"]
    base = timm.get_pretrained_cfg(name.removeprefix("simclr_"))  # for facts of the architecture, not of its weights
    deep_stem = name.startswith("simclr_") and isinstance(encoder.conv1, nn.Sequential)
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": {key: value for key, value in kwargs.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": bool(base and base.fixed_input_size),
            "interpolation": "bicubic",
            "crop_pct": 1.0 if size <= 64 else 224 / 256,  # the window of `pipeline.augment.params.center_crop`
            "crop_mode": "center",
            "mean": config["views"]["mean"],
            "std": config["views"]["std"],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "conv1.0" if deep_stem else base and base.first_conv,
            "classifier": base and base.classifier,
        },
    }


def run_scores(run: Path) -> dict[str, dict[str, float]]:
    """The report in a run's metrics.jsonl, {"trained": {"knn_top1": 0.7, ...}, ...}; {} if none was made."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return {}
    reports = {}
    for line in lines:
        with suppress(ValueError):  # one damaged line says nothing about the others
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("features"), str):
                reports[row["features"]] = _figures(row)
    return reports


def evaluations(run: Path, encoder: Path) -> list[tuple[str, dict[str, float]]]:
    """What evaluate.py has left in the run folder: (name, {figure: value}) for every result in it.

    The name says which images were classified, if the file does, and whether the result is not converged. Results of
    another encoder than the one in that file, such as an earlier one, are left out; so is a file that is none of
    evaluate.py's. Of a file without "results", the figures at its top level are the result.
    """
    with open(encoder, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    found = []
    for path in sorted((run / "evaluation").glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if not isinstance(record, dict) or record.get("encoder_sha256", digest) != digest:
            continue
        results = record.get("results", [record])
        for result in results if isinstance(results, list) else []:
            if isinstance(result, dict) and (figures := _figures(result)):
                unsolved = "" if result.get("converged", True) else ", not converged"
                found.append((path.stem + _classified(record) + unsolved, figures))
    return found


def _classified(record: dict[str, Any]) -> str:
    """The images that an evaluation has classified, which need not be those of the run."""
    try:
        test = record["data"]["test"]
        return f" on {test['images']} images of {last_parts(test['root'], 2)}"
    except (KeyError, TypeError, AttributeError):
        return ""


def _figures(record: dict[str, Any]) -> dict[str, float]:
    """The numbers among a record's values, but for the step they were measured at."""
    numbers = {key: value for key, value in record.items() if type(value) in (int, float) and math.isfinite(value)}
    return {key: value for key, value in numbers.items() if key != "step"}


def model_card(
    title: str,
    spec: tuple[str, dict],
    config: dict[str, Any],
    scores: dict[str, dict[str, float]],
    further: list[tuple[str, dict[str, float]]],
) -> str:
    """Markdown with the hub's front matter: use, data, recipe and scores, and no figure that was not measured.

    Args:
        spec: of the encoder. config: a run's config.json. scores: `run_scores`. further: `evaluations`.
    """
    name, kwargs = spec
    size = config["views"]["size"]
    ours = (
        "import model  # StreamCLR's, which makes the architecture known to timm\n"
        if name.startswith("simclr_")
        else ""
    )
    place = json.dumps(f"local-dir:{title}", ensure_ascii=False)  # a string literal of Python as well
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in ("timm", "simclr", "self-supervised-learning")),
        "---",
        f"# {_escaped(title)}",
        "",
        f"An image encoder, `{name}` with `{kwargs}`, {trained_how(config)}, with "
        "StreamCLR. It maps images to representations; there is no classifier.",
        "",
        "```python",
        f"import timm\n{ours}",
        f"encoder = timm.create_model({place}, pretrained=True, num_classes=0).eval()",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))",
        f"h = encoder(transform(image).unsqueeze(0))  # (1, 3, {size}, {size}) -> (1, features)",
        "```",
        "",
        "## Data",
        "",
        data_sentence(config),
        "",
        "## AugmentConfig",
        "",
        "| option | value |",
        "|---|---|",
    ]
    for key, value in config.items():
        if not isinstance(value, dict) and key not in NOT_RECIPE:
            lines.append(f"| {key} | {_escaped(value)} |")
    begun = config.get("start", {}).get("run")  # whose encoder it is then, not the one of the options
    for part in (each for each in RECIPE if not (each == "encoder" and begun)):
        lines += [f"| {part}.{key} | {_escaped(value)} |" for key, value in config.get(part, {}).items()]
    lines += ["", "## Scores", ""]
    if scores:
        names = list(dict.fromkeys(key for figures in scores.values() for key in figures))
        lines += [f"{'Of classifiers' if 'labels' in config else 'On frozen features'}, at the end of the run.", ""]
        lines += ["| features | " + " | ".join(map(_escaped, names)) + " |", "|---" * (len(names) + 1) + "|"]
        for features, figures in scores.items():
            cells = [_text(figures[key]) if key in figures else "not measured" for key in names]
            lines.append(f"| {_escaped(features)} | " + " | ".join(cells) + " |")
    else:
        lines.append("kNN top-1: not measured. Linear top-1: not measured.")
    if further:
        lines += ["", "| evaluation | result |", "|---|---|"]
        for name, figures in further:
            result = ", ".join(f"{_escaped(key)} {_text(value)}" for key, value in figures.items())
            lines.append(f"| {_escaped(name)} | {result} |")
    return "\n".join(lines) + "\n"


def trained_how(config: dict[str, Any]) -> str:
    """What kind of run it comes from: only pretraining knows no labels."""
    if "teacher" in config:
        return "distilled from a fine-tuned teacher (arXiv 2006.10029)"
    if "labels" in config:
        begun = "a pretrained encoder" if config.get("start", {}).get("run") else "random weights"
        return f"trained with labels, from {begun}"
    return "trained without labels by SimCLR (arXiv 2002.05709)"


def data_sentence(config: dict[str, Any]) -> str:
    """What the encoder was trained on: the last part of its place, which may be private, and which labels were used."""
    if not config.get("data"):
        return "StreamCLR's built-in textures, which are drawn by a program."
    labels, name = config.get("labels"), last_parts(config["data"], 1).replace("`", "'")
    if labels is None:
        used = "without their labels"
    elif "teacher" in config and not config.get("labeled_share"):
        used = "with no other labels than those that the teacher learned from"
    elif labels.get("keys"):
        used = "with labels of those that a list names"
    else:
        used = f"with labels of a share of {labels['fraction']:g}" if labels.get("fraction", 1) < 1 else "with labels"
    return f"Images of the shards `{name}`, {used}."


def last_parts(place: str, count: int) -> str:
    """The last names of a path or URL, without what may be private: the rest of it, credentials and a query."""
    path = urlsplit(place).path if "://" in place else os.path.abspath(place)
    return "/".join([name for name in path.split("/") if name][-count:]) or "/"


def _escaped(text: Any) -> str:
    """Text for a line or table cell of Markdown, where it stands for itself: no markup, HTML, link or further cell."""
    return re.sub(r"[\\`*<>|]|(?<=\])\(", r"\\\g<0>", " ".join(str(text).split()))


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def main() -> None:
    try:
        options = tyro.cli(Export, prog="export.py")
        export(options)
        print(f"{options.format}: {options.out}")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
