"""Export a trained encoder for other libraries.

    python export.py RUN encoder.safetensors                        weights for timm
    python export.py RUN resnet50.safetensors --format torchvision  weights for torchvision.models.resnet50
    python export.py RUN my-encoder --format huggingface            a folder for timm and the Hugging Face Hub

RUN is a run folder, or an encoder.safetensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from engine.processes import ending_together
from model.export import export_encoder


@dataclass(frozen=True)
class ExportConfig:
    """Export a trained encoder for other libraries."""

    source: tyro.conf.Positional[Path]
    """Run folder, or its encoder.safetensors."""
    out: tyro.conf.Positional[Path]
    """New .safetensors file; for huggingface a new folder."""
    format: Literal["timm", "torchvision", "huggingface"] = "timm"
    """timm, torchvision: a state dict. huggingface: a folder with config.json, weights and model card."""


def main() -> None:
    with ending_together():
        config = tyro.cli(ExportConfig, prog="export.py")
        spec = export_encoder(config.source, config.out, config.format)
    print(f"{config.format}: {config.out}")
    if spec.needs_streamclr:
        print(f"To let timm load {spec.name}, `pip install streamclr` and `import streamclr.model` first.")


if __name__ == "__main__":
    main()
