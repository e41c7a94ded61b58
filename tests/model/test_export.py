"""Exported encoders, opened by the libraries they are for, compute the same features."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

import model
from common import UserError
from model.export import TORCHVISION, export_encoder, torchvision_state
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import center_crop
from pipeline.images.pixel_format import PixelFormat
from tests.model.networks import MEAN, STD, spec, write_run, write_small_run

ROOT = Path(__file__).parents[2]


def test_timm_weights(tmp_path):
    encoder = write_small_run(tmp_path / "run")
    out = tmp_path / "new" / "encoder.safetensors"
    export_encoder(tmp_path / "run", out, "timm")
    assert load_file(out).keys() == encoder.state_dict().keys()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.load_encoder(out)(x), encoder(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_model_computes_the_same_features(tmp_path, name):
    encoder = write_run(tmp_path / "run", spec(name, 224), 224).double()
    out = tmp_path / "weights.safetensors"
    export_encoder(tmp_path / "run" / "encoder.safetensors", out, "torchvision")
    resnet = torchvision.models.get_model(name, weights=None)
    loaded = resnet.load_state_dict(load_file(out), strict=False)
    assert set(loaded.missing_keys) == {"fc.weight", "fc.bias"} and loaded.unexpected_keys == []
    resnet.fc = nn.Identity()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(resnet.double().eval()(x), encoder(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_has_the_same_weight_names(name):
    with torch.device("meta"):
        encoder = timm.create_model(name, num_classes=0)
    state = torchvision_state(encoder, model.EncoderSpec(name, {"num_classes": 0}))
    assert state.keys() == encoder.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "size", "width", "selective_kernels"),
    [
        ("resnet18", 96, 1, False),
        ("resnet18", 32, 0.125, False),
        ("resnet10t", 32, 0.125, False),
        ("resnet10t", 96, 0.125, False),
        ("resnet18d", 32, 0.125, False),
        ("resnet18", 96, 0.125, False),
        ("resnet50", 96, 0.125, True),
        ("resnet50", 32, 0.125, True),
        ("vit_tiny_patch16_224", 96, 1, False),
        ("convnext_atto", 64, 1, False),
    ],
)
def test_timm_opens_the_huggingface_folder(tmp_path, name, size, width, selective_kernels):
    encoder_spec = spec(name, size, width=width, selective_kernels=selective_kernels)
    encoder = write_run(tmp_path / "run", encoder_spec, size)
    assert export_encoder(tmp_path / "run", tmp_path / "out", "huggingface") == encoder_spec
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(x), encoder(x))
    transform = timm.data.resolve_model_data_config(loaded)
    assert list(transform["input_size"]) == [3, size, size] and transform["interpolation"] == "bicubic"
    assert tuple(transform["mean"]) == MEAN and tuple(transform["std"]) == STD
    window = center_crop(AugmentConfig(size=size), np.array([1000]), np.array([1500])).crop[0, 0, 2] / 1000
    assert transform["crop_pct"] == window, "the center crop of the evaluation"


@pytest.mark.parametrize("name", ["resnet10t", "resnet18"])
def test_timm_adapts_the_first_convolution_to_other_channels(tmp_path, name):
    """timm repeats or truncates the weights of the eight channels and scales their sum (`adapt_input_conv`)."""
    eight = model.encoder_spec(model.EncoderConfig(name, width=0.125), 32, 8)
    encoder = write_run(tmp_path / "run", eight, 32, pixels=PixelFormat(8, 16))
    export_encoder(tmp_path / "run", tmp_path / "out", "huggingface")
    place, x = f"local-dir:{tmp_path / 'out'}", torch.randn(2, 8, 32, 32)
    with torch.no_grad():
        assert torch.equal(timm.create_model(place, pretrained=True, num_classes=0).eval()(x), encoder(x))
    gray = timm.create_model(place, pretrained=True, num_classes=0, in_chans=1)
    expected = encoder.conv1.weight.sum(1, keepdim=True)
    torch.testing.assert_close(gray.conv1.weight, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("selective_kernels", [False, True])
def test_huggingface_folder_as_start_of_a_classifier(tmp_path, selective_kernels):
    encoder_spec = spec("resnet50", 96, width=0.125, selective_kernels=selective_kernels)
    encoder = write_run(tmp_path / "run", encoder_spec, 96)
    export_encoder(tmp_path / "run", tmp_path / "out", "huggingface")
    classifier = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5)
    assert classifier.fc.out_features == 5
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(classifier.state_dict()[name], tensor), name


def test_code_of_the_model_card_works_without_the_checkout(tmp_path):
    """The installed package has the same files under the name `streamclr`; encoders of timm do not need it."""
    (tmp_path / "streamclr").mkdir()
    for file in ("common.py", "model"):
        (tmp_path / "streamclr" / file).symlink_to(ROOT / file)
    script = ["import sys", "from PIL import Image", "image = Image.new('RGB', (120, 100), (200, 100, 50))"]
    for out, width in ("plain", 1), ("narrow", 0.125):
        write_run(tmp_path / f"run-{out}", spec("resnet18", 96, width=width), 96)
        export_encoder(tmp_path / f"run-{out}", tmp_path / out, "huggingface")
        (code,) = re.findall("```python\n(.*?)```", (tmp_path / out / "README.md").read_text(), re.DOTALL)
        assert ("streamclr" in code) == (width != 1)
        script += [code, "print(*h.shape, 'streamclr' in sys.modules)"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.splitlines() == ["1 512 False", "1 64 True"]


def test_registered_architectures_have_no_other_weights():
    with pytest.raises(ValueError, match="no pretrained weights"):
        timm.create_model("simclr_resnet18", pretrained=True)


@pytest.mark.parametrize(
    ("source", "out", "format", "message"),
    [
        ("none", "new.safetensors", "timm", "There is no file .*none.*an encoder"),
        ("empty", "new.safetensors", "timm", "There is no file .*encoder.safetensors"),
        ("run", "new.pth", "timm", "a name that ends in .safetensors"),
        ("run", "taken.safetensors", "timm", "already exists"),
        ("run", "run", "huggingface", "already exists"),
        ("run", "deep/new.safetensors", "torchvision", "torchvision has no model for simclr_resnet18 with .*width"),
        ("lone/encoder.safetensors", "deep/new", "huggingface", "no valid config.json.*use the folder of a run"),
    ],
)
def test_refused_exports_write_nothing(tmp_path, source, out, format, message):
    write_small_run(tmp_path / "run")
    write_small_run(tmp_path / "lone")
    (tmp_path / "lone" / "config.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.safetensors").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        export_encoder(tmp_path / source, tmp_path / out, format)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "taken.safetensors").read_text() == "mine"


@pytest.mark.parametrize("format", ["timm", "torchvision", "huggingface"])
def test_a_full_disk_leaves_no_partial_output(tmp_path, format):
    write_run(tmp_path / "run", spec("resnet18", 224), 224)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"can't be written .*large.*; free some space or use another place"):
            export_encoder(tmp_path / "run", tmp_path / "out.safetensors", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_file_modes_follow_the_umask(tmp_path, umask):
    write_run(tmp_path / "run", spec("resnet18", 224), 224)
    before = os.umask(umask)
    try:
        for format in ("timm", "torchvision", "huggingface"):
            export_encoder(tmp_path / "run", tmp_path / "out" / f"{format}.safetensors", format)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    write_small_run(tmp_path / "run")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../here"):
        with pytest.raises(UserError, match="is the current folder; use another path"):
            export_encoder(tmp_path / "run", Path(out), "huggingface")
    export_encoder(Path("../run"), Path("new"), "huggingface")
    assert sorted(path.name for path in Path("new").iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("views", "size", "32"),
        ("views", "mean", [0.5, 0.5]),
        (None, "pixels", {"channels": 1, "bits": 16}),
        (None, "pixels", {"channels": 3}),
        ("views", "std", [0.5, 0.5, 0]),
        (None, "views", None),
        (None, "optim", 3),
        (None, "start", None),
        (None, "data", 7),
    ],
)
def test_invalid_run_configurations(tmp_path, part, name, value):
    write_small_run(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (config[part] if part else config)[name] = value
    for text in (json.dumps(config), "[]", "\xff{"):
        (tmp_path / "run" / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"has no valid config\.json"):
            export_encoder(tmp_path / "run", tmp_path / "out", "huggingface")
    assert not (tmp_path / "out").exists()
