"""Kornia's views against the float reference, on the CPU; the device part on fake CUDA tensors, without a GPU."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.io import decode_jpeg as decode_jpeg_on_host

from pipeline.augment import kornia as kornia
from pipeline.augment.config import AugmentConfig
from pipeline.augment.kornia import KorniaBackend, augment, decode_on_gpu
from pipeline.augment.params import ORDERS
from pipeline.images import DecodeError, decode
from tests.pipeline.augment import reference_views as reference

RECIPE, AFFINE = AugmentConfig(size=64), AugmentConfig(size=64, jitter="affine")
JITTER = ("brightness", "contrast", "saturation", "hue")
ALL = ("flip", *JITTER, "gray", "sigma")


@pytest.fixture(scope="module")
def backend():
    backend = KorniaBackend(RECIPE, torch.device("cpu"), 12, 2, 2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def affine_backend():
    backend = KorniaBackend(AFFINE, torch.device("cpu"), 12, 2, 2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def photographs():
    return reference.photographs(12, seed=1)


# In levels of 255. Kornia weights red by 0.299, torchvision by 0.2989: all there is where gray comes in.
@pytest.mark.parametrize(
    ("names", "mean", "largest"),
    [
        ((), 0.001, 0.01),
        (("flip",), 0.001, 0.01),
        (("brightness",), 0.001, 0.01),
        (("contrast",), 0.02, 0.1),
        (("saturation",), 0.02, 0.1),
        (("hue",), 0.001, 0.01),
        (JITTER, 0.02, 0.2),
        (("gray",), 0.01, 0.1),
        (("sigma",), 0.001, 0.01),
        (ALL, 0.02, 0.2),
    ],
    ids=lambda value: "+".join(value) or "crop" if isinstance(value, tuple) else None,
)
def test_views_follow_the_definitions(backend, photographs, names, mean, largest):
    parameters = reference.keep_only(reference.drawn_parameters(photographs, RECIPE, seed=2), *names)
    views = backend(photographs, parameters)
    assert views.shape == (24, 3, 64, 64) and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    expected = reference.reference_views(photographs, parameters, RECIPE)
    deviation = reference.deviation(views, expected, RECIPE)
    assert deviation[0] < mean and deviation[1] < largest


# One product of matrices in float32.
@pytest.mark.parametrize(
    ("names", "mean", "largest"),
    [
        (("brightness",), 0.001, 0.01),
        (("contrast",), 0.001, 0.01),
        (("saturation",), 0.001, 0.01),
        (("hue",), 0.001, 0.01),
        (JITTER, 0.001, 0.01),
        (("gray",), 0.001, 0.01),
        ((*JITTER, "gray"), 0.001, 0.01),
        (ALL, 0.001, 0.01),
    ],
    ids=lambda value: "+".join(value) or "crop" if isinstance(value, tuple) else None,
)
def test_the_affine_jitter_follows_its_definition(affine_backend, photographs, names, mean, largest):
    parameters = reference.keep_only(reference.drawn_parameters(photographs, AFFINE, seed=2), *names)
    expected = reference.reference_views(photographs, parameters, AFFINE)
    found = reference.deviation(affine_backend(photographs, parameters), expected, AFFINE)
    assert found[0] < mean and found[1] < largest


def test_each_sample_has_its_own_jitter_order(backend, photographs):
    parameters = reference.keep_only(reference.drawn_parameters(photographs, RECIPE, seed=2), *JITTER)
    one_order = replace(parameters, order=np.broadcast_to(ORDERS[0], parameters.order.shape))
    expected = reference.reference_views(photographs, parameters, RECIPE)
    mean, _ = reference.deviation(backend(photographs, one_order), expected, RECIPE)
    assert mean > 1  # the tolerance above can tell orders apart


def test_one_view_and_part_of_a_batch(backend, photographs):
    parameters = reference.drawn_parameters(photographs[:3], RECIPE, seed=4, views=1)
    views = backend(photographs[:3], parameters)
    expected = reference.reference_views(photographs[:3], parameters, RECIPE)
    assert views.shape == (3, 3, 64, 64)
    assert reference.deviation(views, expected, RECIPE)[0] < 0.02


@pytest.mark.parametrize("damage", [b"", b"not an image at all", "cut"], ids=["empty", "text", "cut"])
def test_a_damaged_image_raises_and_the_next_call_works(backend, photographs, damage):
    damaged = photographs[1][: len(photographs[1]) // 2] if damage == "cut" else damage
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
        reference.encode(picture.convert("CMYK"), "JPEG"),
        reference.encode(picture.convert("RGBA"), "PNG"),
        reference.encode(picture, "JPEG", progressive=True, subsampling=2),
        reference.encode(picture, "JPEG", exif=exif),
    ]
    parameters = reference.keep_only(reference.drawn_parameters(encoded, RECIPE, seed=8))
    expected = reference.reference_views(encoded, parameters, RECIPE)
    mean, largest = reference.deviation(backend(encoded, parameters), expected, RECIPE)
    assert mean < 0.1 and largest < 1.5  # OpenCV rounds CMYK otherwise than PIL, by one level


@pytest.mark.parametrize("recipe", [RECIPE, AFFINE], ids=["exact", "affine"])
def test_nothing_strays_from_the_device(photographs, recipe):
    """Fake tensors refuse to mix devices, and refuse what would make the host wait for a value."""
    parameters = reference.drawn_parameters(photographs, recipe, seed=9)
    assert all((getattr(parameters, name) != value).any() for name, value in reference.IDENTITY.items())
    sizes = [reference.decode(file).shape for file in photographs]
    with FakeTensorMode():
        images = [torch.empty(size, dtype=torch.uint8, device="cuda:0") for size in sizes]
        views = augment(images, parameters, recipe)
    assert views.device == torch.device("cuda:0") and views.shape == (24, 3, 64, 64)
    assert views.is_contiguous(memory_format=torch.channels_last)


def test_what_nvjpeg_refuses_is_left_to_the_host(photographs, monkeypatch):
    """The calls to nvJPEG with libjpeg in its place, which refuses a damaged file in the same way."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(
        kornia, "decode_jpeg", lambda files, mode, device: [decode_jpeg_on_host(f, mode) for f in files]
    )
    device = torch.device("cpu")
    for image, file in zip(decode_on_gpu(photographs, device), photographs, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decode(file))
    assert decode_on_gpu([photographs[0], photographs[1][:80]], device) == [None, None]
    assert decode_on_gpu([], device) == []
