"""Encoders, projection heads, the SimCLR module and classifiers.

Importing this package registers the architectures `simclr_resnet*` with timm.
"""

from .batchnorm import synchronize_batchnorm
from .classifier import Classifier, StartConfig, create_classifier, load_classifier, save_classifier, start_classifier
from .encoder import (
    EncoderConfig,
    EncoderSpec,
    create_encoder,
    encoder_spec,
    feature_dim,
    load_encoder,
    read_spec,
    save_encoder,
)
from .head import HeadConfig, load_head, projection_head, save_head
from .simclr import SimCLR

__all__ = [
    "Classifier",
    "EncoderConfig",
    "EncoderSpec",
    "HeadConfig",
    "SimCLR",
    "StartConfig",
    "create_classifier",
    "create_encoder",
    "encoder_spec",
    "feature_dim",
    "load_classifier",
    "load_encoder",
    "load_head",
    "projection_head",
    "read_spec",
    "save_classifier",
    "save_encoder",
    "save_head",
    "start_classifier",
    "synchronize_batchnorm",
]
