"""Pictures of images of any format, for people: in reports, trackers and the preview of the augmentation."""

import torch
from torch import Tensor

from .augment.config import AugmentConfig
from .images.pixel_format import PixelFormat

LOW, HIGH = 0.01, 0.99
"""Percentiles of a 16-bit image that are shown in black and white. A 12-bit scan uses a sixteenth of the levels."""
MOST_SAMPLED = 2**16
"""Number of pixels of an image from which its percentiles are computed, about."""


def to_pictures(values: Tensor, pixel_format: PixelFormat, augment: AugmentConfig | None = None) -> Tensor:
    """Draw images or normalized views.

    Three channels are shown as RGB; of any other number the first one is shown in gray. Images of 16 bits are windowed:
    the 1st percentile of an image is black, the 99th white.

    Args:
        values: (n, ..., C, H, W): levels or, with `augment`, views. What has the same first index, such as the two
            views of an image, shares a window.
        pixel_format: format of the images.
        augment: options of the views, of which the normalization is undone.

    Returns:
        (n, ..., H, W, 3) uint8 on the device of `values`, which is not waited for.
    """
    channels = range(3) if pixel_format.channels == 3 else (0, 0, 0)
    mean, std = (augment.mean, augment.std) if augment else ([0.0] * 3, [1 / pixel_format.white] * 3)
    shown = [values[..., channel, :, :].float() * std[channel] + mean[channel] for channel in channels]
    levels = torch.stack(shown, -1)  # (n, ..., H, W, 3) in 0..1
    if pixel_format.bits == 16:
        pixels = levels.flatten(1, -2)  # (n, P, 3)
        ordered = pixels[:, :: -(-pixels.shape[1] // MOST_SAMPLED)].flatten(1).sort(1).values
        ends = (ordered[:, round(share * (ordered.shape[1] - 1))] for share in (LOW, HIGH))
        low, high = (end.view(-1, *[1] * (levels.ndim - 1)) for end in ends)
        levels = (levels - low) / (high - low).clamp_min(1 / pixel_format.white)
    return (255 * levels).round().clamp(0, 255).to(torch.uint8)
