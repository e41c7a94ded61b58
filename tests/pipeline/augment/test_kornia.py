"""Tests of Kornia's device code on fake CUDA tensors, without a GPU; for its views see test_backends.py."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.io import decode_jpeg as decode_jpeg_on_host

from pipeline.augment import decoding, kornia
from pipeline.augment.config import AugmentConfig
from pipeline.augment.decoding import decode_on_gpu
from pipeline.augment.gpu import warn_once
from pipeline.augment.kornia import KorniaBackend, augment, resized_crops
from pipeline.images.files import DecodeError, decode
from pipeline.images.pixel_format import RGB8
from tests.pipeline.augment import reference_views as reference

CUDA = torch.device("cuda:0")


@pytest.fixture(scope="module")
def photographs():
    return reference.photographs(12, seed=1)


class PinnedCopiesOnly(TorchDispatchMode):
    """Counts copies from the host to the device, and refuses those for which the host would wait."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.pinned, self.copies = [], 0
        # fake tensors cannot be pinned; a copy in pinned memory is another tensor
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: self.pinned.append(x.clone()) or self.pinned[-1])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        copying = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copying and result.device.type == "cuda":
            source = args[-1]
            if source.device.type == "cpu":
                assert any(source is tensor for tensor in self.pinned) and kwargs["non_blocking"]
                self.copies += 1
        return result


@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_everything_stays_on_the_device(photographs, jitter, monkeypatch):
    """Fake tensors reject mixed devices, and operations that make the host wait for a value."""
    config = AugmentConfig(size=64, jitter=jitter).for_images(RGB8, {})
    params = reference.random_params(photographs, config, seed=9)
    assert all((getattr(params, name) != value).any() for name, value in reference.IDENTITY.items())
    sizes = [reference.decode(file).shape for file in photographs]
    with FakeTensorMode(allow_non_fake_inputs=False), PinnedCopiesOnly(monkeypatch) as copying:
        images = [torch.empty(size, dtype=torch.uint8, device=CUDA) for size in sizes]
        views = augment(images, params, config)
    assert views.device == CUDA and views.shape == (24, 3, 64, 64)
    assert copying.copies > 3  # rows, factors, kernels or matrices; constants of the configuration need none


def test_crops_too_large_for_a_gpu_are_resized_on_the_cpu(monkeypatch):
    """torch's kernel would ask for more shared memory than there is, which no CPU shows."""
    interpolate, devices = kornia.F.interpolate, []

    def recording(window, *arguments, **options):
        devices.append(window.device.type)
        return interpolate(window, *arguments, **options)

    monkeypatch.setattr(kornia.F, "interpolate", recording)
    flip, crop = np.array([[False, True]]), np.array([[[0, 0, 100, 641], [0, 0, 640, 640]]])
    with FakeTensorMode(allow_non_fake_inputs=False):
        images = [torch.empty(3, 650, 650, dtype=torch.uint8, device=CUDA) for _ in range(2)]
        views = resized_crops(images, SimpleNamespace(flip=flip, crop=crop), 16)
    assert devices == ["cpu", "cuda"] and views.device == CUDA and views.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_decoded_on_the_host_are_copied_from_pinned_memory(photographs, dtype, monkeypatch):
    """nvJPEG is asked for the last image only, and refuses it; the others have subsampled chroma or are PNGs."""
    picture = reference.smooth_field(1, 0, 90, 90)
    encoded = [*photographs[:3], reference.encode(picture, "PNG"), reference.encode(picture, "JPEG", subsampling=0)]
    config, asked = AugmentConfig(size=32).for_images(RGB8, {}), []
    params = reference.random_params(encoded, config, seed=9)
    monkeypatch.setattr(decoding, "decode_on_gpu", lambda files, device: asked.extend(files) or [None] * len(files))
    in_this_thread = SimpleNamespace(map=map)  # where tensors are fake
    monkeypatch.setattr(decoding, "ThreadPoolExecutor", lambda *_, **__: in_this_thread)
    backend = KorniaBackend(config, CUDA, 5, 2, 1, dtype)
    with FakeTensorMode(allow_non_fake_inputs=False), PinnedCopiesOnly(monkeypatch) as copying:
        views = backend(encoded, params)
    assert asked == encoded[-1:]
    assert views.device == CUDA and views.shape == (10, 3, 32, 32) and views.dtype == dtype
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert sum(image.dtype == torch.uint8 for image in copying.pinned) == 5


@pytest.fixture
def nvjpeg(monkeypatch):
    """Replaces nvJPEG by a function of the files."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    warn_once.cache_clear()
    return lambda decoder: monkeypatch.setattr(decoding, "decode_jpeg", lambda files, mode, device: decoder(files))


def fail(error: Exception):
    def decoder(files):
        raise error

    return decoder


def test_images_decoded_on_the_gpu(photographs, nvjpeg):
    nvjpeg(lambda files: [decode_jpeg_on_host(file, decoding.ImageReadMode.RGB) for file in files])
    device = torch.device("cpu")
    for image, file in zip(decode_on_gpu(photographs, device), photographs, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decode(file))
    assert decode_on_gpu([], device) == []


@pytest.mark.parametrize(
    "message",
    [
        "decode_jpegs_cuda: torchvision not compiled with nvJPEG support",
        "Couldn't load the image extension. If you built torchvision from source, make sure ...",
        "Error while decoding JPEG images: Failed to get image info: 3",
        "Error while decoding JPEG images: Failed to parse jpeg stream: 4 (and more)",
        "Error while decoding JPEG images: Failed to decode batch: 10",
        "Error while decoding JPEG images: Unknown chroma subsampling",
    ],
)
def test_what_nvjpeg_refuses_is_left_to_the_host_and_logged_once(photographs, nvjpeg, message, caplog):
    nvjpeg(fail(RuntimeError(message)))
    for _ in range(3):
        assert decode_on_gpu(photographs[:2], torch.device("cpu")) == [None, None]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "decoded on the host" in record.message


DECODING = "Error while decoding JPEG images: "


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), torch.OutOfMemoryError),
        (RuntimeError(DECODING + "CUDA out of memory. Tried to allocate 3 MiB"), torch.OutOfMemoryError),
        (RuntimeError(DECODING + "Failed to decode batch: 5"), torch.OutOfMemoryError),  # allocator
        (RuntimeError(DECODING + "Failed to decode batch: 6"), RuntimeError),  # execution
        (RuntimeError(DECODING + "Failed to synchronize CUDA stream: 700"), RuntimeError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
def test_other_errors_of_the_gpu_are_raised(photographs, nvjpeg, error, kind, caplog):
    nvjpeg(fail(error))
    with pytest.raises(RuntimeError) as raised:
        decode_on_gpu(photographs[:2], torch.device("cpu"))
    assert raised.type is kind and str(raised.value) == str(error) and not caplog.records


def test_truncated_jpegs_are_refused_before_nvjpeg(photographs, monkeypatch):
    monkeypatch.setattr(decoding, "decode_on_gpu", lambda files, _: pytest.fail("asked") if files else [])
    jpeg = reference.encode(reference.smooth_field(1, 0, 40, 56), "JPEG", subsampling=0)
    backend = KorniaBackend(AugmentConfig(size=32), CUDA, 1, 2, 1)
    for length in np.linspace(4, len(jpeg) - 1, 30).astype(int):
        with pytest.raises(DecodeError):
            backend._decode([jpeg[:length]], np.zeros((2, 1, 4), np.int32))
    backend.close()
