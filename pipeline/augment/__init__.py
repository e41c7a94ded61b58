"""SimCLR augmentation: options, random parameters, and the backends that apply them to images."""

from .config import AugmentConfig
from .params import AugmentParams, center_crop, draw_params

__all__ = ["AugmentConfig", "AugmentParams", "center_crop", "draw_params"]
