"""Tests of the choice that `--loader.backend auto` makes."""

import pytest
import torch

from pipeline.augment import backend
from pipeline.augment.backend import choose_backend
from pipeline.images.pixel_format import RGB8, PixelFormat


@pytest.mark.parametrize(
    ("device", "size", "threads", "dali", "name", "reason"),
    [
        ("cpu", 32, 2, True, "opencv", "the fastest on a CPU"),
        ("cpu", 224, 64, True, "opencv", "the fastest on a CPU"),
        ("cuda", 224, 16, True, "opencv", "fast enough with 16 host threads, not measured"),
        ("cuda", 224, 16, False, "opencv", "fast enough with 16 host threads, not measured"),
        ("cuda", 224, 4, True, "dali", "the fastest with 4 host threads, not measured"),
        ("cuda", 224, 4, False, "kornia", "the fastest with 4 host threads without DALI, not measured"),
        ("cuda", 32, 16, True, "dali", "the fastest for views of 32 px, not measured"),
        ("cuda", 32, 2, True, "dali", "the fastest for views of 32 px, not measured"),
        ("cuda", 32, 16, False, "opencv", "the fastest for views of 32 px without DALI, not measured"),
        ("mps", 224, 4, True, "kornia", "the fastest with 4 host threads without DALI, not measured"),
        ("mps", 224, 8, True, "opencv", "fast enough with 8 host threads, not measured"),
    ],
)
def test_auto_chooses_by_device_size_threads_and_what_is_installed(
    monkeypatch, device, size, threads, dali, name, reason
):
    monkeypatch.setattr(backend, "_dali_loads", lambda: dali)
    choice = choose_backend("auto", torch.device(device), size, threads)
    assert choice.name == name and reason in choice.reason
    assert str(choice) == f"{name} ({choice.reason})" and "\n" not in str(choice)


@pytest.mark.parametrize(
    ("device", "pixel_format", "runs", "name"),
    [
        ("cuda", RGB8, True, "triton"),
        ("cuda", RGB8, False, "opencv"),
        ("cuda", PixelFormat(1, 16), True, "opencv"),
        ("mps", RGB8, True, "opencv"),
        ("cpu", RGB8, True, "opencv"),
    ],
)
def test_auto_chooses_the_fused_kernels_for_images_in_the_memory_of_a_gpu(
    monkeypatch, device, pixel_format, runs, name
):
    monkeypatch.setattr(backend, "_dali_loads", lambda: False)
    monkeypatch.setattr(backend, "_triton_runs", lambda device: runs)
    assert choose_backend("auto", torch.device(device), 32, 16, pixel_format, fits_device=True).name == name
    assert choose_backend("auto", torch.device(device), 32, 16, pixel_format).name == "opencv"


@pytest.mark.parametrize("name", ["dali", "kornia", "opencv", "triton"])
def test_a_named_backend_is_used_without_a_reason(name):
    choice = choose_backend(name, torch.device("cuda"), 224, 1)
    assert choice.name == str(choice) == name
