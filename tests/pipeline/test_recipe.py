"""The drawn parameters against the numbers of the paper, and against what others have got wrong."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe import ORDERS, Recipe, ViewParameters, central_view, draw_views

N = 20_000


@pytest.fixture(scope="module")
def drawn() -> ViewParameters:
    """Two views of 20,000 images of 500 x 400 under the ImageNet recipe."""
    return draw_views(Recipe(), 0, 0, np.arange(N), np.full(N, 400), np.full(N, 500))


def assert_rate(happened: np.ndarray, probability: float) -> None:
    """Within five standard deviations of a binomial."""
    spread = np.sqrt(probability * (1 - probability) / happened.size)
    assert abs(happened.mean() - probability) < 5 * spread


def assert_uniform(values: np.ndarray, low: float, high: float, slack: float = 1e-6) -> None:
    """Inside the range but for `slack`, and each tenth of it holds a tenth of the values."""
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
    small = area < 0.5  # a window this small always fits, so nothing was rejected
    assert_uniform(area[small], 0.08, 0.5, slack=0.001)  # whole pixels
    assert_uniform(np.log(aspect[small]), -np.log(4 / 3), np.log(4 / 3), slack=0.01)


def test_crops_lie_anywhere(drawn):
    top, left, height, width = np.moveaxis(drawn.crop.astype(float), -1, 0)
    room = 400 - height
    assert (top >= 0).all() and (top <= room).all() and (left >= 0).all() and (left <= 500 - width).all()
    assert_uniform(((top + 0.5) / (room + 1))[room > 100], 0, 1)


def test_rates(drawn):
    jittered = drawn.hue != 0
    for happened, probability in ((drawn.flip, 0.5), (jittered, 0.8), (drawn.gray, 0.2), (drawn.sigma > 0, 0.5)):
        assert_rate(happened, probability)
        assert_rate(happened[0] & happened[1], probability**2)  # the views decide by themselves
    for factor in (drawn.brightness, drawn.contrast, drawn.saturation):
        assert np.array_equal(factor != 1, jittered)  # all four or none
    assert_rate(jittered & drawn.gray & drawn.flip & (drawn.sigma > 0), 0.8 * 0.2 * 0.5 * 0.5)  # nor by each other


@pytest.mark.parametrize(
    ("strength", "low", "high", "hue"), [(1.0, 0.2, 1.8, 0.2), (0.5, 0.6, 1.4, 0.1), (2, 0, 2.6, 0.4)]
)
def test_jitter_ranges(strength, low, high, hue):
    drawn = draw_views(Recipe(jitter_strength=strength), 1, 0, np.arange(5000), np.full(5000, 40), np.full(5000, 40))
    jittered = drawn.hue != 0
    for factor in (drawn.brightness, drawn.contrast, drawn.saturation):
        assert_uniform(factor[jittered], low, high)
    assert_uniform(drawn.hue[jittered], -hue, hue)  # two-sided


def test_all_orders_come_equally_often(drawn):
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
    assert Recipe(size=size).blur_window == window


def test_zero_probabilities_leave_the_image_alone():
    recipe = Recipe(flip_p=0, jitter_p=0, gray_p=0, blur_p=0)
    drawn = draw_views(recipe, 0, 0, np.arange(100), np.full(100, 40), np.full(100, 40))
    assert not (drawn.flip.any() or drawn.gray.any() or drawn.sigma.any() or drawn.hue.any())
    assert (drawn.brightness == 1).all() and (drawn.contrast == 1).all() and (drawn.saturation == 1).all()


sides = st.one_of(st.integers(1, 4), st.integers(1, 5000))


@given(sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=20), seed=st.integers(0, 2**64 - 1))
def test_windows_lie_inside_images_of_any_size(sizes, seed):
    height, width = np.array(sizes).T
    for parameters in (
        draw_views(Recipe(), seed, 0, np.arange(len(sizes)), height, width),
        central_view(Recipe(), height, width),
        central_view(Recipe(size=32), height, width),
    ):
        top, left, h, w = np.moveaxis(parameters.crop, -1, 0)
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
def test_where_no_window_fits_the_crop_is_central(size, window):
    """An aspect of 100 leaves no room for 8 % of the area: the largest central window of an allowed aspect."""
    drawn = draw_views(Recipe(crop_area=(0.5, 1.0)), 0, 0, np.arange(50), np.full(50, size[0]), np.full(50, size[1]))
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
    whole = draw_views(Recipe(), seed, epoch, samples, height, width)
    part = np.array(data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, max_size=6)))
    alone = draw_views(Recipe(), seed, epoch, samples[part], height[part], width[part])
    one_view = draw_views(Recipe(), seed, epoch, samples, height, width, views=1)
    for field in fields(ViewParameters):
        values = getattr(whole, field.name)
        assert np.array_equal(values[:, part], getattr(alone, field.name))
        assert np.array_equal(values[:1], getattr(one_view, field.name))


def test_epochs_seeds_and_views_differ(drawn):
    size = np.full(N, 400), np.full(N, 500)
    others = [draw_views(Recipe(), 0, 1, np.arange(N), *size), draw_views(Recipe(), 1, 0, np.arange(N), *size)]
    for a, b in ((drawn.crop[0], drawn.crop[1]), *((drawn.crop, other.crop) for other in others)):
        assert (a == b).all(-1).mean() < 0.001


def test_central_view():
    height, width = np.array([256, 300, 512, 1]), np.array([256, 400, 256, 7])
    large, small = central_view(Recipe(), height, width), central_view(Recipe(size=32), height, width)
    assert large.crop[0].tolist() == [[16, 16, 224, 224], [19, 69, 262, 262], [144, 16, 224, 224], [0, 3, 1, 1]]
    assert small.crop[0].tolist() == [[0, 0, 256, 256], [0, 50, 300, 300], [128, 0, 256, 256], [0, 3, 1, 1]]
    for parameters in (large, small):
        assert parameters.crop.shape == (1, 4, 4) and parameters.order.shape == (1, 4, 4)
        assert not (parameters.flip.any() or parameters.gray.any() or parameters.sigma.any() or parameters.hue.any())
        assert (np.stack([parameters.brightness, parameters.contrast, parameters.saturation]) == 1).all()
