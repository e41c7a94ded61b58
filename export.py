"""Export a trained encoder for other libraries.

    python export.py RUN encoder.safetensors                        weights for timm
    python export.py RUN resnet50.safetensors --format torchvision  weights for torchvision.models.resnet50
    python export.py RUN my-encoder --format huggingface            a folder for timm and the Hugging Face Hub

RUN is a run folder, or an encoder.safetensors.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import UserError
from engine.processes import ending_together
from model.export import export_encoder
from options import parse_options


@dataclass(frozen=True)
class ExportConfig:
    """Export a trained encoder for other libraries."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """Run folder, or its encoder.safetensors."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = ""
    """New .safetensors file; for huggingface a new folder."""
    format: Literal["timm", "torchvision", "huggingface"] = "timm"
    """timm, torchvision: a state dict. huggingface: a folder with config.json, weights and model card."""


def main() -> None:
    with ending_together():
        config = parse_options(ExportConfig(), sys.argv[1:], prog="export.py", description=__doc__)
        if not (config.source and config.out):
            raise UserError("There is no encoder or no file to write; use export.py RUN OUT, see export.py --help.")
        spec = export_encoder(Path(config.source), Path(config.out), config.format)
    print(f"{config.format}: {config.out}")
    if spec.needs_streamclr:
        print(f"To let timm load {spec.name}, `pip install streamclr` and `import streamclr.model` first.")


if __name__ == "__main__":
    main()
