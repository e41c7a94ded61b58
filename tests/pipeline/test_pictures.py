"""Pictures of images and views of any format, as reports, trackers and the preview show them."""

import numpy as np
import pytest
import torch

from pipeline.augment.config import AugmentConfig
from pipeline.images.pixel_format import PixelFormat
from pipeline.pictures import to_pictures


def random_levels(pixel_format, *shape, largest=None, seed=0):
    """Random levels (*shape, C, 20, 30) of an image format."""
    size = (*shape, pixel_format.channels, 20, 30)
    levels = np.random.default_rng(seed).integers(0, (largest or pixel_format.white) + 1, size)
    return torch.from_numpy(levels.astype(pixel_format.dtype))


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_levels_of_8_bits_are_shown_as_they_are(channels):
    levels = random_levels(pixel_format := PixelFormat(channels, 8), 4)
    shown = levels if channels == 3 else levels[:, :1].expand(-1, 3, -1, -1)  # the first channel in gray
    pictures = to_pictures(levels, pixel_format)
    assert pictures.dtype == torch.uint8 and torch.equal(pictures, shown.permute(0, 2, 3, 1))


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_16_bits_are_shown_between_the_1st_and_the_99th_percentile(channels):
    """A scan of 12 bits would be nearly black, and one of a single bright pixel too."""
    pixel_format = PixelFormat(channels, 16)
    levels = random_levels(pixel_format, 2, largest=4095)
    levels[:, :, 0, 0] = 65535
    shown = levels.numpy()[:, :3] if channels == 3 else levels.numpy()[:, [0, 0, 0]]
    for picture, pixels in zip(to_pictures(levels, pixel_format).numpy(), shown.astype(np.float64), strict=True):
        low, high = np.quantile(pixels, [0.01, 0.99], method="nearest")
        expected = np.clip((pixels - low) / (high - low), 0, 1).transpose(1, 2, 0) * 255
        assert np.abs(picture - expected).max() <= 0.51  # half a level, and rounding in float32
        assert picture.min() == 0 and picture.max() == 255 and 100 < picture.mean() < 155


@pytest.mark.parametrize("bits", [8, 16])
def test_views_look_like_their_images(bits):
    pixel_format = PixelFormat(3, bits)
    augment = AugmentConfig(size=32, mean=(0.5, 0.4, 0.3), std=(0.25, 0.02, 0.001))
    levels = random_levels(pixel_format, 2, 2)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (augment.mean, augment.std))
    views = (levels.double() / pixel_format.white - mean) / std
    assert torch.equal(to_pictures(views.float(), pixel_format, augment), to_pictures(levels, pixel_format))


def test_views_of_an_image_share_a_window():
    """So a difference in brightness stays visible; images do not share one."""
    pixel_format = PixelFormat(1, 16)
    dark = random_levels(pixel_format, 1, 1, largest=1000).to(torch.int32)
    pictures = to_pictures(torch.cat([dark, 2 * dark], 1), pixel_format).float()
    assert pictures[0, 1].mean() == pytest.approx(2 * pictures[0, 0].mean().item(), rel=0.05)
    apart = to_pictures(torch.cat([dark, 2 * dark]), pixel_format)
    assert torch.equal(apart[0], apart[1])


def test_a_constant_image_is_a_picture():
    assert to_pictures(torch.full((1, 1, 4, 4), 1000), PixelFormat(1, 16)).tolist() == [[[[0] * 3] * 4] * 4]
