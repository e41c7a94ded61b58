"""Tests of the OpenCV backend's sizes, slices, threads and memory; for its views see test_backends.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import compiled
from pipeline.augment.config import AugmentConfig
from pipeline.augment.opencv import OpenCVBackend
from pipeline.augment.params import center_crop, draw_params
from pipeline.images.files import DecodeError, decode
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
        (AugmentConfig(size=65), ((64, 64), (65, 64), (7, 3))),
    ],
    ids=["224", "96 from large", "32 from 32", "65"],
)
def test_view_and_image_sizes(config, sizes):
    encoded = reference.photographs(6, seed=3, sizes=sizes)
    params = reference.random_params(encoded, config, seed=2)
    crop_mean, crop_largest = deviation(encoded, reference.keep_only(params), config)
    mean, _ = deviation(encoded, params, config)
    assert crop_mean < 0.26 and crop_largest < 0.51 and mean < 0.8


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (2, 3)])
def test_the_smallest_images(size):
    encoded = [reference.encode(reference.smooth_field(1, 0, *size), "PNG")]
    for config in map(AugmentConfig, (8, 64, 65)):
        assert deviation(encoded, reference.random_params(encoded, config, seed=1), config)[0] < 1.0
        center = center_crop(config, np.array(size[:1]), np.array(size[1:]))
        assert deviation(encoded, center, config)[1] < 0.51


def test_views_do_not_depend_on_the_number_of_threads(backend, photographs):
    params = reference.random_params(photographs, CONFIG, seed=4)
    views = backend(photographs, params)
    for workers in 1, 3, 16:
        other = OpenCVBackend(CONFIG, CPU, 12, 2, workers)
        assert torch.equal(other(photographs, params), views)
        part = other(photographs[3:10], reference.select(params, slice(3, 10)))
        assert torch.equal(part, views.view(2, 12, 3, 64, 64)[:, 3:10].flatten(0, 1))
        other.close()


@pytest.mark.parametrize("size", [8, 31, 64, 97, 224])
def test_geometry_is_exact(size):
    """Crops of noise, whose edges are hard, are enlarged and shrunk; half of them are flipped."""
    random, config = np.random.default_rng(size), AugmentConfig(size=size)
    shapes = ((40, 56), (9, 7), (64, 64), (130, 30), (2, 150), (211, 190))
    images = [random.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    encoded = [reference.encode(Image.fromarray(image), "PNG") for image in images]
    params = reference.keep_only(reference.random_params(encoded, config, seed=5), "flip")
    assert 0 < params.flip.mean() < 1
    assert deviation(encoded, params, config)[1] < 0.501  # half a level, and float32


@pytest.mark.parametrize("size", [48, 224])
def test_resizing_matches_pil(size):
    """Photographs, because PIL clips and rounds between the two passes of resizing, which matters at hard edges."""
    config = AugmentConfig(size=size).for_images(RGB8, {})
    encoded = reference.photographs(6, seed=7, sizes=((400, 500), (256, 320), (150, 90)))
    params = reference.keep_only(reference.random_params(encoded, config, seed=5))
    backend = OpenCVBackend(config, CPU, len(encoded), 2, 2)
    levels = reference.denormalize(backend(encoded, params), config).round()
    backend.close()
    for (v, i), view in zip(np.ndindex(params.flip.shape), levels, strict=True):
        top, left, height, width = params.crop[v, i].tolist()
        crop = Image.fromarray(decode(encoded[i])).crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(view.permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("size", [8, 31, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.8, 1.3, 2])
def test_blur_is_exact(size, sigma):
    """Noise, blurred by the whole window in float64; the weights beyond 4 sigma may change 1/20 of a level."""
    config = AugmentConfig(size=size, crop_area=(1, 1))
    image = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    encoded = [reference.encode(Image.fromarray(image), "PNG")]
    params = center_crop(config, np.array([size]), np.array([size]))
    params = replace(params, crop=np.int32([[[0, 0, size, size]]]), sigma=np.float32([[sigma]]))
    assert deviation(encoded, params, config)[1] < 0.55


def test_decoded_images_give_the_views_of_encoded_ones(backend, photographs):
    """Also arrays that cannot be written, or whose lines or pixels are not contiguous."""
    params = reference.random_params(photographs, CONFIG, seed=4)
    views = backend(photographs, params)
    images = list(map(decode, photographs))
    images[0].flags.writeable = False
    images[1] = np.pad(images[1], ((0, 0), (3, 5), (0, 0)))[:, 3:-5]
    images[2] = np.ascontiguousarray(images[2][..., ::-1])[..., ::-1]
    images[3] = np.asfortranarray(images[3])
    before = [image.copy() for image in images]
    assert torch.equal(backend(images, params), views)
    assert all(map(np.array_equal, images, before))


@pytest.mark.parametrize("workers", [1, 5])
def test_a_bad_image_is_found_in_its_slice(photographs, workers):
    params = reference.random_params(photographs, CONFIG, seed=4)
    backend = OpenCVBackend(CONFIG, CPU, 12, 2, workers)
    crop = params.crop.copy()
    crop[1, 7, 3] += 400
    for images, wrong in ([*photographs[:7], b"", *photographs[8:]], params), (photographs, replace(params, crop=crop)):
        with pytest.raises(DecodeError) as error:
            backend(images, wrong)
        assert error.value.args[1] == 7
    backend.close()


@pytest.mark.parametrize("views", [1, 2])
def test_compiled_views_refuse_what_would_be_read_or_written_out_of_bounds(views):
    backend = OpenCVBackend(AugmentConfig(size=16, mean=(0.5,), std=(0.25,)), torch.device("cpu"), 2, views, 1)
    params = draw_params(backend.config, 0, 0, np.arange(2), np.full(2, 20), np.full(2, 20), views=2)
    channels = 3 if views == 1 else 1
    with pytest.raises(ValueError, match=r"views of .* uint8 images are expected"):
        backend([np.zeros((20, 20, channels), np.uint8)] * 2, params)
    backend.close()


@pytest.mark.parametrize("size", [16, 224])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_batch_waits_for_the_compiler(photographs, dtype, size):
    backend = OpenCVBackend(replace(CONFIG, size=size), CPU, 12, 2, 2, dtype)
    before = list(compiled._render.signatures)
    for images in photographs, list(map(decode, photographs)):
        for jitter in False, True:
            backend.compiled.affine = jitter
            backend(images, reference.random_params(photographs, CONFIG, seed=4))
    backend.close()
    assert before and compiled._render.signatures == before


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
