"""Tests of DALI's graph for the GPU, built and inspected without one; for its views see test_backends.py."""

import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")

from nvidia.dali import backend as dali

from common import UserError
from pipeline.augment.config import AugmentConfig
from pipeline.augment.dali import view_graph


@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_the_gpu_graph_keeps_the_pixels_on_the_gpu(jitter):
    """Every operator of the serialized graph runs on the device where its input is."""
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
        "_ArithmeticGenericOp",  # conditions
        "_conditional__Split",  # arguments of operators
    }


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
