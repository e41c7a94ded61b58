"""Encoders: timm's by name, plus the ResNets of SimCLR for small images and other widths.

A plain encoder is exactly `timm.create_model(name, num_classes=0)`. SimCLR's changes for small images (first
convolution 3x3 with stride 1, no max-pool: Chen et al. 2020, arXiv 2002.05709, appendix B.9) and its width multiplier
are timm models of their own, registered here as `simclr_resnet18` and so on: after `import model`,
`timm.create_model("simclr_resnet18", num_classes=0, small_stem=True, width=2.0)` makes one. With
`selective_kernels=True` it is an encoder of SimCLR v2 (arXiv 2006.10029, table 1).
"""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

import timm
import torch
from timm.models import load_pretrained, register_model, resolve_pretrained_cfg
from torch import nn

from .common import UserError, check_range
from .selective_kernels import SelectiveKernelBottleneck
from .weights import load_strictly, read_weights, reading_metadata, write_weights


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of the encoder."""

    name: str = "resnet50"
    """Name of any timm model."""
    stem: Literal["auto", "small", "standard"] = "auto"
    """Stem of a ResNet. small: 3x3, stride 1, no max-pool. standard: 7x7 (three 3x3 with selective kernels), stride 2,
    max-pool. auto: small for views of 64 px or less."""
    width: float = 1.0
    """Multiplier of all channel counts of a ResNet."""
    selective_kernels: bool = False
    """Use SimCLR v2's selective kernels, and with them ResNet-D's stem and shortcuts, in a ResNet of 50 layers or more."""

    def __post_init__(self) -> None:
        check_range("--encoder.width", self.width, 0.05, 32)


class EncoderSpec(NamedTuple):
    """How to build an encoder: `timm.create_model(name, **kwargs)`."""

    name: str
    kwargs: dict


SMALL_IMAGE = 64
"""Images of at most this side, in pixels, get the small stem."""
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BOTTLENECKS = RESNETS[2:]
"""Those whose blocks can have selective kernels."""


def _simclr_resnet(base: str, small_stem: bool, width: float, selective_kernels: bool, **kwargs) -> nn.Module:
    # even, since timm's deep stem below has twice half as many channels as the first block takes
    channels = [2 * max(1, round(planes * width / 2)) for planes in (64, 128, 256, 512)]
    if selective_kernels:  # and with them ResNet-D, as in the official code
        kwargs |= {"block": SelectiveKernelBottleneck, "avg_down": True}
    # timm fixes a plain stem at 64 channels but lets a deep one follow stem_width: build deep, then put the plain
    # convolution in its place, so that the first block sees the right number of channels
    encoder = timm.create_model(base, channels=channels, stem_type="deep", stem_width=channels[0] // 2, **kwargs)
    if small_stem or not selective_kernels:
        side, stride = (3, 1) if small_stem else (7, 2)
        inputs = kwargs.get("in_chans", 3)
        encoder.conv1 = nn.Conv2d(inputs, encoder.bn1.num_features, side, stride, padding=side // 2, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's own convolutions
    if small_stem:
        encoder.maxpool = nn.Identity()
    return encoder


def _register(base: str) -> None:
    name = f"simclr_{base}"

    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: dict | None = None,
        pretrained_cfg_overlay: dict | None = None,
        pretrained_model_args: dict | None = None,  # what timm read from an exported folder: among the others too
        cache_dir: str | None = None,
        small_stem: bool = False,
        width: float = 1.0,
        selective_kernels: bool = False,
        **kwargs,
    ) -> nn.Module:
        if selective_kernels and base not in BOTTLENECKS:
            raise ValueError(f"selective kernels are for {', '.join(BOTTLENECKS)}")
        exported = None
        if pretrained_cfg or pretrained_cfg_overlay:
            exported = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay).to_dict()
            kwargs.setdefault("num_classes", exported["num_classes"])
        if pretrained and not exported:
            raise ValueError("there are no pretrained weights for SimCLR's small-image and wide ResNets")
        encoder = _simclr_resnet(base, small_stem, width, selective_kernels, **kwargs)
        if exported:
            encoder.pretrained_cfg = encoder.default_cfg = exported
        if pretrained:
            load_pretrained(encoder, exported, encoder.num_classes, kwargs.get("in_chans", 3), cache_dir=cache_dir)
        return encoder

    entrypoint.__name__ = name
    entrypoint.__module__ = __name__
    register_model(entrypoint)


for _base in RESNETS:
    _register(_base)


def encoder_spec(config: EncoderConfig, image_size: int) -> EncoderSpec:
    """What to hand to `timm.create_model` for an encoder on views of `image_size` pixels.

    Args:
        name: any timm architecture; simclr_resnet* means the ResNet itself. image_size: side of a view in pixels.
        stem: of a ResNet: "small", "standard", or "auto" for the small one on images of 64 px or less.
        width: multiplies every channel count of a ResNet.
        selective_kernels: SimCLR v2's blocks in a ResNet of 50 layers or more, and with them ResNet-D's shortcuts and
            standard stem, three 3x3 convolutions for one 7x7.

    Returns:
        (timm name, keyword arguments).

    Raises:
        UserError: timm has no such model, the name contains a pretrained tag, or width, stem or selective kernels are
            not for it.
    """
    name, stem, width, selective_kernels = config.name, config.stem, config.width, config.selective_kernels
    base, dot, tag = name.partition(".")
    if dot and timm.is_model(base):
        raise UserError(f"{name} names the pretrained weights {tag!r}, but weights start random: use {base}.")
    if name in (f"simclr_{resnet}" for resnet in RESNETS):
        name = name.removeprefix("simclr_")  # the stem and the options below decide which of the two it becomes
    if not timm.is_model(name):
        names = timm.list_models(exclude_filters="simclr_*")
        longer = [longer for longer in names if name and longer.startswith(name)]  # vit_tiny
        close = sorted(longer, key=len)[:3] or get_close_matches(name, names, 3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UserError(f"timm has no encoder {name!r}{hint}: use one of `timm.list_models()`.")
    if selective_kernels and name not in BOTTLENECKS:
        raise UserError(
            f"{name} has no selective kernels, which are for {', '.join(BOTTLENECKS)}: choose one of them or give "
            "--encoder.no-selective-kernels."
        )
    kwargs: dict = {"num_classes": 0}
    if name in RESNETS:
        if stem == "small" or (stem == "auto" and image_size <= SMALL_IMAGE):
            kwargs["small_stem"] = True
        if width != 1:
            kwargs["width"] = width
        if selective_kernels:
            kwargs["selective_kernels"] = True
        return EncoderSpec(f"simclr_{name}" if len(kwargs) > 1 else name, kwargs)
    if width != 1 or stem == "small":
        raise UserError(
            f"{name} has neither a width multiplier nor SimCLR's small stem, which are for {', '.join(RESNETS)}: "
            "give --encoder.width 1 --encoder.stem auto (a preset may set others)."
        )
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:  # a ViT, whose position embeddings are for one image size
        kwargs["img_size"] = image_size
    return EncoderSpec(name, kwargs)


def create_encoder(spec: EncoderSpec) -> nn.Module:
    """Build the encoder of a spec: (N, 3, H, W) -> pooled representation h (N, features).

    Raises:
        UserError: timm cannot build it.
    """
    name, kwargs = spec
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # a thousand models, each failing in its own way
        raise UserError(
            f"timm can't build {name} with {kwargs} ({first_line(error)}): choose another encoder or size."
        ) from error


def feature_dim(encoder: nn.Module, image_size: int) -> int:
    """Width of h for views of `image_size` pixels, measured by encoding two black ones.

    timm's `num_features` is wrong for some models, which widen once more after pooling.

    Raises:
        UserError: the encoder can't take views of this size, or returns something else than one vector per view.
    """
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            h = encoder(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:  # a thousand models, each failing in its own way
        raise UserError(
            f"The encoder can't take views of {image_size} px ({first_line(error)}): change --views.size or "
            "--encoder.name."
        ) from error
    if not isinstance(h, torch.Tensor) or h.ndim != 2 or len(h) != 2:
        found = f"shape {tuple(h.shape)}" if isinstance(h, torch.Tensor) else type(h).__name__
        raise UserError(
            f"The encoder returns {found} for two views instead of one vector each: choose another --encoder.name."
        )
    encoder.train(training)
    return h.shape[1]


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none: an error of ours is one sentence."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def save_encoder(encoder: nn.Module, spec: EncoderSpec, path: Path) -> None:
    """Weights in safetensors, with the spec in the file's metadata; `timm.create_model(name, **kwargs)` loads them."""
    write_weights(encoder, {"timm_name": spec[0], "timm_kwargs": spec[1]}, path)


def load_encoder(path: Path) -> nn.Module:
    """The encoder that `save_encoder` wrote, on the CPU and in evaluation mode.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    metadata, state = read_weights(path, "timm_name")
    with reading_metadata(path):
        encoder = create_encoder(spec_in(metadata))
    return load_strictly(encoder, state, path)


def read_spec(path: Path) -> EncoderSpec:
    """The spec of the encoder that `save_encoder` wrote.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    with reading_metadata(path):
        return spec_in(read_weights(path, "timm_name")[0])


def spec_in(metadata: dict[str, str]) -> EncoderSpec:
    """The spec in a file's metadata.

    Raises:
        ValueError: it is none, or timm would fetch the model or weights from elsewhere.
    """
    name, kwargs = metadata["timm_name"], json.loads(metadata["timm_kwargs"])
    # "hf-hub:..." would be downloaded, and a checkpoint may be a pickle: this file's own tensors are the weights
    if not timm.is_model(name) or not isinstance(kwargs, dict) or kwargs.keys() & {"pretrained", "checkpoint_path"}:
        raise ValueError(f"timm_name {name}, timm_kwargs {kwargs}")
    return EncoderSpec(name, kwargs)
