"""Encoders, projection heads, SimCLR itself and classifiers. Importing this registers `simclr_resnet*` with timm."""

from .batchnorm import synchronize_batchnorm
from .classifier import Classifier, fine_tuned, load_classifier, save_classifier
from .encoder import create_encoder, encoder_spec, feature_dim, load_encoder, read_spec, save_encoder
from .head import load_head, projection_head, save_head
from .simclr import SimCLR

__all__ = [
    "Classifier",
    "SimCLR",
    "create_encoder",
    "encoder_spec",
    "feature_dim",
    "fine_tuned",
    "load_classifier",
    "load_encoder",
    "load_head",
    "projection_head",
    "read_spec",
    "save_classifier",
    "save_encoder",
    "save_head",
    "synchronize_batchnorm",
]
