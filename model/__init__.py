"""Encoders, projection heads, SimCLR itself and classifiers. Importing this registers `simclr_resnet*` with timm."""

from model.batchnorm import synchronise_batchnorm
from model.classifier import Classifier, fine_tuned, load_classifier, save_classifier
from model.encoder import create_encoder, encoder_spec, load_encoder, read_spec, representation_width, save_encoder
from model.head import load_head, projection_head, save_head
from model.simclr import SimCLR

__all__ = [
    "Classifier",
    "SimCLR",
    "create_encoder",
    "encoder_spec",
    "fine_tuned",
    "load_classifier",
    "load_encoder",
    "load_head",
    "projection_head",
    "read_spec",
    "representation_width",
    "save_classifier",
    "save_encoder",
    "save_head",
    "synchronise_batchnorm",
]
