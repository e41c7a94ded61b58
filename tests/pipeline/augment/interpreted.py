"""The Triton backend in Triton's interpreter, on the CPU: run by test_triton.py with TRITON_INTERPRET=1."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from bench.views_static import tensor_core_flops
from pipeline.augment import gpu
from pipeline.augment.backend import create_backend
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import AugmentParams
from pipeline.augment.triton import render
from pipeline.images.files import DecodeError, decode
from tests.pipeline.augment import reference_views as reference

CPU = torch.device("cpu")
SIZES = ((37, 45), (29, 51), (13, 21))  # (height, width)
MEAN, LARGEST = 0.03, 0.4
"""Bounds on the difference to the reference in levels. Resizing and blur round lines of pixels to float16, in steps of
1/16 level for the darkest and brightest; three factors of 1.8 multiply two errors of half a step to 0.36 levels."""


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return reference.photographs(3, seed=1, sizes=SIZES)


@pytest.fixture
def views_of():
    """Views by a backend: views_of(name, config, images, params)."""
    opened = []

    def render_views(name, config, images, params, dtype=torch.float32):
        opened.append(create_backend(name, config, CPU, len(images), len(params.flip), 1, dtype))
        return opened[-1](images, params)

    yield render_views
    for backend in opened:
        backend.close()


def check(views_of, config, images, params, levels=2.0):
    """Compare with the reference, and with the OpenCV backend to `levels` in the mean of each view."""
    views = views_of("triton", config, images, params)
    assert views.shape == (params.flip.size, 3, config.size, config.size) and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    mean, largest = reference.deviation(views, reference.reference_views(images, params, config), config)
    assert mean < MEAN and largest < LARGEST
    found, opencv = (
        reference.denormalize(each, config) for each in (views, views_of("opencv", config, images, params))
    )
    assert (found - opencv).abs().mean((1, 2, 3)).max() < levels


# bounds between backends as in test_backends.py: OpenCV rounds to whole levels, and its hue has steps of 1/256 turn
LEVELS = {"exact": 2, "affine": 1}


@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_whole_views_match_the_reference(views_of, images, jitter):
    config = AugmentConfig(size=32, jitter=jitter)
    params = reference.random_params(images[:2], config, seed=2)
    assert all((getattr(params, name) != value).any() for name, value in reference.IDENTITY.items())
    check(views_of, config, images[:2], params, LEVELS[jitter])


def test_tiled_views_match_the_reference(views_of, images, monkeypatch):
    """40 px fill one tile of four, and a blur reads beyond it; the products are those of bench/views_static.py."""
    config = AugmentConfig(size=40)
    params = reference.random_params(images[:1], config, seed=2)
    params = replace(params, flip=np.array([[True], [False]]), sigma=np.float32([[1.9], [0]]))
    params = replace(params, contrast=np.float32([[0.4], [1.5]]))  # whose mean gray is that of all tiles
    create_dot, flops = InterpreterBuilder.create_dot, []

    def counting(self, a, b, d, *options):
        flops.append(2 * a.data.size * b.data.shape[1])
        return create_dot(self, a, b, d, *options)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    check(views_of, config, images[:1], params, LEVELS["exact"])
    assert sum(flops) == tensor_core_flops(params, config)


def test_extreme_factors_and_order(views_of, images):
    """Strengths at the ends of their ranges, where clipping and the wrap of the color wheel matter most."""
    config = AugmentConfig(size=16)
    params = reference.keep_only(reference.random_params(images, config, seed=3, views=1))
    sign = np.array([[1, -1, 1]], np.float32)
    changed = {name: 1 + 0.8 * sign for name in ("brightness", "contrast", "saturation")} | {"hue": 0.5 * sign}
    params = replace(params, **changed)
    check(views_of, config, images, params)
    views = views_of("triton", config, images, replace(params, order=params.order[..., ::-1]))
    assert reference.deviation(views, reference.reference_views(images, params, config), config)[0] > 1


def test_pixels_are_read_through_their_strides(views_of, images):
    """Encoded, interleaved, planar as nvJPEG decodes, and a part of a larger tensor: the same views, bit for bit.

    Neither does the rest of the batch change a view.
    """
    config = AugmentConfig(size=16)
    params = reference.random_params(images[:1], config, seed=4, views=1)
    array = decode(images[0])
    planar = torch.from_numpy(array).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    inside = torch.from_numpy(np.pad(array, ((3, 1), (2, 5), (0, 0))))[3:-1, 2:-5]
    three = AugmentParams(**{name: np.repeat(values, 3, 1) for name, values in vars(params).items()})
    views = views_of("triton", config, [array, planar, inside], three)
    alone = views_of("triton", config, images[:1], params)
    assert all(torch.equal(view, alone[0]) for view in views)


def test_chunks_of_a_batch(views_of, images, monkeypatch):
    """Chunks are rendered into their rows of the batch; an unreadable image is named by its place in the batch."""
    config = AugmentConfig(size=16)
    params = reference.random_params(images, config, seed=4)

    def render_means(images, params, config, out):
        assert out.shape == (2, len(images), 3, 16, 16) and params.flip.shape == (2, len(images))
        out.copy_(torch.stack([image.float().mean() for image in images])[:, None, None, None])

    monkeypatch.setattr("pipeline.augment.triton.backend.render", render_means)
    monkeypatch.setattr(gpu, "CHUNK", 2)
    views = views_of("triton", config, images, params)
    assert views[:, 0, 0, 0].tolist() == pytest.approx([decode(file).mean() for file in images] * 2)
    small = reference.photographs(1, seed=1, sizes=((9, 9),))[0]
    for bad in (b"damaged", small):  # the latter is smaller than its crop
        with pytest.raises(DecodeError) as error:
            views_of("triton", config, [*images[:2], bad], params)
        assert error.value.args[1] == 2


def test_bfloat16_views_and_a_single_copy_of_parameters(views_of, images, monkeypatch):
    config = AugmentConfig(size=16)
    params = reference.random_params(images[:1], config, seed=4, views=1)
    expected = views_of("triton", config, images[:1], params)
    copied = []
    monkeypatch.setattr(render, "copy_to", lambda device, array: copied.append(array) or torch.from_numpy(array))
    views = views_of("triton", config, images[:1], params, torch.bfloat16)
    assert views.dtype == torch.bfloat16 and views.is_contiguous(memory_format=torch.channels_last)
    # the interpreter cuts off what the GPU rounds: up to one step of bfloat16
    torch.testing.assert_close(views.float(), expected, rtol=2**-7, atol=0)
    assert [(array.dtype, array.nbytes) for array in copied] == [(np.int32, 112)]


@pytest.mark.soak
@pytest.mark.parametrize("jitter", ["exact", "affine"])
@pytest.mark.parametrize(("size", "count"), [(32, 3), (96, 2), (224, 1)])
def test_views_of_odd_photographs_match_the_reference(views_of, size, count, jitter):
    images = reference.photographs(count, seed=21, sizes=((375, 501), (181, 240), (131, 301)))
    config = AugmentConfig(size=size, jitter=jitter)
    check(views_of, config, images, reference.random_params(images, config, seed=6), LEVELS[jitter])
