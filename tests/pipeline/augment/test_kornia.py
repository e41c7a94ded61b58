"""Tests of Kornia's device code on fake CUDA tensors, without a GPU; for its views see test_backends.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.io import decode_jpeg as decode_jpeg_on_host

from pipeline.augment import kornia
from pipeline.augment.config import AugmentConfig
from pipeline.augment.kornia import augment, decode_on_gpu
from pipeline.images import decode
from tests.pipeline.augment import reference_views as reference


@pytest.fixture(scope="module")
def photographs():
    return reference.photographs(12, seed=1)


@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_everything_stays_on_the_device(photographs, jitter):
    """Fake tensors reject mixed devices, and operations that make the host wait for a value."""
    config = AugmentConfig(size=64, jitter=jitter)
    params = reference.random_params(photographs, config, seed=9)
    assert all((getattr(params, name) != value).any() for name, value in reference.IDENTITY.items())
    sizes = [reference.decode(file).shape for file in photographs]
    with FakeTensorMode():
        images = [torch.empty(size, dtype=torch.uint8, device="cuda:0") for size in sizes]
        views = augment(images, params, config)
    assert views.device == torch.device("cuda:0") and views.shape == (24, 3, 64, 64)
    assert views.is_contiguous(memory_format=torch.channels_last)


def test_images_that_nvjpeg_rejects_are_left_to_the_host(photographs, monkeypatch):
    """libjpeg replaces nvJPEG here, because it rejects damaged files in the same way."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(
        kornia, "decode_jpeg", lambda files, mode, device: [decode_jpeg_on_host(f, mode) for f in files]
    )
    device = torch.device("cpu")
    for image, file in zip(decode_on_gpu(photographs, device), photographs, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decode(file))
    assert decode_on_gpu([photographs[0], photographs[1][:80]], device) == [None, None]
    assert decode_on_gpu([], device) == []
