"""Encoders taken elsewhere: opened there, they give what they gave here."""

import dataclasses
import hashlib
import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

import model
from common import UserError
from config import Config, Distill, FineTune, Start
from export import TORCHVISION, Export, data_sentence, export, main, torchvision_state
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import center_crop

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
    config = kind(views=AugmentConfig(size=size, mean=MEAN, std=STD), **options)
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
    window = center_crop(AugmentConfig(size=size), np.array([1000]), np.array([1500])).crop[0, 0, 2] / 1000
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
    assert "shards `train`," in data_sentence({"data": "s3://bucket/birds/train?key=secret"})
    for data in (
        "https://user:secret@host/birds?token=secret",
        "https://user:secret@host",
        "https://secret@host/#secret",
    ):
        assert "secret" not in data_sentence({"data": data})
    assert "shards `what?#`," in data_sentence({"data": "/home/secret?/what?#/"}), "a folder is no URL"
    assert "shards `/`," in data_sentence({"data": "s3://bucket"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "without their labels."),
        ({"labels": {"fraction": 1.0, "keys": ""}}, "with labels."),
        ({"labels": {"fraction": 0.01, "keys": ""}}, "with labels of a share of 0.01."),
        ({"labels": {"fraction": 1.0, "keys": "/secret/list"}}, "with labels of those that a list names."),
        ({"labels": {"fraction": 1.0}, "teacher": "/t", "labeled_share": 0.0}, "those that the teacher learned from."),
        ({"labels": {"fraction": 0.1}, "teacher": "/t", "labeled_share": 0.5}, "with labels of a share of 0.1."),
    ],
)
def test_the_card_says_which_labels_were_used(options, said):
    assert data_sentence({"data": "birds", **options}).endswith(said)


@pytest.mark.parametrize(
    ("source", "out", "format", "message"),
    [
        ("none", "new.safetensors", "timm", "There is no file .*none.*an encoder"),
        ("empty", "new.safetensors", "timm", "There is no file .*encoder.safetensors"),
        ("run", "new.pth", "timm", "a name that ends in .safetensors"),
        ("run", "taken.safetensors", "timm", "is there already"),
        ("run", "run", "huggingface", "is there already"),
        ("run", "deep/new.safetensors", "torchvision", "torchvision has no model for simclr_resnet18 with .*width"),
        ("lone/encoder.safetensors", "deep/new", "huggingface", "no config.json of a run.*use the run folder"),
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


@pytest.mark.parametrize("format", ["timm", "torchvision", "huggingface"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, format):
    a_run(tmp_path / "run", model.encoder_spec("resnet18", 224), 224)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"can't be written .*large.*: free some space or use another place"):
            export(Export(tmp_path / "run", tmp_path / "out.safetensors", format))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_exported_files_are_readable_as_far_as_the_umask_allows(tmp_path, umask):
    a_run(tmp_path / "run", model.encoder_spec("resnet18", 224), 224)
    before = os.umask(umask)
    try:
        for format in ("timm", "torchvision", "huggingface"):
            export(Export(tmp_path / "run", tmp_path / "out" / f"{format}.safetensors", format))
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    small_run(tmp_path / "run")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../here"):
        with pytest.raises(UserError, match="is the current folder: use another place"):
            export(Export(tmp_path / "run", Path(out), "huggingface"))
    export(Export(Path("../run"), Path("new"), "huggingface"))
    assert sorted(path.name for path in Path("new").iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("views", "size", "32"),
        ("views", "mean", [0.5, 0.5]),
        ("views", "std", [0.5, 0.5, 0]),
        (None, "views", None),
        (None, "optim", 3),
        (None, "start", None),
        (None, "data", 7),
    ],
)
def test_a_config_with_values_that_cannot_be(tmp_path, part, name, value):
    small_run(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (config[part] if part else config)[name] = value
    for text in (json.dumps(config), "[]", "\xff{"):
        (tmp_path / "run" / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"has no config\.json of a run"):
            export(Export(tmp_path / "run", tmp_path / "out", "huggingface"))
    assert not (tmp_path / "out").exists()


def test_damaged_files_of_a_run_cost_the_card_only_what_they_hold(tmp_path):
    small_run(tmp_path / "run")
    good = {"step": 10, "features": "trained", "knn_top1": 0.5, "linear_top1": float("nan")}
    lines = [b"\xff{", b"3", b"null", b'{"features": 7}', json.dumps(good).encode(), b'{"cut']
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\n".join(lines))
    evaluation = tmp_path / "run" / "evaluation"
    (evaluation / "folder.json").mkdir(parents=True)
    records = {"null": {"results": None}, "number": {"results": 3}, "row": {"results": [3, {"top1": 0.25}]}, "list": []}
    for name, record in records.items():
        (evaluation / f"{name}.json").write_text(json.dumps(record))
    (evaluation / "bytes.json").write_bytes(b"\xff\xfe")
    export(Export(tmp_path / "run", tmp_path / "out", "huggingface"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| features | knn_top1 |\n|---|---|\n| trained | 0.5 |\n" in card
    assert card.endswith("| evaluation | result |\n|---|---|\n| row | top1 0.25 |\n")


def test_a_card_says_which_images_were_classified_and_what_did_not_converge(tmp_path):
    small_run(tmp_path / "run")
    (tmp_path / "run" / "evaluation").mkdir()
    data = {"test": {"root": "/home/someone/birds/val", "images": 40}}
    results = [{"seed": 0, "top1": 0.75, "converged": False}, {"seed": 1, "top1": 0.5, "converged": True}]
    record = {"data": data, "results": results}
    (tmp_path / "run" / "evaluation" / "linear-fast.json").write_text(json.dumps(record))
    export(Export(tmp_path / "run", tmp_path / "out", "huggingface"))
    tables = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("|")]
    assert tables[-2:] == [
        "| linear-fast on 40 images of birds/val, not converged | seed 0, top1 0.75 |",
        "| linear-fast on 40 images of birds/val | seed 1, top1 0.5 |",
    ]


def test_names_are_no_markup_and_no_code(tmp_path):
    small_run(tmp_path / "run", data="/data/`x` | <b>", preset="a|b\n# c")
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "a | <script>.json").write_text('{"to|p": 1}')
    name = 'my "<b>" [x](y) *ü*'
    export(Export(tmp_path / "run", tmp_path / name, "huggingface"))
    card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert '\n# my "\\<b\\>" [x]\\(y) \\*ü\\*\n' in card
    assert "| preset | a\\|b # c |\n" in card and "shards `'x' | <b>`," in card
    assert "| a \\| \\<script\\> | to\\|p 1 |" in card
    (call,) = (line for line in card.splitlines() if line.startswith("encoder = "))
    calls = []
    encoder = SimpleNamespace(eval=lambda: None)
    scope = {"timm": SimpleNamespace(create_model=lambda place, **_: calls.append(place) or encoder)}
    exec(call, scope)
    assert calls == [f"local-dir:{name}"]


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
