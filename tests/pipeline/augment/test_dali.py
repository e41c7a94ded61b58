"""DALI's views against the float reference; the graph for the GPU is built and inspected, but needs one to run."""

import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is there for Linux only")

from nvidia.dali import backend as dali

from common import UserError
from pipeline.augment.config import AugmentConfig
from pipeline.augment.dali import DaliBackend, view_graph
from pipeline.augment.params import ORDERS
from pipeline.images import DecodeError
from tests.pipeline.augment import reference_views as reference

RECIPE, AFFINE = AugmentConfig(size=64), AugmentConfig(size=64, jitter="affine")
JITTER = ("brightness", "contrast", "saturation", "hue")
ALL = ("flip", *JITTER, "gray", "sigma")


@pytest.fixture(scope="module")
def backend():
    backend = DaliBackend(RECIPE, torch.device("cpu"), 12, 2, 2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def affine_backend():
    backend = DaliBackend(AFFINE, torch.device("cpu"), 12, 2, 2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def photographs():
    return reference.photographs(12, seed=1)


# In levels of 255. The mean is bounded by float32 and by DALI's rounded YIQ matrix (saturation, gray); the largest by
# the border of an enlarged crop, where DALI's bicubic repeats the last pixel and torchvision drops its weight.
@pytest.mark.parametrize(
    ("names", "mean", "largest"),
    [
        ((), 0.01, 1.5),
        (("flip",), 0.01, 1.5),
        (("brightness",), 0.01, 2),
        (("contrast",), 0.02, 2),
        (("saturation",), 0.1, 2),
        (("hue",), 0.01, 2),
        (JITTER, 0.1, 3),
        (("gray",), 0.05, 1.5),
        (("sigma",), 0.01, 1.5),
        (ALL, 0.1, 3),
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


# DALI's color_twist rounds the matrix of YIQ to three places.
@pytest.mark.parametrize(
    ("names", "mean", "largest"),
    [
        (("brightness",), 0.01, 2),
        (("contrast",), 0.02, 2),
        (("saturation",), 0.1, 2),
        (("hue",), 0.1, 2),
        (JITTER, 0.1, 3),
        (("gray",), 0.05, 1.5),
        ((*JITTER, "gray"), 0.1, 3),
        (ALL, 0.1, 3),
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
    orders = {tuple(order) for order in parameters.order.reshape(-1, 4)}
    assert len(orders) > 6


def test_extreme_factors(backend, photographs):
    """Strengths at the ends of their ranges, where clipping and the wrap of the color wheel matter most."""
    parameters = reference.keep_only(reference.drawn_parameters(photographs, RECIPE, seed=3))
    signs = np.where(np.arange(12) % 2, 1, -1).astype(np.float32) * np.array([[1], [-1]], np.float32)
    factor = 1 + 0.8 * signs
    parameters = replace(parameters, brightness=factor, contrast=factor, saturation=factor, hue=0.5 * signs)
    expected = reference.reference_views(photographs, parameters, RECIPE)
    mean, _ = reference.deviation(backend(photographs, parameters), expected, RECIPE)
    assert mean < 0.1


def test_batches_may_be_smaller_than_the_largest(backend, photographs):
    parameters = reference.drawn_parameters(photographs, RECIPE, seed=4)
    whole = backend(photographs, parameters).view(2, 12, 3, 64, 64)
    for part in slice(0, 1), slice(3, 10), slice(0, 12):
        views = backend(photographs[part], reference.take(parameters, part))
        torch.testing.assert_close(views, whole[:, part].flatten(0, 1), rtol=0, atol=0)


def test_a_result_outlives_later_calls(backend, photographs):
    parameters = reference.drawn_parameters(photographs, RECIPE, seed=4)
    views = backend(photographs, parameters)
    before = views.clone()
    for seed in range(3):
        backend(photographs, reference.drawn_parameters(photographs, RECIPE, seed))
    assert torch.equal(views, before)


def test_one_view(photographs):
    backend = DaliBackend(RECIPE, torch.device("cpu"), 4, 1, 1)
    parameters = reference.drawn_parameters(photographs[:4], RECIPE, seed=4, views=1)
    expected = reference.reference_views(photographs[:4], parameters, RECIPE)
    mean, _ = reference.deviation(backend(photographs[:4], parameters), expected, RECIPE)
    assert mean < 0.1
    backend.close()


@pytest.mark.parametrize("damage", [b"", b"not an image at all", "cut", "head"], ids=["empty", "text", "cut", "head"])
def test_a_damaged_image_raises_and_the_next_call_works(backend, photographs, damage):
    damaged = {"cut": photographs[1][: len(photographs[1]) // 2], "head": photographs[1][:80]}.get(damage, damage)
    parameters = reference.take(reference.drawn_parameters(photographs, RECIPE, seed=6), slice(0, 3))
    before = backend(photographs[:3], parameters)
    with pytest.raises(DecodeError, match=r"can't (be )?decode") as error:
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
    assert mean < 0.02 and largest < 1.5


@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_the_gpu_graph_keeps_the_pixels_on_the_gpu(jitter):
    """Built and serialized without a GPU: every operator has the variant that its place asks for."""
    graph = view_graph(AugmentConfig(jitter=jitter), True, 2, batch_size=256, num_threads=2, device_id=None)
    operators = Counter(_operators(graph.serialize()))
    registered = {"cpu": dali.RegisteredCPUOps(), "gpu": dali.RegisteredGPUOps(), "mixed": dali.RegisteredMixedOps()}
    assert all(schema in registered[device] for schema, device in operators)
    pixels = "Slice Resize ColorTwist GaussianBlur CropMirrorNormalize reductions__Mean reductions__Sum"
    pixels += " _TensorSubscript" if jitter == "exact" else ""
    assert operators["decoders__Image", "mixed"] == 1  # once for both views
    for schema in pixels.split():
        assert operators[schema, "gpu"] >= 2 and operators[schema, "cpu"] == 0
    assert {schema for schema, device in operators if device == "cpu"} <= {
        "ExternalSource",
        "_ArithmeticGenericOp",  # of the conditions
        "_conditional__Split",  # of the named arguments
    }


def _operators(pipeline: bytes) -> Iterator[tuple[str, str]]:
    """(schema, device) of each operator of a serialized pipeline: field 5 of the message, in it the name is field 1."""
    for number, operator in _fields(pipeline):
        if number == 5:
            device = re.search(rb"\n\x06device\x12\x06string\*.(cpu|gpu|mixed)", operator)
            yield dict(reversed(list(_fields(operator))))[1].decode(), device[1].decode()


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The (number, value) pairs of a protobuf message made of varints and length-delimited fields."""
    position = 0

    def varint():
        nonlocal position
        value, shift = 0, 0
        while True:
            byte = message[position]
            position, value, shift = position + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while position < len(message):
        number, wire = divmod(varint(), 8)
        value = varint()
        if wire == 2:
            position, value = position + value, message[position : position + value]
        yield number, value


def test_without_dali_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "pipeline.augment.dali")
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda120"):
        importlib.import_module("pipeline.augment.dali")
