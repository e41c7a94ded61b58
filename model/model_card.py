"""Model card of an exported encoder, written from its run folder: usage, data, training options and scores.

It states only scores that were measured, and nothing private: of paths and URLs only the last parts, without
credentials or queries.
"""

import json
import math
import os
import posixpath
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .common import UserError, file_sha256
from .encoder import EncoderSpec

PARTS = ("encoder", "head", "views", "loss", "optim")
"""Parts of a run's configuration whose options are listed in the card, after the options of the stage itself."""
OMITTED = ("data", "config", "out", "resume", "log_every", "teacher", "timm_name", "timm_kwargs")
OMITTED += ("dry_run", "report", "trackers", "max_skipped")
"""Entries of config.json that are private, stated elsewhere in the card, or without effect on the result."""


def read_run_config(run: Path) -> dict[str, Any]:
    """Read the config.json of a run folder.

    Raises:
        UserError: it is missing or damaged, or does not state size and normalization of the views.
    """
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        size, mean, std = (config["views"][key] for key in ("size", "mean", "std"))
        pixels = config.setdefault("pixels", {"channels": 3, "bits": 8})  # runs of older versions do not state it
        valid = type(size) is int and size > 0 and len(mean) == len(std) == pixels["channels"] and min(std) > 0
        valid = valid and pixels["bits"] in (8, 16)
        if not (valid and all(map(math.isfinite, [*mean, *std]))):
            raise ValueError(f"views.size {size}, mean {mean}, std {std}")
        for name, kind in {"data": str, **dict.fromkeys((*PARTS, "start", "labels"), dict)}.items():
            if not isinstance(config.get(name, kind()), kind):
                raise ValueError(f"{name} is {config[name]}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run} has no valid config.json, which states how images are preprocessed ({type(error).__name__}: "
            f"{error}); use the folder of a run."
        ) from error
    return config


def model_card(title: str, spec: EncoderSpec, config: dict[str, Any], encoder_file: Path) -> str:
    """Markdown with the front matter of the Hugging Face Hub.

    Args:
        title: name of the model, and of the folder that it is loaded from.
        spec: how timm builds the encoder.
        config: `read_run_config` of the run.
        encoder_file: exported encoder.safetensors, in the run folder.
    """
    name, kwargs = spec
    run = encoder_file.parent
    options = "\n".join(f"| {key} | {_escape(value)} |" for key, value in _options(config).items())
    scores = _score_tables(final_scores(run), evaluation_scores(run, encoder_file), "labels" in config)
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- simclr
- self-supervised-learning
---
# {_escape(title)}

An image encoder, `{name}` with `{kwargs}`, {training_sentence(config)}, with StreamCLR.
It maps images to features; it has no classifier.

{_usage(title, spec, config)}

## Data

{data_sentence(config)}

## Training options

| option | value |
|---|---|
{options}

## Scores

{scores}
"""


def _usage(title: str, spec: EncoderSpec, config: dict[str, Any]) -> str:
    """Markdown with the code that loads the encoder and maps an image to features."""
    registration = f"import streamclr.model  # pip install streamclr: it registers {spec.name} with timm\n"
    place = json.dumps(f"local-dir:{title}", ensure_ascii=False)  # also a valid Python string literal
    size, (channels, bits) = config["views"]["size"], (config["pixels"][key] for key in ("channels", "bits"))
    load = f"""import timm
{registration if spec.needs_streamclr else ""}
encoder = timm.create_model({place}, pretrained=True, num_classes=0).eval()"""
    if (channels, bits) == (3, 8):
        return f"""```python
{load}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
h = encoder(transform(image).unsqueeze(0))  # (1, 3, {size}, {size}) -> (1, features)
```"""
    axis = {(1, 16): "None", (3, 16): "::-1"}.get((channels, bits))  # of a PNG; other formats are stored as arrays
    read = f"cv2.imread(FILE, cv2.IMREAD_UNCHANGED)[..., {axis}]" if axis else "np.load(FILE)"
    return f"""timm's transforms are for 8-bit RGB images, so this code prepares the image itself: `pixels`, an array of
shape (H, W, {channels}) and dtype uint{bits}, such as `{read}`.

```python
import torch
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize
{load}
config = encoder.pretrained_cfg
mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
x = torch.tensor(pixels.astype("float32") / {2**bits - 1}).permute(2, 0, 1)  # ({channels}, H, W) in 0..1
x = resize(x, [round({size} / config["crop_pct"])], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
h = encoder(((center_crop(x, [{size}]) - mean) / std).unsqueeze(0))  # (1, {channels}, {size}, {size}) -> (1, features)
```"""


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """Options to list in the card, by their names on the command line."""
    options = {key: value for key, value in config.items() if not isinstance(value, dict) and key not in OMITTED}
    pretrained = config.get("start", {}).get("run")  # such a run ignores its options of the encoder
    for part in PARTS:
        if not (part == "encoder" and pretrained):
            options |= {f"{part}.{key}": value for key, value in config.get(part, {}).items()}
    return options


def training_sentence(config: dict[str, Any]) -> str:
    """How the encoder was trained, told by the options that only one kind of run has."""
    if "teacher" in config:
        return "distilled from a fine-tuned teacher (arXiv 2006.10029)"
    if "labels" in config:
        start = "a pretrained encoder" if config.get("start", {}).get("run") else "random weights"
        return f"trained with labels, from {start}"
    return "trained without labels by SimCLR (arXiv 2002.05709)"


def data_sentence(config: dict[str, Any]) -> str:
    """What the encoder was trained on, and which labels were used."""
    if not config.get("data"):
        return "The built-in textures of StreamCLR, which are rendered by a program."
    labels, name = config.get("labels"), last_parts(config["data"], 1).replace("`", "'")
    labeled_share = config.get("labeled_share", config.get("labelled_share"))  # the second is its name in version 0.1.0
    if labels is None:
        used = "without their labels"
    elif "teacher" in config and not labeled_share:
        used = "with no labels other than those that the teacher learned from"
    elif labels.get("keys"):
        used = "with the labels of a listed subset"
    else:
        fraction = labels.get("fraction", 1)
        used = f"with {100 * fraction:g} % of their labels" if fraction < 1 else "with their labels"
    return f"Images of the shards `{name}`, {used}."


def last_parts(place: str, count: int) -> str:
    """Last `count` components of a path or URL, without credentials and query."""
    path = urlsplit(place).path if "://" in place else os.path.abspath(place)
    return "/".join([name for name in path.split("/") if name][-count:]) or "/"


def final_scores(run: Path) -> dict[str, dict[str, float]]:
    """Table at the end of a run's metrics.jsonl, such as {"trained": {"knn_top1": 0.7}}; {} if there is none."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return {}
    scores = {}
    for line in lines:
        with suppress(ValueError):  # a damaged line does not invalidate the others
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("features"), str):
                scores[row["features"]] = _numbers(row)
    return scores


def evaluation_scores(run: Path, encoder_file: Path) -> list[tuple[str, dict[str, float]]]:
    """Results of evaluate.py on this encoder, as pairs (name, scores).

    The name states which images were classified, which need not be those of the run, and whether the classifier did not
    converge. In a file without "results", the numbers at its top level are the result.
    """
    digest, found = file_sha256(encoder_file), []
    for path in sorted((run / "evaluation").glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if not isinstance(record, dict) or record.get("encoder_sha256", digest) != digest:
            continue
        name = path.stem
        with suppress(KeyError, TypeError, AttributeError):
            test = record["data"]["test"]
            root = test["root"]
            if record.get("source"):  # shards that were converted from images are in the cache, under another name
                root = f"{record['source'].rstrip('/')}/{posixpath.basename(root)}"
            name += f" on {test['images']} images of {last_parts(root, 2)}"
        results = record.get("results", [record])
        for result in results if isinstance(results, list) else []:
            if isinstance(result, dict) and (numbers := _numbers(result)):
                found.append((name if result.get("converged", True) else f"{name}, not converged", numbers))
    return found


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """Finite numbers among a record's values, except the step at which they were measured."""
    scores = {key: value for key, value in record.items() if key != "step" and type(value) in (int, float)}
    return {key: value for key, value in scores.items() if math.isfinite(value)}


def _score_tables(
    final: dict[str, dict[str, float]], evaluations: list[tuple[str, dict[str, float]]], classifier: bool
) -> str:
    """Markdown tables of the scores."""
    lines = [] if evaluations else ["kNN top-1: not measured. Linear top-1: not measured."]
    if final:
        names = list(dict.fromkeys(name for scores in final.values() for name in scores))
        lines = [f"Scores of {'classifiers' if classifier else 'frozen features'} at the end of the run.", ""]
        lines += ["| features | " + " | ".join(map(_escape, names)) + " |", "|---" * (len(names) + 1) + "|"]
        for features, scores in final.items():
            cells = [_format(scores[name]) if name in scores else "not measured" for name in names]
            lines.append(f"| {_escape(features)} | " + " | ".join(cells) + " |")
    if evaluations:
        lines += ["", "| evaluation | result |", "|---|---|"]
    for name, scores in evaluations:
        result = ", ".join(f"{_escape(key)} {_format(value)}" for key, value in scores.items())
        lines.append(f"| {_escape(name)} | {result} |")
    return "\n".join(lines)


def _escape(text: Any) -> str:
    """Text for a line or table cell of Markdown, without effect as markup, HTML, link or cell border."""
    return re.sub(r"[\\`*<>|]|(?<=\])\(", r"\\\g<0>", " ".join(str(text).split()))


def _format(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
