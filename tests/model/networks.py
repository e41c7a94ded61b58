"""Encoders and run folders that several tests build."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from config import PretrainConfig, StageConfig
from model import EncoderConfig, EncoderSpec, create_encoder, encoder_spec, save_encoder
from pipeline.augment.config import AugmentConfig
from pipeline.images.pixel_format import PixelFormat

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def spec(name: str, size: int, stem: str = "auto", **options) -> EncoderSpec:
    """Spec of an encoder for views of `size` pixels."""
    return encoder_spec(EncoderConfig(name, stem, **options), size)


def randomize_batchnorm(*modules: nn.Module) -> None:
    """Fill scales, shifts and running statistics as training does, so that none of them is 0 or 1."""
    for module in (layer for root in modules for layer in root.modules()):
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)


def write_run(
    folder: Path,
    spec: EncoderSpec,
    size: int,
    stage: type[StageConfig] = PretrainConfig,
    pixels: PixelFormat | None = None,
    **options,
):
    """Write config.json and encoder.safetensors of a run folder; returns the encoder in evaluation mode."""
    torch.manual_seed(0)
    encoder = create_encoder(spec)
    randomize_batchnorm(encoder)
    folder.mkdir()
    save_encoder(encoder, spec, folder / "encoder.safetensors")
    mean, std = (MEAN, STD) if pixels is None else (MEAN[:1] * pixels.channels, STD[:1] * pixels.channels)
    config = stage(views=AugmentConfig(size=size, mean=mean, std=std), **options)
    record = {**dataclasses.asdict(config), "timm_name": spec.name, "timm_kwargs": spec.kwargs}
    if pixels:  # older versions did not write it
        record["pixels"] = pixels._asdict()
    (folder / "config.json").write_text(json.dumps(record))
    return encoder.eval()


def write_small_run(folder: Path, **options) -> nn.Module:
    return write_run(folder, spec("resnet18", 32, width=0.125), 32, **options)
