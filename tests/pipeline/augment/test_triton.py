"""The Triton backend: its views in the interpreter (interpreted.py), where it is available, and what it compiles to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from common import UserError
from pipeline.augment import triton as backend
from pipeline.augment.backend import create_backend
from pipeline.augment.config import AugmentConfig
from pipeline.augment.triton.backend import TritonBackend
from pipeline.images.pixel_format import PixelFormat

CONFIG = AugmentConfig(size=32)


def interpret(*options: str) -> None:
    """Run interpreted.py in a separate process: Triton reads TRITON_INTERPRET when it is imported."""
    file = Path(__file__).with_name("interpreted.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *options, str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_views_in_the_interpreter():
    interpret()


@pytest.mark.soak
def test_large_views_in_the_interpreter():
    interpret("-m", "soak")


def test_it_is_refused_on_a_cpu():
    with pytest.raises(UserError, match=r"not available on cpu: it needs an NVIDIA GPU.*use --loader.backend opencv"):
        create_backend("triton", CONFIG, torch.device("cpu"), 4, 2, 1)


@pytest.mark.parametrize(
    ("capability", "compiler", "reason"),
    [((9, 0), True, None), ((7, 5), True, "compute capability 8.0"), ((9, 0), False, "needs a C compiler.*gcc")],
)
def test_what_it_needs_of_a_gpu(monkeypatch, capability, compiler, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend, "has_c_compiler", lambda: compiler)
    cuda = torch.device("cuda:0")
    if reason is None:
        TritonBackend(CONFIG, cuda, 4, 2, 1).close()
    else:
        with pytest.raises(UserError, match=reason):
            TritonBackend(CONFIG, cuda, 4, 2, 1)


def test_only_8_bit_rgb_is_supported(monkeypatch):
    monkeypatch.setattr("pipeline.augment.triton.backend.unsupported_reason", lambda device: None)
    with pytest.raises(UserError, match=r"8-bit RGB images only, not gray, 16 bits; use --loader.backend opencv"):
        TritonBackend(CONFIG, torch.device("cpu"), 4, 2, 1, pixel_format=PixelFormat(1, 16))
