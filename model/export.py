"""Export of a trained encoder to timm, torchvision and the Hugging Face Hub."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from .common import UserError, replacing, save_tensors
from .encoder import PREFIX, EncoderSpec, load_encoder, read_spec
from .model_card import model_card, read_run_config

TORCHVISION = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
TORCHVISION += ["wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
"""Architectures with the same name, structure and weight names in timm and in torchvision."""


def export_encoder(source: Path, out: Path, format: Literal["timm", "torchvision", "huggingface"]) -> EncoderSpec:
    """Write an encoder in a form that other libraries load; `out` is written completely or not at all.

    Args:
        source: run folder, or its encoder.safetensors.
        out: a new .safetensors file; for "huggingface" a new or empty folder.
        format: "timm" copies the weights, "torchvision" writes those that its model of the same name expects, and
            "huggingface" writes config.json, model.safetensors and a model card for `timm.create_model`.

    Returns:
        How timm builds the encoder.

    Raises:
        UserError: the source holds no encoder, `out` exists, or the format cannot hold this encoder.
    """
    file = source / "encoder.safetensors" if source.is_dir() else source
    spec, encoder = read_spec(file), load_encoder(file)
    path = Path(os.path.abspath(out))  # "." and ".." have no name of their own
    if path == Path.cwd():  # replacing it would leave the shell in a deleted folder
        raise UserError(f"{out} is the current folder; use another path.")
    if path.exists() and not (format == "huggingface" and path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} already exists; use another path or delete it.")
    if format == "huggingface":
        config = read_run_config(file.parent)
        record = huggingface_config(encoder, spec, config)
        card = model_card(path.name, spec, config, file)
        with replacing(path) as folder:
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
            (folder / "README.md").write_text(card, encoding="utf-8")
            save_tensors(encoder.state_dict(), folder / "model.safetensors", {"format": "pt"})
        return spec
    if path.suffix != ".safetensors":
        raise UserError(f"The output {path} is a safetensors file; use a name that ends in .safetensors.")
    state = torchvision_state(encoder, spec) if format == "torchvision" else None
    with replacing(path) as temporary:
        if state is None:
            shutil.copyfile(file, temporary)
        else:
            save_tensors(state, temporary, {"torchvision_name": spec.name})
    return spec


def torchvision_state(encoder: nn.Module, spec: EncoderSpec) -> dict[str, Tensor]:
    """State dict for the model of the same name in `torchvision.models`, without its classifier `fc`.

    Load it with `load_state_dict(state, strict=False)`; only `fc.weight` and `fc.bias` are then missing.

    Raises:
        UserError: torchvision has no such model.
    """
    import torchvision

    name, kwargs = spec
    if name not in TORCHVISION or kwargs != {"num_classes": 0}:
        raise UserError(
            f"torchvision has no model for {name} with {kwargs}, only for {', '.join(TORCHVISION)} with the standard "
            "stem and width 1; use --format timm or huggingface."
        )
    state = encoder.state_dict()
    with torch.device("meta"):
        expected = torchvision.models.get_model(name, weights=None).state_dict()
    shapes = {key: tensor.shape for key, tensor in expected.items() if not key.startswith("fc.")}
    if {key: tensor.shape for key, tensor in state.items()} != shapes:
        raise UserError(f"The {name} of the installed torchvision differs from timm's; use --format timm.")
    return state


def huggingface_config(encoder: nn.Module, spec: EncoderSpec, config: dict[str, Any]) -> dict[str, Any]:
    """Content of the config.json from which `timm.create_model("local-dir:FOLDER", pretrained=True)` builds an encoder.

    Args:
        encoder: the encoder itself.
        spec: how timm builds it.
        config: configuration of the run, which states size and normalization of the views.
    """
    name, kwargs = spec
    size = config["views"]["size"]
    base = timm.get_pretrained_cfg(name.removeprefix(PREFIX))  # describes the architecture, whatever its weights
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": {key: value for key, value in kwargs.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": [spec.channels, size, size],  # timm adapts the first convolution from it to other in_chans
            "fixed_input_size": bool(base and base.fixed_input_size),
            "interpolation": "bicubic",
            "crop_pct": 1.0 if size <= 64 else 224 / 256,  # as `pipeline.augment.params.center_crop`
            "crop_mode": "center",
            "mean": config["views"]["mean"],
            "std": config["views"]["std"],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": timm.models.get_model_traits(encoder)["first_conv"],
            "classifier": base and base.classifier,
        },
    }
