"""Fine-tuning and distillation as their users run them, each from the run folder of the stage before."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from common import UserError
from config import FineTune
from engine import run_lock
from model import load_classifier, load_encoder, load_head
from pipeline.convert import textures
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from presets import parse
from tests.small_sets import texture_shards

SMALL = ["--batch-size", "16", "--log-every", "1", "--precision", "fp32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 train and 20 test textures of ten classes, as shards."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=80, test=20)


@pytest.fixture(scope="module")
def run():
    """run("finetune", *options) in this process."""
    threads = torch.get_num_threads()

    def run_train(*arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = parse([*map(str, arguments), *SMALL])
        stages = {"Config": train.pretrain, "FineTune": train.finetune, "Distill": train.distill}
        try:
            stages[type(config).__name__](config)
        finally:
            run_lock.release_all()

    yield run_train
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pretrained(run, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    options = ["--encoder.width", 0.125, "--head.version", "v2", "--head.hidden", 24, "--head.out", 16]
    run("pretrain", "--data", data, "--out", out, "--epochs", 1, "--eval.no-baselines", *options)
    return out


@pytest.fixture(scope="module")
def tuned(run, pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "run"
    start = ["--start.run", pretrained, "--start.from-layer", 1]
    quickly = ["--optim.lr", 0.01, "--optim.warmup-epochs", 0]
    run("finetune", *start, *quickly, "--labels.fraction", 0.5, "--epochs", 6, "--validate-every", 3, "--out", out)
    return out


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_fine_tuning_begins_where_pretraining_ended(run, pretrained, data, tmp_path):
    """With a rate of 0 nothing but the running statistics moves, and the new layer still knows nothing."""
    still = ["--optim.lr", 0, "--epochs", 1, "--labels.fraction", 1, "--start.run", pretrained, "--start.from-layer", 2]
    run("finetune", *still, "--out", tmp_path / "run")
    classifier, classes = load_classifier(tmp_path / "run" / "model.safetensors")
    assert classes == sorted(textures.CLASSES)
    encoder, head = load_encoder(pretrained / "encoder.safetensors"), load_head(pretrained / "head.safetensors")
    for name, weight in encoder.named_parameters():
        assert torch.equal(classifier.encoder.get_parameter(name), weight)
    kept = dict(classifier.head.named_parameters())
    assert kept.keys() == {"fc1.weight", "bn1.weight", "bn1.bias", "fc2.weight", "bn2.weight", "bn2.bias"}
    assert all(torch.equal(kept[name], head.get_parameter(name)) for name in kept)
    assert not classifier.fc.weight.any() and rows(tmp_path / "run")[0]["loss"] == pytest.approx(np.log(10), rel=1e-6)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"] == str(data) and config["views"]["mean"] == [0.5, 0.5, 0.5], "as the pretraining had them"


def test_fine_tuning_learns_its_labels_and_leaves_a_classifier(tuned):
    steps = [row for row in rows(tuned) if "train_top1" in row]
    assert len(steps) == 12, "40 images in batches of 16, six times"
    assert np.mean([row["loss"] for row in steps[-2:]]) < steps[0]["loss"] - 0.1
    scored = [row for row in rows(tuned) if "top1" in row]
    assert [row["step"] for row in scored] == [6, 12]
    assert scored[-1]["features"] == "finetune" and 0 <= scored[-1]["top1"] <= scored[-1]["top5"] <= 1
    classifier, _ = load_classifier(tuned / "model.safetensors")
    assert classifier.head[0].out_features == 24 and classifier.fc.weight.any()
    alone = load_file(tuned / "encoder.safetensors")
    assert all(torch.equal(alone[name], weight) for name, weight in classifier.encoder.state_dict().items())


def test_only_the_chosen_labels_are_used(run, pretrained, data, tmp_path, monkeypatch):
    seen = []
    fit = train.fit

    def watched(run, config, task, state, metrics):
        forward_backward = task.forward_backward

        def noted(model, batch):
            seen.append((batch.index.clone(), batch.views.shape))
            return forward_backward(model, batch)

        object.__setattr__(task, "backpropagate", noted)
        return fit(run, config, task, state, metrics)

    monkeypatch.setattr(train, "fit", watched)
    keys = np.concatenate([np.load(path)["key"] for path in sorted((data / "train").glob("*.npy"))])
    chosen = sorted(np.random.default_rng(0).choice(80, 20, replace=False).tolist())
    (tmp_path / "keys.txt").write_text("".join(f"{keys[sample].decode()}.jpg\n" for sample in chosen))
    options = ["--start.run", pretrained, "--epochs", 3, "--labels.keys", tmp_path / "keys.txt"]
    run("finetune", *options, "--out", tmp_path / "run")
    assert {shape for _, shape in seen} == {(16, 3, 32, 32)}, "one view of each image"
    index = torch.cat([index for index, _ in seen])
    assert set(index.tolist()) <= set(chosen) and len(index) == 3 * 16


def test_a_supervised_baseline_is_the_same_command(run, data, tmp_path):
    run(
        "finetune",
        "--data",
        data,
        "--encoder.width",
        0.125,
        "--epochs",
        1,
        "--labels.fraction",
        1,
        "--out",
        tmp_path / "run",
    )
    assert load_classifier(tmp_path / "run" / "model.safetensors")[0].kept is None


def test_a_student_learns_from_its_teacher(run, tuned, data, tmp_path, capsys):
    options = ["--teacher", tuned, "--encoder.width", 0.125, "--epochs", 6, "--temperature", 0.5]
    before = (tuned / "model.safetensors").read_bytes()
    run("distill", *options, "--out", tmp_path / "run")
    steps = [row for row in rows(tmp_path / "run") if "agreement" in row]
    assert len(steps) == 30 and steps[-1]["loss"] < steps[0]["loss"]
    scored = {row["features"]: row["top1"] for row in rows(tmp_path / "run") if "features" in row}
    assert scored["teacher"] == rows(tuned)[-1]["top1"], "frozen, and in evaluation mode after all those batches"
    assert (tuned / "model.safetensors").read_bytes() == before
    printed = capsys.readouterr().out
    assert re.search(r"teacher +│", printed) and re.search(r"distill +│", printed)
    assert load_classifier(tmp_path / "run" / "model.safetensors")[1] == load_classifier(tuned / "model.safetensors")[1]


def test_a_student_needs_no_labels(run, tuned, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(32):
        (folder / f"{number}.jpg").write_bytes(textures.render(0, "train", number))
    write_split(folder_source(folder), tmp_path / "shards", "train")
    run("distill", "--teacher", tuned, "--data", tmp_path / "shards", "--epochs", 1, "--out", tmp_path / "run")
    assert len(load_classifier(tmp_path / "run" / "model.safetensors")[1]) == 10


def test_labels_beside_the_teacher_are_those_that_may_be_looked_at(run, tuned, tmp_path, monkeypatch):
    known = []
    labeled_cross_entropy = train.labeled_cross_entropy
    monkeypatch.setattr(
        train,
        "labeled_cross_entropy",
        lambda logits, label: known.append((label >= 0).sum().item()) or labeled_cross_entropy(logits, label),
    )
    options = ["--labeled-share", 0.5, "--labels.fraction", 0.25, "--epochs", 1]
    run("distill", "--teacher", tuned, *options, "--out", tmp_path / "run")
    assert len(known) == 5 and sum(known) == 20, "a quarter of the 80 images, each once"


def test_a_stopped_fine_tuning_goes_on_bit_for_bit(run, pretrained, tmp_path):
    options = ["--start.run", pretrained, "--labels.fraction", 0.5, "--epochs", 3, "--checkpoint.every-steps", 1]
    options += ["--checkpoint.keep", 9]
    run("finetune", *options, "--out", tmp_path / "whole")
    resume_from = tmp_path / "whole" / "checkpoints" / "step-00000003"
    run("finetune", *options, "--resume", resume_from, "--out", tmp_path / "rest")
    whole, rest = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "rest"))
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
    with pytest.raises(UserError, match=r"--labels\.fraction 0\.5 \(now 1\.0\)"):
        run("finetune", *options, "--labels.fraction", 1, "--resume", resume_from, "--out", tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "--preset", "v3"], "no preset 'v3'; use one of textures, v1-1, v1-10, v2-1, v2-10"),
        (["finetune", "--start.run", "nowhere"], "nowhere is not the folder of a run"),
        (["finetune", "--data", "DATA", "--labels.fraction", "0"], "--labels.fraction is 0.0; use a fraction above 0"),
        (["finetune", "--data", "DATA", "--start.from-layer", "1"], "random weights have no projection head"),
        (
            ["finetune", "--start.run", "RUN", "--start.from-layer", "4", "--labels.fraction", "1"],
            "use --start.from-layer 0 to 3",
        ),
        (["finetune", "--start.run", "RUN", "--labels.fraction", "0.125"], "use a --batch-size of at most 10"),
        (["finetune", "--start.run", "RUN", "--labels.keys", "nowhere.txt"], "nowhere.txt"),
        (["--data", "DATA", "--micro-batch", "1"], "encodes an image of the batch of 16 alone"),
        (["distill", "--data", "DATA"], "There is no teacher; use --teacher"),
        (["distill", "--teacher", "RUN"], "There is no file"),
        (
            ["distill", "--teacher", "RUN", "--views.mean", "0", "0", "0"],
            "was trained with --views.mean 0.5 0.5 0.5: use the same",
        ),
        (["distill", "--teacher", "RUN", "--labeled-share", "2"], "--labeled-share is 2.0"),
        (["distill", "--teacher", "RUN", "--labels.fraction", "0.1"], "--labeled-share is 0"),
        (
            ["finetune", "--data", "DATA", "--optim.name", "nesterov", "--optim.momentum", "0"],
            "--optim.momentum is 0.0",
        ),
        (["finetune", "--data", "DATA", "--views.std", "0", "1", "1"], "--views.std is 0.0 1.0 1.0"),
    ],
)
def test_what_is_typed_wrong_gets_one_sentence(pretrained, data, tmp_path, monkeypatch, arguments, message):
    places = {"DATA": str(data), "RUN": str(pretrained)}
    out = tmp_path / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    given = [places.get(word, word) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["train.py", *given, "--out", str(out), "--batch-size", "16"])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
    assert not out.exists(), "a run that could not begin leaves nothing"


def test_one_class_is_nothing_to_learn(run, tmp_path):
    data = texture_shards(tmp_path, train=1)
    with pytest.raises(UserError, match=r"Fine-tuning needs two classes or more, but .*train has 1"):
        run("finetune", "--data", data, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_papers_settings():
    """arXiv 2002.05709, appendix B.5, and 2006.10029, section 3; sqrt(1024) x 0.005 = 0.16."""
    first, second = (parse(["finetune", "--preset", name, "--data", "x"]) for name in ("v1-1", "v1-10"))
    assert isinstance(first, FineTune) and (first.epochs, second.epochs) == (60, 30)
    assert (first.optim.name, first.optim.lr, first.optim.scaling, first.batch_size) == (
        "nesterov",
        0.05,
        "linear",
        4096,
    )
    assert first.optim.weight_decay == first.optim.warmup_epochs == 0 and second.labels.fraction == 0.1
    assert (first.views.flip_p, first.views.jitter_p, first.views.gray_p, first.views.blur_p) == (0.5, 0, 0, 0)
    third = parse(["finetune", "--preset", "v2-1", "--data", "x", "--start.from-layer", "0"])
    assert (third.optim.name, third.optim.lr, third.optim.scaling, third.batch_size) == ("lars", 0.005, "sqrt", 1024)
    assert third.epochs == 60 and third.optim.weight_decay == 0
