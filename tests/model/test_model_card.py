"""Model cards state what was measured, how the encoder was trained, and nothing private."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from config import DistillConfig, FinetuneConfig
from model import StartConfig
from model.export import export_encoder
from model.model_card import data_sentence
from tests.model.networks import write_small_run


def exported_card(run, out) -> str:
    export_encoder(run, out, "huggingface")
    return (out / "README.md").read_text(encoding="utf-8")


def test_scores_are_those_that_were_measured(tmp_path):
    write_small_run(tmp_path / "run", data="/home/someone/private/birds/", epochs=7)
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
    card = exported_card(tmp_path / "run", tmp_path / "birds-encoder")
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
    assert "0.111" not in card and "1.25" not in card and "0.9999" not in card, "metrics of training are not scores"


def test_run_without_scores(tmp_path):
    write_small_run(tmp_path / "run")
    card = exported_card(tmp_path / "run", tmp_path / "out")
    assert "kNN top-1: not measured. Linear top-1: not measured." in card and "built-in textures" in card
    (tmp_path / "run" / "evaluation").mkdir(exist_ok=True)
    (tmp_path / "run" / "evaluation" / "linear.json").write_text('{"top1": 0.75}')
    card = exported_card(tmp_path / "run", tmp_path / "evaluated")
    assert "| linear | top1 0.75 |" in card and "Linear top-1: not measured" not in card


@pytest.mark.parametrize(
    ("stage", "options", "expected"),
    [
        (
            FinetuneConfig,
            {"start": StartConfig("/home/someone/runs/wide", 1)},
            "trained with labels, from a pretrained encoder",
        ),
        (FinetuneConfig, {}, "trained with labels, from random weights"),
        (DistillConfig, {"teacher": "/home/someone/runs/tuned"}, "distilled from a fine-tuned teacher"),
    ],
)
def test_runs_with_labels(tmp_path, stage, options, expected):
    write_small_run(tmp_path / "run", stage=stage, data="birds", config="/home/someone/runs/before", **options)
    card = exported_card(tmp_path / "run", tmp_path / "out")
    assert expected in card and "without" not in card and "someone" not in card
    assert ("| encoder.name |" in card) == (not options.get("start")), "only options that were used are listed"


def test_no_secrets_from_urls():
    assert "shards `train`," in data_sentence({"data": "s3://bucket/birds/train?key=secret"})
    for data in (
        "https://user:secret@host/birds?token=secret",
        "https://user:secret@host",
        "https://secret@host/#secret",
    ):
        assert "secret" not in data_sentence({"data": data})
    assert "shards `what?#`," in data_sentence({"data": "/home/secret?/what?#/"}), "a folder is not a URL"
    assert "shards `/`," in data_sentence({"data": "s3://bucket"})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "without their labels."),
        ({"labels": {"fraction": 1.0, "keys": ""}}, "with their labels."),
        ({"labels": {"fraction": 0.01, "keys": ""}}, "with 1 % of their labels."),
        ({"labels": {"fraction": 1.0, "keys": "/secret/list"}}, "with the labels of a listed subset."),
        ({"labels": {"fraction": 1.0}, "teacher": "/t", "labeled_share": 0.0}, "those that the teacher learned from."),
        ({"labels": {"fraction": 0.1}, "teacher": "/t", "labeled_share": 0.5}, "with 10 % of their labels."),
        ({"labels": {"fraction": 0.1}, "teacher": "/t", "labelled_share": 0.5}, "with 10 % of their labels."),  # 0.1.0
    ],
)
def test_labels_used(options, expected):
    assert data_sentence({"data": "birds", **options}).endswith(expected)


def test_damaged_files_are_skipped(tmp_path):
    write_small_run(tmp_path / "run")
    good = {"step": 10, "features": "trained", "knn_top1": 0.5, "linear_top1": float("nan")}
    lines = [b"\xff{", b"3", b"null", b'{"features": 7}', json.dumps(good).encode(), b'{"cut']
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\n".join(lines))
    evaluation = tmp_path / "run" / "evaluation"
    (evaluation / "folder.json").mkdir(parents=True)
    records = {"null": {"results": None}, "number": {"results": 3}, "row": {"results": [3, {"top1": 0.25}]}, "list": []}
    for name, record in records.items():
        (evaluation / f"{name}.json").write_text(json.dumps(record))
    (evaluation / "bytes.json").write_bytes(b"\xff\xfe")
    card = exported_card(tmp_path / "run", tmp_path / "out")
    assert "| features | knn_top1 |\n|---|---|\n| trained | 0.5 |\n" in card
    assert card.endswith("| evaluation | result |\n|---|---|\n| row | top1 0.25 |\n")


def test_images_and_convergence_of_evaluations(tmp_path):
    write_small_run(tmp_path / "run")
    (tmp_path / "run" / "evaluation").mkdir()
    data = {"test": {"root": "/home/someone/birds/val", "images": 40}}
    results = [{"seed": 0, "top1": 0.75, "converged": False}, {"seed": 1, "top1": 0.5, "converged": True}]
    record = {"data": data, "results": results}
    (tmp_path / "run" / "evaluation" / "linear-fast.json").write_text(json.dumps(record))
    converted = {"data": {"test": {"root": "/cache/photos/birds-1a2b/3c4d/test", "images": 4}}, "results": results[1:]}
    converted["source"] = "/home/someone/birds/"
    (tmp_path / "run" / "evaluation" / "knn.json").write_text(json.dumps(converted))
    tables = [line for line in exported_card(tmp_path / "run", tmp_path / "out").splitlines() if line.startswith("|")]
    assert tables[-3:] == [
        "| knn on 4 images of birds/test | seed 1, top1 0.5 |",
        "| linear-fast on 40 images of birds/val, not converged | seed 0, top1 0.75 |",
        "| linear-fast on 40 images of birds/val | seed 1, top1 0.5 |",
    ]


def test_names_are_escaped(tmp_path):
    write_small_run(tmp_path / "run", data="/data/`x` | <b>", preset="a|b\n# c")
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "a | <script>.json").write_text('{"to|p": 1}')
    name = 'my "<b>" [x](y) *ü*'
    card = exported_card(tmp_path / "run", tmp_path / name)
    assert '\n# my "\\<b\\>" [x]\\(y) \\*ü\\*\n' in card
    assert "| preset | a\\|b # c |\n" in card and "shards `'x' | <b>`," in card
    assert "| a \\| \\<script\\> | to\\|p 1 |" in card
    (call,) = (line for line in card.splitlines() if line.startswith("encoder = "))
    calls = []
    encoder = SimpleNamespace(eval=lambda: None)
    scope = {"timm": SimpleNamespace(create_model=lambda place, **_: calls.append(place) or encoder)}
    exec(call, scope)
    assert calls == [f"local-dir:{name}"]
