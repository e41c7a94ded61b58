"""Tests of the augmentation parameters: distributions against the paper and torchvision, validation of the options."""

import math
import re
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision import transforms

from common import UserError
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import LUMA, ORDERS, AugmentParams, affine_jitter, center_crop, draw_params
from pipeline.images.pixel_format import RGB8, PixelFormat
from presets import PRETRAIN, parse

N = 20_000
PEER_DRAWS = 8_000


@pytest.fixture(scope="module")
def drawn() -> AugmentParams:
    """Two views of 20,000 images of 500 x 400 with the default options."""
    return draw_params(AugmentConfig(), 0, 0, np.arange(N), np.full(N, 400), np.full(N, 500))


def assert_rate(happened: np.ndarray, probability: float) -> None:
    """Within five standard deviations of a binomial."""
    spread = np.sqrt(probability * (1 - probability) / happened.size)
    assert abs(happened.mean() - probability) < 5 * spread


def assert_uniform(values: np.ndarray, low: float, high: float, slack: float = 1e-6) -> None:
    """Within the range up to `slack`, with a tenth of the values in each tenth of it."""
    assert low - slack <= values.min() and values.max() <= high + slack
    for tenth in range(10):
        at = low + (high - low) * tenth / 10
        assert_rate((values >= at) & (values < at + (high - low) / 10), 0.1)


def test_crops_have_the_area_and_aspect_of_the_paper(drawn):
    _, _, height, width = np.moveaxis(drawn.crop.astype(float), -1, 0)
    area, aspect = height * width / (400 * 500), width / height
    assert area.min() > 0.078 and area.max() <= 1  # 0.08 up to rounding to whole pixels
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert (height == width).mean() < 0.02  # not always square
    small = area < 0.5  # a crop this small always fits, so none was rejected
    assert_uniform(area[small], 0.08, 0.5, slack=0.001)  # whole pixels
    assert_uniform(np.log(aspect[small]), -np.log(4 / 3), np.log(4 / 3), slack=0.01)


def test_crop_positions_are_uniform(drawn):
    top, left, height, width = np.moveaxis(drawn.crop.astype(float), -1, 0)
    room = 400 - height
    assert (top >= 0).all() and (top <= room).all() and (left >= 0).all() and (left <= 500 - width).all()
    assert_uniform(((top + 0.5) / (room + 1))[room > 100], 0, 1)


def test_rates(drawn):
    jittered = drawn.hue != 0
    for happened, probability in ((drawn.flip, 0.5), (jittered, 0.8), (drawn.gray, 0.2), (drawn.sigma > 0, 0.5)):
        assert_rate(happened, probability)
        assert_rate(happened[0] & happened[1], probability**2)  # views are independent
    for factor in (drawn.brightness, drawn.contrast, drawn.saturation):
        assert np.array_equal(factor != 1, jittered)  # all four or none
    assert_rate(jittered & drawn.gray & drawn.flip & (drawn.sigma > 0), 0.8 * 0.2 * 0.5 * 0.5)  # as are operations


@pytest.mark.parametrize(
    ("strength", "low", "high", "hue"), [(1.0, 0.2, 1.8, 0.2), (0.5, 0.6, 1.4, 0.1), (2, 0, 2.6, 0.4)]
)
def test_jitter_ranges(strength, low, high, hue):
    drawn = draw_params(
        AugmentConfig(jitter_strength=strength), 1, 0, np.arange(5000), np.full(5000, 40), np.full(5000, 40)
    )
    jittered = drawn.hue != 0
    for factor in (drawn.brightness, drawn.contrast, drawn.saturation):
        assert_uniform(factor[jittered], low, high)
    assert_uniform(drawn.hue[jittered], -hue, hue)  # two-sided


def test_all_orders_are_equally_likely(drawn):
    assert len({tuple(order) for order in ORDERS}) == 24
    number = (drawn.order.astype(int) * [1000, 100, 10, 1]).sum(-1)
    found, counts = np.unique(number, return_counts=True)
    assert len(found) == 24
    for count in counts:
        assert abs(count / number.size - 1 / 24) < 5 * np.sqrt(23 / 24**2 / number.size)
    assert_rate((drawn.order[0] == drawn.order[1]).all(-1), 1 / 24)


def test_blur_is_drawn_per_sample_and_view(drawn):
    blurred = drawn.sigma > 0
    assert_uniform(drawn.sigma[blurred], 0.1, 2.0)
    both = blurred.all(0)
    assert len(np.unique(drawn.sigma[:, both])) > 1.9 * both.sum()
    assert abs(np.corrcoef(drawn.sigma[:, both])[0, 1]) < 5 / np.sqrt(both.sum())
    for view in blurred:  # not one view only
        assert_rate(view, 0.5)


@pytest.mark.parametrize(("size", "window"), [(224, 23), (96, 9), (32, 3), (16, 3), (160, 17), (128, 13)])
def test_blur_window_is_a_tenth_of_the_view(size, window):
    assert AugmentConfig(size=size).blur_window == window


def test_zero_probabilities_disable_all_operations():
    config = AugmentConfig(flip_p=0, jitter_p=0, gray_p=0, blur_p=0)
    drawn = draw_params(config, 0, 0, np.arange(100), np.full(100, 40), np.full(100, 40))
    assert not (drawn.flip.any() or drawn.gray.any() or drawn.sigma.any() or drawn.hue.any())
    assert (drawn.brightness == 1).all() and (drawn.contrast == 1).all() and (drawn.saturation == 1).all()


sides = st.one_of(st.integers(1, 4), st.integers(1, 5000))


@given(sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=20), seed=st.integers(0, 2**64 - 1))
def test_crops_lie_inside_images_of_any_size(sizes, seed):
    height, width = np.array(sizes).T
    for params in (
        draw_params(AugmentConfig(), seed, 0, np.arange(len(sizes)), height, width),
        center_crop(AugmentConfig(), height, width),
        center_crop(AugmentConfig(size=32), height, width),
    ):
        top, left, h, w = np.moveaxis(params.crop, -1, 0)
        assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((10, 1000), (0, 493, 10, 13)),
        ((1000, 10), (493, 0, 13, 10)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 3000), (0, 1499, 1, 1)),
    ],
)
def test_the_crop_is_central_if_no_random_one_fits(size, window):
    """An aspect ratio of 100 leaves no room for the area: the largest central crop of an allowed aspect ratio."""
    drawn = draw_params(
        AugmentConfig(crop_area=(0.5, 1.0)), 0, 0, np.arange(50), np.full(50, size[0]), np.full(50, size[1])
    )
    assert (drawn.crop == window).all()


@given(
    sizes=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=2, max_size=12),
    first=st.integers(0, 2**32 - 100),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10_000),
    data=st.data(),
)
def test_parameters_do_not_depend_on_the_rest_of_the_batch(sizes, first, seed, epoch, data):
    height, width = np.array(sizes).T
    samples = first + np.arange(len(sizes))
    whole = draw_params(AugmentConfig(), seed, epoch, samples, height, width)
    part = np.array(data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, max_size=6)))
    alone = draw_params(AugmentConfig(), seed, epoch, samples[part], height[part], width[part])
    one_view = draw_params(AugmentConfig(), seed, epoch, samples, height, width, views=1)
    for field in fields(AugmentParams):
        values = getattr(whole, field.name)
        assert np.array_equal(values[:, part], getattr(alone, field.name))
        assert np.array_equal(values[:1], getattr(one_view, field.name))


def test_epochs_seeds_and_views_differ(drawn):
    size = np.full(N, 400), np.full(N, 500)
    others = [
        draw_params(AugmentConfig(), 0, 1, np.arange(N), *size),
        draw_params(AugmentConfig(), 1, 0, np.arange(N), *size),
    ]
    for a, b in ((drawn.crop[0], drawn.crop[1]), *((drawn.crop, other.crop) for other in others)):
        assert (a == b).all(-1).mean() < 0.001


def test_center_crop():
    height, width = np.array([256, 300, 512, 1]), np.array([256, 400, 256, 7])
    large, small = center_crop(AugmentConfig(), height, width), center_crop(AugmentConfig(size=32), height, width)
    assert large.crop[0].tolist() == [[16, 16, 224, 224], [19, 69, 262, 262], [144, 16, 224, 224], [0, 3, 1, 1]]
    assert small.crop[0].tolist() == [[0, 0, 256, 256], [0, 50, 300, 300], [128, 0, 256, 256], [0, 3, 1, 1]]
    for params in (large, small):
        assert params.crop.shape == (1, 4, 4) and params.order.shape == (1, 4, 4)
        assert not (params.flip.any() or params.gray.any() or params.sigma.any() or params.hue.any())
        assert (np.stack([params.brightness, params.contrast, params.saturation]) == 1).all()


def same_distribution(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test, asymptotic; conservative if values repeat."""
    return ks_2samp(a.ravel().astype(float), b.ravel().astype(float), method="asymp").pvalue


def torchvision_draws(draw: Callable, count: int = PEER_DRAWS) -> np.ndarray:
    """Parameters drawn by torchvision from a fixed seed: (count, ...)."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        return np.array([draw() for _ in range(count)], float)


def crop_features(crops: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    """One-dimensional features of (..., 4) crops."""
    top, left, h, w = np.moveaxis(crops.reshape(-1, 4).astype(float), -1, 0)
    return {
        "area": h * w / (height * width),
        "aspect": w / h,
        "top": (top + 0.5) / (height - h + 1),
        "left": (left + 0.5) / (width - w + 1),
        "bottom": top + h,
        "right": left + w,
    }


# the last two are narrow enough for crops to be rejected, and for all ten attempts to fail
@pytest.mark.parametrize(("height", "width"), [(400, 500), (33, 40), (100, 400), (1200, 300)])
def test_crops_are_distributed_like_torchvision(height, width):
    image, config = torch.empty(3, height, width), AugmentConfig()
    peer = torchvision_draws(
        lambda: transforms.RandomResizedCrop.get_params(image, list(config.crop_area), list(config.crop_aspect))
    )
    ours = draw_params(config, 2, 0, np.arange(N), np.full(N, height), np.full(N, width)).crop
    peer = crop_features(peer, height, width)
    for name, values in crop_features(ours, height, width).items():
        assert same_distribution(values, peer[name]) > 1e-3, name


def test_jitter_is_distributed_like_torchvision(drawn):
    jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    peer = torchvision_draws(
        lambda: (lambda order, *factors: [*order.tolist(), *factors])(
            *jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        )
    )
    jittered = drawn.hue != 0
    for place in range(4):  # torchvision numbers brightness, contrast, saturation and hue alike
        assert same_distribution(drawn.order[..., place], peer[:, place]) > 1e-3
    assert same_distribution(drawn.order @ [64, 16, 4, 1], peer[:, :4] @ [64, 16, 4, 1]) > 1e-3
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue"), 4):
        assert same_distribution(getattr(drawn, name)[jittered], peer[:, column]) > 1e-3, name


def test_random_application_is_distributed_like_torchvision(drawn):
    picture = torch.tensor([[[0.1, 0.5]], [[0.9, 0.2]], [[0.3, 0.8]]])
    twice = transforms.Lambda(lambda x: 2 * x)
    for ours, transform in (
        (drawn.flip, transforms.RandomHorizontalFlip(0.5)),
        (drawn.hue != 0, transforms.RandomApply([twice], 0.8)),
        (drawn.gray, transforms.RandomGrayscale(0.2)),
        (drawn.sigma > 0, transforms.RandomApply([twice], 0.5)),
    ):
        peer = torchvision_draws(lambda t=transform: not torch.equal(t(picture), picture))
        assert same_distribution(ours, peer) > 1e-3
    peer = torchvision_draws(lambda: transforms.GaussianBlur.get_params(0.1, 2.0))
    assert same_distribution(drawn.sigma[drawn.sigma > 0], peer) > 1e-3


def test_the_comparison_detects_common_mistakes(drawn):
    """Power of the tests above: with as many draws, each of these deviations fails."""
    few = slice(PEER_DRAWS)
    size = np.full(N, 400), np.full(N, 500)
    right = crop_features(drawn.crop, 400, 500)

    def crops(**change) -> dict[str, np.ndarray]:
        wrong = draw_params(replace(AugmentConfig(), **change), 7, 0, np.arange(N), *size).crop
        return crop_features(wrong[0][few], 400, 500)

    assert same_distribution(right["aspect"], crops(crop_aspect=(1.0, 1.0))["aspect"]) < 1e-6  # always square
    assert same_distribution(right["area"], crops(crop_area=(0.12, 1.0))["area"]) < 1e-3
    _, left, h, w = np.moveaxis(drawn.crop[0][few].astype(float), -1, 0)
    centered = np.stack([(400 - h) // 2, left, h, w], -1)
    assert same_distribution(right["top"], crop_features(centered, 400, 500)["top"]) < 1e-6
    small = right["area"] < 0.5  # none is rejected, so the aspect ratio is as drawn
    uniform = np.random.default_rng(0).uniform(3 / 4, 4 / 3, PEER_DRAWS)  # instead of its logarithm
    assert same_distribution(right["aspect"][small], uniform) < 1e-6
    hue = drawn.hue[drawn.hue != 0]
    assert same_distribution(hue, np.abs(hue)[few]) < 1e-6  # one-sided
    assert same_distribution(hue, 0.95 * hue[few]) < 1e-3
    sigma = drawn.sigma[drawn.sigma > 0]
    assert same_distribution(sigma, 0.95 * sigma[few]) < 1e-3
    assert same_distribution(drawn.order[..., 0], np.zeros(PEER_DRAWS)) < 1e-6  # one fixed order
    for ours, rate in ((drawn.flip, 0.45), (drawn.gray, 0.25), (drawn.sigma > 0, 0.55), (drawn.hue != 0, 0.75)):
        assert same_distribution(ours, np.random.default_rng(0).random(PEER_DRAWS) < rate) < 1e-3


def one_view(**changed) -> AugmentParams:
    """A single view that leaves the image unchanged except for `changed`."""
    center = center_crop(AugmentConfig(), np.array([10]), np.array([10]))
    return replace(center, **{name: np.full((1, 1), value, np.float32) for name, value in changed.items()})


def test_each_operation_of_the_affine_jitter():
    pixel, gray = np.array([0.2, 0.5, 0.9]), np.array([0.2, 0.5, 0.9]) @ LUMA
    for params, matrix_times_pixel, mean_weight in (
        (one_view(), pixel, 0),
        (one_view(brightness=1.5), 1.5 * pixel, 0),
        (one_view(contrast=0.3), 0.3 * pixel, 0.7),
        (one_view(saturation=0.4), 0.4 * pixel + 0.6 * gray, 0),
        (one_view(gray=1.0), [gray] * 3, 0),
        (one_view(hue=0.5), 2 * gray - pixel, 0),  # half a turn: opposite chroma
        (one_view(brightness=0.5, contrast=1.6), 0.8 * pixel, 0.5 * -0.6),
    ):
        matrix, found = affine_jitter(params)
        assert matrix.shape == (1, 1, 3, 3) and found.shape == (1, 1)
        np.testing.assert_allclose(matrix[0, 0] @ pixel, matrix_times_pixel, atol=1e-6)
        np.testing.assert_allclose(found[0, 0], mean_weight, atol=1e-6)


def test_the_affine_hue_rotates_like_the_color_wheel():
    """A third of a turn makes red greenish, green bluish and blue reddish; gray and lightness are preserved."""
    third = affine_jitter(one_view(hue=1 / 3))[0][0, 0]
    assert [int((third @ color).argmax()) for color in np.eye(3)] == [1, 2, 0]
    np.testing.assert_allclose(third @ np.ones(3), 1, atol=1e-6)
    np.testing.assert_allclose(LUMA @ third, LUMA, atol=1e-6)
    np.testing.assert_allclose(np.linalg.matrix_power(third, 3), np.eye(3), atol=1e-5)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("size", [0, -224, 7, math.nan]),
        ("crop_area", [(0, 1), (-1, 1), (0.5, 0.4), (0.5, 1.1), (math.nan, 1), (0.1, math.nan)]),
        ("crop_aspect", [(0, 1), (-1, 1), (2, 1), (1, math.inf), (math.nan, 1), (1, math.nan)]),
        *[(name, [-0.1, 1.1, math.nan, math.inf]) for name in ("flip_p", "jitter_p", "gray_p", "blur_p")],
        ("jitter_strength", [-0.1, 2.6, math.nan, math.inf]),
        ("jitter", ["fast", ""]),
        ("blur_sigma", [(0, 2), (-1, 2), (2, 1), (1, 1e7), (0.1, math.inf), (math.nan, 1), (1, math.nan)]),
        ("mean", [(), (-0.1, 0, 0), (123.675, 116.28, 103.53), (0, math.nan, 0)]),
        ("std", [(), (9e-6,), (0, 1, 1), (1, -1, 1), (58.395, 57.12, 57.375), (1, 1, math.nan), (1, 1e-40, 1)]),
    ],
)
def test_every_field_is_validated_and_named(field, values):
    for value in values:
        shown = value if isinstance(value, str) or not isinstance(value, tuple) else " ".join(map(str, value))
        message = re.escape(f"--views.{field.replace('_', '-')} is {shown}; it must be ")
        with pytest.raises(UserError, match=message):
            AugmentConfig(**{field: value})


def test_limits_are_inclusive():
    probabilities = {"flip_p": 1, "jitter_p": 0, "gray_p": 1, "blur_p": 0}
    AugmentConfig(size=8, crop_area=(1, 1), crop_aspect=(1, 1), jitter_strength=0, blur_sigma=(2, 2), **probabilities)
    AugmentConfig(mean=(0, 0, 1), std=(1, 1 / 255, 1e-5))


def test_the_command_line_rejects_a_field_in_one_sentence():
    for arguments in (["--views.crop-aspect", "0", "1"], ["--views.blur-sigma", "-1", "2"], ["--views.gray-p", "2"]):
        with pytest.raises(UserError, match=rf"^{arguments[0]} is .*; it must be [^.]*"):
            parse(PRETRAIN, arguments, prog="train.py")


@pytest.mark.parametrize("aspects", [(100, 200), (1e300, 1e308), (1e-5, 1e-4)])
def test_a_crop_has_a_pixel_for_any_aspect_ratio(aspects):
    sizes = np.array([[40, 50], [1, 1], [3, 500], [500, 3]])
    with np.errstate(over="ignore"):
        drawn = draw_params(AugmentConfig(crop_aspect=aspects), 0, 0, np.arange(4), *sizes.T)
    assert (drawn.crop[..., 2:] >= 1).all() and (drawn.crop[..., :2] + drawn.crop[..., 2:] <= sizes).all()


def test_both_kinds_of_jitter_draw_the_same_parameters():
    exact, affine = (
        draw_params(AugmentConfig(jitter=kind), 3, 1, np.arange(9), np.full(9, 50), np.full(9, 60))
        for kind in ("exact", "affine")
    )
    for field in fields(AugmentParams):
        assert np.array_equal(getattr(exact, field.name), getattr(affine, field.name))


MEASURED = {"mean": [0.25] * 8, "std": [0.5, *[1e-5] * 6, 0.0], "measured_images": 3}


@pytest.mark.parametrize(
    ("options", "pixel_format", "statistics", "mean", "std"),
    [
        ({}, RGB8, {}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ({}, RGB8, {"mean": [0.1, 0.2, 0.3], "std": [0.3] * 3}, (0.1, 0.2, 0.3), (0.3,) * 3),
        ({}, PixelFormat(8, 16), MEASURED, (0.25,) * 8, (0.5, *(1e-5,) * 6, 1.0)),  # the last channel is constant
        ({"mean": (0.5,), "std": (0.1,)}, PixelFormat(4, 8), {}, (0.5,) * 4, (0.1,) * 4),
        ({"std": (0.1,)}, PixelFormat(1, 16), {"mean": [0.2], "std": [0.3]}, (0.2,), (0.1,)),
        ({"mean": (0.0,)}, RGB8, {}, (0.0,) * 3, (0.229, 0.224, 0.225)),
    ],
)
def test_normalization_of_images(options, pixel_format, statistics, mean, std):
    """Set values win over measured ones, and those over ImageNet's, which are for 8-bit RGB alone."""
    found = AugmentConfig(**options).for_images(pixel_format, statistics)
    assert (found.mean, found.std) == (mean, std)
    assert found.for_images(pixel_format, {}) == found and replace(found, mean=None, std=None) == AugmentConfig()


@pytest.mark.parametrize(
    ("options", "pixel_format", "cause"),
    [
        ({}, PixelFormat(1, 16), "Mean and standard deviation of the images (gray, 16 bits) were not measured; use "),
        ({"mean": (0, 0)}, RGB8, "--views.mean has 2 values, but the images have 3 channels; use one "),
        ({"mean": (0,), "std": (1, 1, 1)}, PixelFormat(8, 16), "--views.std has 3 values, but the images have 8"),
    ],
)
def test_a_normalization_that_does_not_fit_the_images(options, pixel_format, cause):
    with pytest.raises(UserError, match="^" + re.escape(cause)):
        AugmentConfig(**options).for_images(pixel_format, {})


@pytest.mark.parametrize(
    ("arguments", "mean", "std"),
    [
        ("--views.mean 0.5 0.25 0 --views.std 0.1", (0.5, 0.25, 0.0), (0.1,)),
        ("--views.mean 0.5 --epochs 3", (0.5,), None),
        ("--views.std=None", None, None),
    ],
)
def test_mean_and_std_on_the_command_line(arguments, mean, std):
    views = parse(PRETRAIN, ["--preset", "cifar10", "--data", "x", *arguments.split()], prog="train.py").views
    assert (views.mean, views.std) == (mean, std)
    with pytest.raises(UserError, match=r"^--views\.std can't be 'a'; see train\.py --help\.$"):
        parse(PRETRAIN, ["--views.std", "a"], prog="train.py")
