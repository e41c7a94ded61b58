"""Projection heads: from the representation h to the space in which views are compared."""

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
    """The head g of SimCLR.

    Args:
        version: "v1", two layers: g(h) = W2 relu(W1 h) (arXiv 2002.05709, section 2.1), with batch norm after each
            layer as in the official code. "v2", three layers (arXiv 2006.10029, section 2).
        features, hidden, out: widths of h, of the layers between and of z.

    Returns:
        (N, features) -> (N, out). Layers are named `fc1`, `bn1`, ... so that fine-tuning can begin at any of them.
    """
    hidden = [config.hidden] * (1 if config.version == "v1" else 2)
    widths = [features, *hidden, config.out]
    head = nn.Sequential()
    for number, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        last = number == len(widths) - 1
        head.add_module(f"fc{number}", nn.Linear(fan_in, fan_out, bias=False))  # batch norm would cancel a bias
        head.add_module(f"bn{number}", nn.BatchNorm1d(fan_out))
        if last:
            nn.init.zeros_(head[-1].bias)
            head[-1].bias.requires_grad_(False)  # the official code normalizes z's last layer without a learned shift
        else:
            head.add_module(f"relu{number}", nn.ReLU(inplace=True))
    return head


def head_spec(head: nn.Sequential) -> dict:
    """The arguments with which `projection_head` made a head, read off its layers."""
    layers = [module for module in head if isinstance(module, nn.Linear)]
    return {
        "version": "v1" if len(layers) == 2 else "v2",
        "features": layers[0].in_features,
        "hidden": layers[0].out_features,
        "out": layers[-1].out_features,
    }


def head_from_spec(spec: dict) -> nn.Sequential:
    """The projection head, with new weights, of what `head_spec` returned."""
    return projection_head(HeadConfig(spec["version"], spec["hidden"], spec["out"]), spec["features"])


def save_head(head: nn.Sequential, path: Path) -> None:
    """Weights in safetensors, with version, features, hidden and out in the file's metadata."""
    write_weights(head, {"head": head_spec(head)}, path)


def load_head(path: Path) -> nn.Sequential:
    """The head that `save_head` wrote, on the CPU and in evaluation mode.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    metadata, state = read_weights(path, "head")
    with reading_metadata(path):
        head = head_from_spec(json.loads(metadata["head"]))
    return load_strictly(head, state, path)
