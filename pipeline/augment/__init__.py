"""SimCLR augmentation: parameters and the backends that render them."""

from .config import AugmentConfig
from .params import AugmentParams, center_crop, draw_params

__all__ = ["AugmentConfig", "AugmentParams", "center_crop", "draw_params"]
