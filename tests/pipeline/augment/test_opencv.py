"""The OpenCV backend against the float reference: each operation by itself and all together."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.augment.config import AugmentConfig
from pipeline.augment.opencv import SMALL, OpenCVBackend
from pipeline.augment.params import center_crop
from pipeline.images import DecodeError
from tests.pipeline.augment import reference_views as reference

RECIPE, AFFINE = AugmentConfig(size=64), AugmentConfig(size=64, jitter="affine")
JITTER = ("brightness", "contrast", "saturation", "hue")
ALL = ("flip", *JITTER, "gray", "sigma")


@pytest.fixture(scope="module")
def backend():
    backend = OpenCVBackend(RECIPE, torch.device("cpu"), 12, 2, 2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def affine_backend():
    backend = OpenCVBackend(AFFINE, torch.device("cpu"), 12, 2, 2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def photographs():
    return reference.photographs(12, seed=1)


def deviation(photographs, parameters, recipe=RECIPE, views=2) -> tuple[float, float]:
    backend = OpenCVBackend(recipe, torch.device("cpu"), len(photographs), views, 2)
    rows = backend(photographs, parameters)
    backend.close()
    return reference.deviation(rows, reference.reference_views(photographs, parameters, recipe), recipe)


# In levels of 255: rounding to whole levels costs 0.25 on average, and once more after every operation. The hue comes
# on a wheel of 256 steps; a strong factor multiplies what was rounded before it.
@pytest.mark.parametrize(
    ("names", "mean", "largest"),
    [
        ((), 0.3, 2),
        (("flip",), 0.3, 2),
        (("brightness",), 0.4, 3),
        (("contrast",), 0.4, 3),
        (("saturation",), 0.4, 3.5),
        (("hue",), 0.8, 12),
        (JITTER, 0.8, 20),
        (("gray",), 0.35, 2),
        (("sigma",), 0.3, 2),
        (ALL, 0.7, 12),
    ],
    ids=lambda value: "+".join(value) or "crop" if isinstance(value, tuple) else None,
)
def test_views_follow_the_definitions(backend, photographs, names, mean, largest):
    parameters = reference.keep_only(reference.drawn_parameters(photographs, RECIPE, seed=2), *names)
    views = backend(photographs, parameters)
    assert views.shape == (24, 3, 64, 64) and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    expected = reference.reference_views(photographs, parameters, RECIPE)
    found = reference.deviation(views, expected, RECIPE)
    assert found[0] < mean and found[1] < largest


# The affine jitter rounds once for all four, and once more for gray and for blur.
@pytest.mark.parametrize(
    ("names", "mean", "largest"),
    [
        (("brightness",), 0.4, 3),
        (("contrast",), 0.4, 3),
        (("saturation",), 0.4, 3.5),
        (("hue",), 0.4, 4),
        (JITTER, 0.4, 4),
        (("gray",), 0.35, 2),
        ((*JITTER, "gray"), 0.4, 4),
        (ALL, 0.4, 4),
    ],
    ids=lambda value: "+".join(value) or "crop" if isinstance(value, tuple) else None,
)
def test_the_affine_jitter_follows_its_definition(affine_backend, photographs, names, mean, largest):
    parameters = reference.keep_only(reference.drawn_parameters(photographs, AFFINE, seed=2), *names)
    expected = reference.reference_views(photographs, parameters, AFFINE)
    found = reference.deviation(affine_backend(photographs, parameters), expected, AFFINE)
    assert found[0] < mean and found[1] < largest


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        (AugmentConfig(), reference.SIZES),
        (AugmentConfig(size=96), ((600, 801), (97, 1200))),
        (AugmentConfig(size=32, jitter_strength=0.5, blur_p=0), ((32, 32),)),
        (AugmentConfig(size=SMALL), ((SMALL, SMALL), (SMALL + 1, SMALL), (7, 3))),
    ],
    ids=["224", "96 from large", "32 from 32", "the border of the small route"],
)
def test_every_size(recipe, sizes):
    encoded = reference.photographs(6, seed=3, sizes=sizes)
    parameters = reference.drawn_parameters(encoded, recipe, seed=2)
    crop_mean, crop_largest = deviation(encoded, reference.keep_only(parameters), recipe)
    mean, _ = deviation(encoded, parameters, recipe)
    assert crop_mean < 0.3 and crop_largest < 2 and mean < 0.8


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (2, 3)])
def test_the_smallest_images(size):
    encoded = [reference.encode(reference.smooth_field(1, 0, *size), "PNG")]
    # at 64 by torch, which clips to 0..255 between its two passes, as PIL does: 6 levels beside a hard edge
    for recipe, largest in (AugmentConfig(size=32), 0.51), (AugmentConfig(size=64), 6):
        assert deviation(encoded, reference.drawn_parameters(encoded, recipe, seed=1), recipe)[0] < 1.0
        center = center_crop(recipe, np.array(size[:1]), np.array(size[1:]))
        assert deviation(encoded, center, recipe, views=1)[1] < largest


def test_each_sample_has_its_own_jitter_order(photographs):
    parameters = reference.keep_only(reference.drawn_parameters(photographs, RECIPE, seed=2), *JITTER)
    expected = reference.reference_views(photographs, parameters, RECIPE)
    backwards = replace(parameters, order=parameters.order[..., ::-1])
    backend = OpenCVBackend(RECIPE, torch.device("cpu"), 12, 2, 1)
    assert reference.deviation(backend(photographs, backwards), expected, RECIPE)[0] > 2  # the tolerance can tell
    backend.close()


def test_extreme_factors(photographs):
    """Strengths at the ends of their ranges, where clipping and the wrap of the color wheel matter most."""
    parameters = reference.keep_only(reference.drawn_parameters(photographs, RECIPE, seed=3))
    signs = np.where(np.arange(12) % 2, 1, -1).astype(np.float32) * np.array([[1], [-1]], np.float32)
    for name, values, mean in (
        ("brightness", 1 + signs, 0.4),
        ("contrast", 1 + signs, 0.5),
        ("saturation", 1 + signs, 0.6),
        ("hue", 0.5 * signs, 1.0),
    ):
        assert deviation(photographs, replace(parameters, **{name: values}))[0] < mean, name


def test_the_result_does_not_depend_on_the_threads(backend, photographs):
    parameters = reference.drawn_parameters(photographs, RECIPE, seed=4)
    views = backend(photographs, parameters)
    for workers in 1, 3, 16:
        other = OpenCVBackend(RECIPE, torch.device("cpu"), 12, 2, workers)
        assert torch.equal(other(photographs, parameters), views)
        part = other(photographs[3:10], reference.take(parameters, slice(3, 10)))
        assert torch.equal(part, views.view(2, 12, 3, 64, 64)[:, 3:10].flatten(0, 1))
        other.close()


@pytest.mark.parametrize("damage", [b"", b"not an image at all", "cut", "head"], ids=["empty", "text", "cut", "head"])
def test_a_damaged_image_raises_and_the_next_call_works(backend, photographs, damage):
    damaged = {"cut": photographs[1][: len(photographs[1]) // 2], "head": photographs[1][:80]}.get(damage, damage)
    parameters = reference.take(reference.drawn_parameters(photographs, RECIPE, seed=6), slice(0, 3))
    before = backend(photographs[:3], parameters)
    with pytest.raises(DecodeError, match="can't be decoded") as error:
        backend([photographs[0], damaged, photographs[2]], parameters)
    assert error.value.args[1] == 1
    assert torch.equal(backend(photographs[:3], parameters), before)


def test_formats_and_color_models(backend):
    picture = reference.smooth_field(7, 0, 90, 120)
    exif = picture.getexif()
    exif[0x0112] = 6  # a quarter turn, to be ignored
    encoded = [
        *(reference.encode(picture, form) for form in ("PNG", "WEBP", "BMP", "TIFF")),
        reference.encode(picture.convert("L"), "JPEG"),
        reference.encode(picture.convert("L"), "PNG"),
        reference.encode(picture.convert("P"), "PNG"),
        reference.encode(picture.convert("CMYK"), "JPEG"),
        reference.encode(picture.convert("RGBA"), "PNG"),
        reference.encode(picture, "JPEG", progressive=True, subsampling=2),
        reference.encode(picture, "JPEG", exif=exif),
    ]
    parameters = reference.keep_only(reference.drawn_parameters(encoded, RECIPE, seed=8))
    mean, largest = deviation(encoded, parameters)
    assert mean < 0.4 and largest < 6  # the hard edges of the palette


def test_memory_is_written_again_once_nobody_holds_it(backend, photographs):
    parameters = [reference.drawn_parameters(photographs, RECIPE, seed) for seed in range(4)]
    first = backend(photographs, parameters[0])
    kept, address = first[5:7], first.data_ptr()  # a part holds the whole
    before = kept.clone()
    del first
    others = [backend(photographs, drawn) for drawn in parameters]
    assert torch.equal(kept, before) and len({address, *(other.data_ptr() for other in others)}) == 5
    array = others[1].numpy()  # as does an array over it
    content = array.copy()
    del kept, others
    part = backend(photographs[:7], reference.take(parameters[1], slice(0, 7)))  # smaller batches take it as well
    again = [backend(photographs, drawn) for drawn in parameters[1:]]
    assert address in {part.data_ptr(), *(views.data_ptr() for views in again)}
    assert np.array_equal(array, content)
