"""Tests of the OpenCV backend's sizes, threads and memory; for its views see test_backends.py."""

import numpy as np
import pytest
import torch

from pipeline.augment.config import AugmentConfig
from pipeline.augment.opencv import SMALL, OpenCVBackend
from pipeline.augment.params import center_crop
from pipeline.images.pixel_format import RGB8
from tests.pipeline.augment import reference_views as reference

CONFIG = AugmentConfig(size=64).for_images(RGB8, {})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backend():
    backend = OpenCVBackend(CONFIG, CPU, 12, 2, 2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def photographs():
    return reference.photographs(12, seed=1)


def deviation(encoded, params, config) -> tuple[float, float]:
    backend = OpenCVBackend(config.for_images(RGB8, {}), CPU, len(encoded), len(params.flip), 2)
    views = backend(encoded, params)
    backend.close()
    return reference.deviation(views, reference.reference_views(encoded, params, config), config)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (AugmentConfig(), reference.SIZES),
        (AugmentConfig(size=96), ((600, 801), (97, 1200))),
        (AugmentConfig(size=32, jitter_strength=0.5, blur_p=0), ((32, 32),)),
        (AugmentConfig(size=SMALL), ((SMALL, SMALL), (SMALL + 1, SMALL), (7, 3))),
    ],
    ids=["224", "96 from large", "32 from 32", "largest by matrix products"],
)
def test_view_and_image_sizes(config, sizes):
    encoded = reference.photographs(6, seed=3, sizes=sizes)
    params = reference.random_params(encoded, config, seed=2)
    crop_mean, crop_largest = deviation(encoded, reference.keep_only(params), config)
    mean, _ = deviation(encoded, params, config)
    assert crop_mean < 0.3 and crop_largest < 2 and mean < 0.8


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (2, 3)])
def test_the_smallest_images(size):
    encoded = [reference.encode(reference.smooth_field(1, 0, *size), "PNG")]
    # 64 px are resized by torch, which clips between its two passes like PIL: up to 6 levels next to a hard edge
    for config, largest in (AugmentConfig(size=32), 0.51), (AugmentConfig(size=64), 6):
        assert deviation(encoded, reference.random_params(encoded, config, seed=1), config)[0] < 1.0
        center = center_crop(config, np.array(size[:1]), np.array(size[1:]))
        assert deviation(encoded, center, config)[1] < largest


def test_views_do_not_depend_on_the_number_of_threads(backend, photographs):
    params = reference.random_params(photographs, CONFIG, seed=4)
    views = backend(photographs, params)
    for workers in 1, 3, 16:
        other = OpenCVBackend(CONFIG, CPU, 12, 2, workers)
        assert torch.equal(other(photographs, params), views)
        part = other(photographs[3:10], reference.select(params, slice(3, 10)))
        assert torch.equal(part, views.view(2, 12, 3, 64, 64)[:, 3:10].flatten(0, 1))
        other.close()


def test_memory_is_reused_once_a_batch_is_released(backend, photographs):
    params = [reference.random_params(photographs, CONFIG, seed) for seed in range(4)]
    first = backend(photographs, params[0])
    kept, address = first[5:7], first.data_ptr()  # a slice keeps the whole batch alive
    before = kept.clone()
    del first
    others = [backend(photographs, drawn) for drawn in params]
    assert torch.equal(kept, before) and len({address, *(other.data_ptr() for other in others)}) == 5
    array = others[1].numpy()  # so does an array over it
    content = array.copy()
    del kept, others
    part = backend(photographs[:7], reference.select(params[1], slice(0, 7)))  # smaller batches reuse it as well
    again = [backend(photographs, drawn) for drawn in params[1:]]
    assert address in {part.data_ptr(), *(views.data_ptr() for views in again)}
    assert np.array_equal(array, content)
