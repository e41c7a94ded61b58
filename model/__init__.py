"""Encoders, projection heads and SimCLR itself. Importing this registers `simclr_resnet*` with timm."""

from model.batchnorm import synchronise_batchnorm
from model.encoder import create_encoder, encoder_spec, load_encoder, representation_width, save_encoder
from model.head import projection_head
from model.simclr import SimCLR

__all__ = [
    "SimCLR",
    "create_encoder",
    "encoder_spec",
    "load_encoder",
    "projection_head",
    "representation_width",
    "save_encoder",
    "synchronise_batchnorm",
]
