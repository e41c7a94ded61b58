"""Tests of DALI's graph for the GPU, built and inspected without one; for its views see test_backends.py."""

import importlib
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from unittest.mock import Mock

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")

from nvidia.dali import backend as dali

from common import UserError
from pipeline.augment import dali as dali_backend
from pipeline.augment.config import AugmentConfig
from pipeline.augment.dali import DaliBackend, view_graph
from pipeline.augment.gpu import warn_once
from pipeline.images.files import DecodeError
from pipeline.images.pixel_format import RGB8
from tests.pipeline.augment import reference_views as reference


@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_the_gpu_graph_keeps_the_pixels_on_the_gpu(jitter):
    """Every operator of the serialized graph runs on the device where its input is."""
    graph = view_graph(
        AugmentConfig(jitter=jitter).for_images(RGB8, {}), True, 2, batch_size=256, num_threads=2, device_id=None
    )
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
        "_ArithmeticGenericOp",  # conditions
        "_conditional__Split",  # arguments of operators
    }


def test_buffers_do_not_grow_with_the_batch(monkeypatch):
    """The batch size of the graph bounds every intermediate result."""
    sizes = []
    monkeypatch.setattr(dali_backend, "view_graph", lambda *_, batch_size, **__: sizes.append(batch_size) or Mock())
    for batch_size in 2, 256, 4096:
        DaliBackend(CONFIG, torch.device("cpu"), batch_size, 2, 1)
    assert sizes == [2, 256, 256]


def _operators(pipeline: bytes) -> Iterator[tuple[str, str]]:
    """Yield (schema, device) of each operator of a serialized pipeline, field 5 of the message."""
    for number, operator in _fields(pipeline):
        if number == 5:
            device = re.search(rb"\n\x06device\x12\x06string\*.(cpu|gpu|mixed)", operator)
            yield dict(reversed(list(_fields(operator))))[1].decode(), device[1].decode()


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield (number, value) of each field of a protobuf message of varints and length-delimited fields."""
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


def test_missing_dali_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "pipeline.augment.dali")
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda120"):
        importlib.import_module("pipeline.augment.dali")


DECODER = "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image`,\nencountered:\n\n"
JPEG = reference.encode(reference.smooth_field(9, 0, 90, 120), "JPEG")
CONFIG = AugmentConfig(size=32).for_images(RGB8, {})


@pytest.fixture(autouse=True)
def nothing_logged_yet():
    warn_once.cache_clear()


@pytest.fixture(scope="module")
def backend():
    backend = DaliBackend(CONFIG, torch.device("cpu"), 2, 2, 1)
    yield backend
    backend.close()


def test_batches_decoded_on_the_host_are_logged_once(backend, caplog):
    unusual = JPEG[:20] + b"\x01\x02\x03" + JPEG[20:]  # DALI refuses bytes between segments
    params = reference.random_params([JPEG, JPEG], CONFIG, seed=1)
    expected = backend([JPEG, JPEG], params)
    assert not caplog.records
    for _ in range(2):
        assert (backend([JPEG, unusual], params) - expected).abs().max() < 1e-5
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "decoded on the host" in record.message


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory", torch.OutOfMemoryError),
        ("Failed to decode sample #0 : CUDA allocation failed", torch.OutOfMemoryError),
        ("Can't allocate 1073741824 bytes on device 0.", torch.OutOfMemoryError),
        ("nvImageCodec failure: '#5'", torch.OutOfMemoryError),  # allocator
        ("nvImageCodec failure: '#15'", torch.OutOfMemoryError),  # allocator of a codec
        ("nvImageCodec failure: '#20'", RuntimeError),  # execution failed
        ("CUDA runtime API error cudaErrorIllegalAddress (700)", RuntimeError),
    ],
)
def test_errors_of_the_gpu_in_the_decoder_are_raised(backend, monkeypatch, reason, kind):
    calls = []

    def run(encoded, params):
        calls.append(encoded)
        raise RuntimeError(DECODER + reason)

    monkeypatch.setattr(backend, "_run", run)
    with pytest.raises(RuntimeError, match=re.escape(reason)) as raised:
        backend([JPEG], reference.random_params([JPEG], CONFIG, seed=1))
    assert raised.type is kind and len(calls) == 1


def test_truncated_jpegs_are_refused_before_a_decoder_that_accepts_them(backend, monkeypatch):
    """nvJPEG may decode a truncated file without an error."""
    monkeypatch.setattr(backend, "_run", lambda encoded, _: [torch.zeros(len(encoded), 3, 32, 32)] * 2)
    params = reference.random_params([JPEG, JPEG], CONFIG, seed=1)
    assert backend([JPEG, JPEG], params).shape == (4, 3, 32, 32)
    for length in np.linspace(4, len(JPEG) - 1, 30).astype(int):
        with pytest.raises(DecodeError) as error:
            backend([JPEG, JPEG[:length]], params)
        assert error.value.args[1] == 1
