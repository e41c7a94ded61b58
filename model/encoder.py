"""Encoders: any timm architecture by name, and SimCLR's ResNets for small images and other widths.

A plain encoder is exactly `timm.create_model(name, num_classes=0)`. timm lacks SimCLR's stem for small images (a first
convolution of 3x3 with stride 1 and no max-pool: arXiv 2002.05709, appendix B.9) and its width multiplier. Importing
this module therefore registers `simclr_resnet10t` to `simclr_resnet152d` with timm, so that
`timm.create_model("simclr_resnet18", num_classes=0, small_stem=True, width=2.0)` works. With `selective_kernels=True`
they are the encoders of SimCLR v2 (arXiv 2006.10029, table 1).
"""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import timm
import torch
from timm.models import build_model_with_cfg, register_model
from torch import nn

from .common import UserError, check_range
from .selective_kernels import SelectiveKernelBottleneck
from .weights import load_strictly, read_weights, reading_metadata, write_weights

SMALL_IMAGE_PX = 64
"""Largest view size for which `stem="auto"` selects the small stem."""
PLAIN_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SELECTIVE_KERNEL_RESNETS = PLAIN_RESNETS[2:]
RESNETS = ("resnet10t", *PLAIN_RESNETS, "resnet18d", "resnet34d", "resnet50d", "resnet101d", "resnet152d")
"""ResNet-10-T and ResNet-D average pixels in the shortcuts, where a plain ResNet omits three of four."""
PREFIX = "simclr_"
"""Prefix of the architectures that this module registers with timm."""


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of the encoder."""

    name: str = "resnet50"
    """Name of any timm model."""
    stem: Literal["auto", "small", "standard"] = "auto"
    """Stem of a ResNet. small: 3x3, stride 1, no max-pool. standard: timm's, which is 7x7 (three 3x3 in ResNet-10-T and
    ResNet-D, and with selective kernels), stride 2, max-pool. auto: small for views of 64 px or less."""
    width: float = 1.0
    """Multiplier of all channel counts of a ResNet."""
    selective_kernels: bool = False
    """Use the selective kernels of SimCLR v2, with ResNet-D's stem and shortcuts; for ResNets of 50 layers or more."""

    def __post_init__(self) -> None:
        check_range("--encoder.width", self.width, 0.05, 32)


class EncoderSpec(NamedTuple):
    """How to build an encoder: `timm.create_model(name, **kwargs)`."""

    name: str
    kwargs: dict

    @property
    def needs_streamclr(self) -> bool:
        """Whether timm knows the architecture only after this package has been imported."""
        return self.name.startswith(PREFIX)

    @property
    def channels(self) -> int:
        """Channels of the images that the encoder takes."""
        return self.kwargs.get("in_chans", 3)


def _simclr_resnet(base: str, small_stem: bool, width: float, selective_kernels: bool, **kwargs) -> nn.Module:
    # even counts, because timm's deep stem ends with twice stem_width channels
    channels = [2 * max(1, round(planes * width / 2)) for planes in (64, 128, 256, 512)]
    if selective_kernels:  # combined with ResNet-D, as in the official code
        kwargs |= {"block": SelectiveKernelBottleneck, "avg_down": True}
    # timm's plain stem always has 64 channels, but its deep stem follows stem_width: build the deep one, so that the
    # first block expects the right number of channels, then replace its convolutions by the plain one
    plain_stem = small_stem or (base in PLAIN_RESNETS and not selective_kernels)
    if plain_stem or selective_kernels:
        kwargs["stem_type"] = "deep"
    elif base == "resnet10t" and channels[0] < 8:  # its first convolution would have no channels
        raise ValueError("its standard stem needs a width of 0.11 or more")
    first = {"first_conv": "conv1" if plain_stem else "conv1.0"}  # timm adapts it to weights of other channels
    kwargs |= {"stem_width": channels[0] // 2, "pretrained_cfg_overlay": first}
    encoder = timm.create_model(base, channels=channels, **kwargs)
    if plain_stem:
        side, stride = (3, 1) if small_stem else (7, 2)
        in_channels = kwargs.get("in_chans", 3)
        encoder.conv1 = nn.Conv2d(in_channels, encoder.bn1.num_features, side, stride, padding=side // 2, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")  # timm's initialization
    if small_stem:
        encoder.maxpool = nn.Identity()
    return encoder


def _register(base: str) -> None:
    name = PREFIX + base

    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: dict | None = None,
        small_stem: bool = False,
        width: float = 1.0,
        selective_kernels: bool = False,
        **kwargs,
    ) -> nn.Module:
        if selective_kernels and base not in SELECTIVE_KERNEL_RESNETS:
            raise ValueError(f"selective kernels need one of {', '.join(SELECTIVE_KERNEL_RESNETS)}")
        if pretrained and not pretrained_cfg:  # only exported folders have weights
            raise ValueError(f"there are no pretrained weights for {name}")
        build = partial(_simclr_resnet, base, small_stem, width, selective_kernels)
        pretrained_cfg = pretrained_cfg or timm.get_pretrained_cfg(base).to_dict()
        return build_model_with_cfg(build, name, pretrained, pretrained_cfg, **kwargs)

    entrypoint.__name__, entrypoint.__module__ = name, __name__
    register_model(entrypoint)


for _base in RESNETS:
    if not timm.is_model(PREFIX + _base):  # `model` and `streamclr.model` may be imported by one process
        _register(_base)


def encoder_spec(config: EncoderConfig, image_size: int, channels: int = 3) -> EncoderSpec:
    """Translate an encoder configuration into arguments of `timm.create_model`.

    Args:
        config: encoder configuration; the names simclr_resnet* and resnet* are equivalent, since stem, width and
            selective kernels decide between them.
        image_size: side of a view in pixels.
        channels: channels of the images.

    Raises:
        UserError: timm has no such model, the name contains a pretrained tag, or the model does not support the
            width, stem or selective kernels.
    """
    name = config.name
    base, dot, tag = name.partition(".")
    if dot and timm.is_model(base):
        raise UserError(f"{name} names the pretrained weights {tag!r}, but weights start random; use {base}.")
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in RESNETS:
        name = name.removeprefix(PREFIX)
    if not timm.is_model(name):
        names = timm.list_models(exclude_filters=f"{PREFIX}*")
        completions = [longer for longer in names if name and longer.startswith(name)]  # such as vit_tiny
        close = sorted(completions, key=len)[:3] or get_close_matches(name, names, 3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UserError(f"timm has no encoder {name!r}{hint}; use one of `timm.list_models()`.")
    if config.selective_kernels and name not in SELECTIVE_KERNEL_RESNETS:
        raise UserError(
            f"{name} does not support selective kernels; use one of {', '.join(SELECTIVE_KERNEL_RESNETS)} or set "
            "--encoder.no-selective-kernels."
        )
    kwargs: dict = {"num_classes": 0}
    if name in RESNETS:
        if config.stem == "small" or (config.stem == "auto" and image_size <= SMALL_IMAGE_PX):
            kwargs["small_stem"] = True
        if config.width != 1:
            kwargs["width"] = config.width
        if config.selective_kernels:
            kwargs["selective_kernels"] = True
        name = PREFIX + name if len(kwargs) > 1 else name
    elif config.width != 1 or config.stem == "small":
        raise UserError(
            f"{name} supports neither a width multiplier nor SimCLR's small stem, which are for {', '.join(RESNETS)}; "
            "set --encoder.width 1 --encoder.stem auto (a preset may set others)."
        )
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:  # a ViT: position embeddings have a fixed size
        kwargs["img_size"] = image_size
    if channels != 3:
        kwargs["in_chans"] = channels
    return EncoderSpec(name, kwargs)


def create_encoder(spec: EncoderSpec) -> nn.Module:
    """Build an encoder with random weights: (N, C, H, W) -> pooled features h (N, features).

    Raises:
        UserError: timm cannot build it.
    """
    name, kwargs = spec
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # timm's models raise errors of many types
        raise UserError(
            f"timm can't build {name} with {kwargs} ({_first_line(error)}); use another encoder or size."
        ) from error


def feature_dim(encoder: nn.Module, image_size: int, channels: int = 3, *, option: str = "--views.size") -> int:
    """Number of features of h for views of `image_size` pixels, measured by encoding two black images.

    timm's `num_features` is wrong for models that project the pooled features to another width.

    Args:
        encoder: takes views (N, channels, image_size, image_size).
        image_size: side of a view in pixels.
        channels: channels of the images.
        option: option that sets the size, for the error.

    Raises:
        UserError: the encoder does not accept views of this size, or does not return one vector per view.
    """
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            h = encoder(torch.zeros(2, channels, image_size, image_size))
    except Exception as error:  # timm's models raise errors of many types
        raise UserError(
            f"The encoder can't take views of {image_size} px ({_first_line(error)}); change {option} or "
            "--encoder.name."
        ) from error
    if not isinstance(h, torch.Tensor) or h.ndim != 2 or len(h) != 2:
        found = f"shape {tuple(h.shape)}" if isinstance(h, torch.Tensor) else type(h).__name__
        raise UserError(
            f"The encoder returns {found} for two views instead of one vector each; use another --encoder.name."
        )
    encoder.train(training)
    return h.shape[1]


def _first_line(error: Exception) -> str:
    """First line of an error's message, or its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def save_encoder(encoder: nn.Module, spec: EncoderSpec, path: Path) -> None:
    """Write weights to a safetensors file whose metadata states the arguments of `timm.create_model`.

    Raises:
        UserError: the file cannot be written.
    """
    write_weights(encoder, {"timm_name": spec.name, "timm_kwargs": spec.kwargs}, path)


def load_encoder(path: Path) -> nn.Module:
    """Load an encoder written by `save_encoder`, on the CPU and in evaluation mode.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    metadata, state = read_weights(path, "timm_name")
    with reading_metadata(path):
        encoder = create_encoder(spec_from_metadata(metadata))
    return load_strictly(encoder, state, path)


def read_spec(path: Path) -> EncoderSpec:
    """Read the spec of an encoder written by `save_encoder`.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    with reading_metadata(path):
        return spec_from_metadata(read_weights(path, "timm_name")[0])


def spec_from_metadata(metadata: dict[str, str]) -> EncoderSpec:
    """Parse the spec in a file's metadata.

    Raises:
        KeyError, TypeError, ValueError: there is no valid one, or timm would load the model or weights from elsewhere.
    """
    name, kwargs = metadata["timm_name"], json.loads(metadata["timm_kwargs"])
    # timm would download "hf-hub:..." and unpickle a checkpoint; only the tensors of the file itself are trusted
    if not timm.is_model(name) or not isinstance(kwargs, dict) or kwargs.keys() & {"pretrained", "checkpoint_path"}:
        raise ValueError(f"timm_name {name}, timm_kwargs {kwargs}")
    return EncoderSpec(name, kwargs)
