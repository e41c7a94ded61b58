"""Projection heads: from the features h to the space z in which views are compared."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from torch import nn

from .common import check_range
from .weights import load_strictly, read_weights, reading_metadata, write_weights


@dataclass(frozen=True)
class HeadConfig:
    """Projection head."""

    version: Literal["v1", "v2"] = "v1"
    """v1: two layers (arXiv 2002.05709). v2: three layers (arXiv 2006.10029)."""
    hidden: int = 2048
    """Width of the hidden layers."""
    out: int = 128
    """Width of z."""

    def __post_init__(self) -> None:
        check_range("--head.hidden", self.hidden, 1, 2**17)
        check_range("--head.out", self.out, 1, 2**17)


def projection_head(config: HeadConfig, features: int) -> nn.Sequential:
    """Build SimCLR's projection head g: h (N, features) -> z (N, out).

    v1 has two layers, g(h) = W2 relu(W1 h) (arXiv 2002.05709, section 2.1), v2 has three (arXiv 2006.10029, section 2).
    Every linear layer is followed by batch norm, as in the official code. Layers are named `fc1`, `bn1`, `relu1`,
    `fc2`, ..., so that fine-tuning can start from any of them.

    Args:
        config: version and widths of the layers.
        features: width of h.
    """
    hidden = [config.hidden] * (1 if config.version == "v1" else 2)
    widths = [features, *hidden, config.out]
    head = nn.Sequential()
    for number, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        head.add_module(f"fc{number}", nn.Linear(fan_in, fan_out, bias=False))  # batch norm would cancel a bias
        head.add_module(f"bn{number}", nn.BatchNorm1d(fan_out))
        if number < len(widths) - 1:
            head.add_module(f"relu{number}", nn.ReLU(inplace=True))
    nn.init.zeros_(head[-1].bias)
    head[-1].bias.requires_grad_(False)  # the official code's last batch norm has no learned shift
    return head


def head_spec(head: nn.Sequential) -> dict:
    """Arguments from which `head_from_spec` builds a head of the same shape, read from its layers."""
    layers = [module for module in head if isinstance(module, nn.Linear)]
    return {
        "version": "v1" if len(layers) == 2 else "v2",
        "features": layers[0].in_features,
        "hidden": layers[0].out_features,
        "out": layers[-1].out_features,
    }


def head_from_spec(spec: dict) -> nn.Sequential:
    """Build the projection head that `head_spec` describes, with random weights."""
    return projection_head(HeadConfig(spec["version"], spec["hidden"], spec["out"]), spec["features"])


def save_head(head: nn.Sequential, path: Path) -> None:
    """Write weights to a safetensors file whose metadata is the `head_spec`.

    Raises:
        UserError: the file cannot be written.
    """
    write_weights(head, {"head": head_spec(head)}, path)


def load_head(path: Path) -> nn.Sequential:
    """Load a head written by `save_head`, on the CPU and in evaluation mode.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    metadata, state = read_weights(path, "head")
    with reading_metadata(path):
        head = head_from_spec(json.loads(metadata["head"]))
    return load_strictly(head, state, path)
