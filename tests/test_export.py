"""Encoders taken elsewhere: opened there, they give what they gave here."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

import model
from config import Config, Distill, FineTune, Start
from errors import UserError
from export import TORCHVISION, Export, data_sentence, export, main, torchvision_state
from pipeline.recipe import Recipe, central_view

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def a_run(folder, spec, size, kind=Config, **options):
    """A run folder as train.py leaves it, and its encoder, with statistics such as training leaves."""
    torch.manual_seed(0)
    encoder = model.create_encoder(spec)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    folder.mkdir()
    model.save_encoder(encoder, spec, folder / "encoder.safetensors")
    config = kind(views=Recipe(size=size, mean=MEAN, std=STD), **options)
    record = {**dataclasses.asdict(config), "timm_name": spec[0], "timm_kwargs": spec[1]}
    (folder / "config.json").write_text(json.dumps(record))
    return encoder.eval()


def small_run(folder, **options):
    return a_run(folder, model.encoder_spec("resnet18", 32, width=0.125), 32, **options)


def test_timm_gets_the_plain_weights(tmp_path):
    encoder = small_run(tmp_path / "run")
    export(Export(tmp_path / "run", tmp_path / "new" / "encoder.safetensors"))
    state = load_file(tmp_path / "new" / "encoder.safetensors")
    assert state.keys() == encoder.state_dict().keys()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.load_encoder(tmp_path / "new" / "encoder.safetensors")(x), encoder(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_gives_the_same_representation(tmp_path, name):
    encoder = a_run(tmp_path / "run", model.encoder_spec(name, 224), 224).double()
    out = tmp_path / "weights.safetensors"
    export(Export(tmp_path / "run" / "encoder.safetensors", out, "torchvision"))
    theirs = torchvision.models.get_model(name, weights=None)
    loaded = theirs.load_state_dict(load_file(out), strict=False)
    assert set(loaded.missing_keys) == {"fc.weight", "fc.bias"} and loaded.unexpected_keys == []
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(theirs.double().eval()(x), encoder(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_model_for_torchvision_is_named_alike_there(name):
    with torch.device("meta"):
        encoder = timm.create_model(name, num_classes=0)
    assert torchvision_state(encoder, (name, {"num_classes": 0})).keys() == encoder.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "size", "width", "selective_kernels"),
    [
        ("resnet18", 96, 1, False),
        ("resnet18", 32, 0.125, False),
        ("resnet18", 96, 0.125, False),
        ("resnet50", 96, 0.125, True),
        ("resnet50", 32, 0.125, True),
        ("vit_tiny_patch16_224", 96, 1, False),
        ("convnext_atto", 64, 1, False),
    ],
)
def test_the_folder_opens_in_timm(tmp_path, name, size, width, selective_kernels):
    spec = model.encoder_spec(name, size, width=width, selective_kernels=selective_kernels)
    encoder = a_run(tmp_path / "run", spec, size)
    export(Export(tmp_path / "run", tmp_path / "out", "huggingface"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(again(x), encoder(x))
    prepared = timm.data.resolve_model_data_config(again)
    assert list(prepared["input_size"]) == [3, size, size] and prepared["interpolation"] == "bicubic"
    assert tuple(prepared["mean"]) == MEAN and tuple(prepared["std"]) == STD
    window = central_view(Recipe(size=size), np.array([1000]), np.array([1500])).crop[0, 0, 2] / 1000
    assert prepared["crop_pct"] == window, "the part of an image that evaluation here looks at"


@pytest.mark.parametrize("selective_kernels", [False, True])
def test_the_folder_begins_a_classifier(tmp_path, selective_kernels):
    spec = model.encoder_spec("resnet50", 96, width=0.125, selective_kernels=selective_kernels)
    encoder = a_run(tmp_path / "run", spec, 96)
    export(Export(tmp_path / "run", tmp_path / "out", "huggingface"))
    classifier = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5)
    assert classifier.fc.out_features == 5
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(classifier.state_dict()[name], tensor), name


def test_there_are_no_weights_where_none_were_exported():
    with pytest.raises(ValueError, match="no pretrained weights"):
        timm.create_model("simclr_resnet18", pretrained=True)


def test_the_card_says_what_was_measured_and_nothing_else(tmp_path):
    small_run(tmp_path / "run", data="/home/someone/private/birds/", epochs=7)
    rows = [
        {"step": 10, "loss": 1.25, "probe_top1": 0.111},
        {"step": 0, "features": "raw pixels", "knn_top1": 0.25},
        {"step": 10, "features": "trained", "knn_top1": 0.5, "linear_top1": 0.625},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run" / "evaluation").mkdir()
    digest = hashlib.sha256((tmp_path / "run" / "encoder.safetensors").read_bytes()).hexdigest()
    records = {
        "linear": {"top1": 0.75, "classes": 4, "ok": True, "interval": [0.7, 0.8], "encoder": "x"},
        "knn": {"encoder_sha256": digest, "seconds": 3, "results": [{"k": 5, "top1": 0.8125}, {"k": 20, "top1": 0.5}]},
        "of-another": {"encoder_sha256": "0" * 64, "results": [{"k": 5, "top1": 0.9999}]},
    }
    for name, record in records.items():
        (tmp_path / "run" / "evaluation" / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "run" / "evaluation" / "broken.json").write_text("{")
    export(Export(tmp_path / "run", tmp_path / "birds-encoder", "huggingface"))
    card = (tmp_path / "birds-encoder" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "\n# birds-encoder\n" in card
    assert "shards `birds`" in card and "someone" not in card
    assert "| epochs | 7 |" in card and "| views.size | 32 |" in card and "| loss.temperature | 0.1 |" in card
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert tables[-9:] == [
        "| features | knn_top1 | linear_top1 |",
        "|---|---|---|",
        "| raw pixels | 0.25 | not measured |",
        "| trained | 0.5 | 0.625 |",
        "| evaluation | result |",
        "|---|---|",
        "| knn | k 5, top1 0.8125 |",
        "| knn | k 20, top1 0.5 |",
        "| linear | top1 0.75, classes 4 |",
    ]
    assert "0.111" not in card and "1.25" not in card and "0.9999" not in card, "figures of training are no scores"


def test_the_card_of_a_run_without_a_report(tmp_path):
    small_run(tmp_path / "run")
    export(Export(tmp_path / "run", tmp_path / "out", "huggingface"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "kNN top-1: not measured. Linear top-1: not measured." in card and "built-in textures" in card


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (FineTune, {"start": Start("/home/someone/runs/wide", 1)}, "trained with labels, from a pretrained encoder"),
        (FineTune, {}, "trained with labels, from random weights"),
        (Distill, {"teacher": "/home/someone/runs/tuned"}, "distilled from a fine-tuned teacher"),
    ],
)
def test_the_card_of_a_run_that_has_seen_labels_says_so(tmp_path, kind, options, said):
    small_run(tmp_path / "run", kind=kind, data="birds", **options)
    export(Export(tmp_path / "run", tmp_path / "out", "huggingface"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert said in card and "without" not in card and "someone" not in card
    assert ("| encoder.name |" in card) == (not options.get("start")), "an option that was not used is no recipe"


def test_a_card_keeps_no_secret_of_an_address():
    assert data_sentence("s3://bucket/birds/train?key=secret", False).count("`train`") == 1
    assert "secret" not in data_sentence("https://user:secret@host/birds?token=secret", True)


@pytest.mark.parametrize(
    ("source", "out", "format", "message"),
    [
        ("none", "new.safetensors", "timm", "There is no file .*none.*an encoder"),
        ("empty", "new.safetensors", "timm", "There is no file .*encoder.safetensors"),
        ("run", "new.pth", "timm", "a name that ends in .safetensors"),
        ("run", "taken.safetensors", "timm", "is there already"),
        ("run", "run", "huggingface", "is there already"),
        ("run", "deep/new.safetensors", "torchvision", "torchvision has no model for simclr_resnet18 with .*width"),
        ("lone/encoder.safetensors", "deep/new", "huggingface", "no config.json of a run.*give the run folder"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_sentence(tmp_path, source, out, format, message):
    small_run(tmp_path / "run")
    small_run(tmp_path / "lone")
    (tmp_path / "lone" / "config.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.safetensors").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        export(Export(tmp_path / source, tmp_path / out, format))
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "taken.safetensors").read_text() == "mine"


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    small_run(tmp_path / "run")

    def fails(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("export.save_file", fails)
    with pytest.raises(OSError, match="No space"):
        export(Export(tmp_path / "run", tmp_path / "out", "huggingface"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command(tmp_path, monkeypatch, capsys):
    small_run(tmp_path / "run")
    (tmp_path / "out").mkdir()  # empty, so it may be filled
    command = ["export.py", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "huggingface"]
    monkeypatch.setattr("sys.argv", command)
    main()
    assert (tmp_path / "out" / "model.safetensors").is_file() and str(tmp_path / "out") in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:  # with a text: Python shows it on stderr and leaves with code 1
        main()
    assert str(left.value).startswith("error: ") and "is there already" in str(left.value)
