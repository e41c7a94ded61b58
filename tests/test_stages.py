"""finetune.py and distill.py as users run them, each from the run folder of the stage before."""

import json
import re
import shutil
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import distill
import finetune
import train
from common import UserError
from config import DistillConfig
from engine import run_lock
from model import load_classifier, load_encoder, load_head
from pipeline.augment.config import AugmentConfig
from pipeline.convert import textures
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from presets import DISTILL, FINETUNE, PRETRAIN, parse
from tests.small_sets import texture_shards

SMALL = ["--no-report", "--batch-size", "16", "--log-every", "1", "--precision", "fp32", "--preset", "textures"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 train and 20 test textures of ten classes, as shards."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=80, test=20)


@pytest.fixture(scope="module")
def run():
    """run("finetune", *options) in this process."""
    threads = torch.get_num_threads()
    stages = {
        "train": (PRETRAIN, train.pretrain),
        "finetune": (FINETUNE, finetune.finetune),
        "distill": (DISTILL, distill.distill),
    }

    def run_stage(name, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        presets, stage = stages[name]
        try:
            stage(parse(presets, [*map(str, options), *SMALL], prog=f"{name}.py"))
        finally:
            run_lock.release_all()

    yield run_stage
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pretrained(run, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    options = ["--encoder.width", 0.125, "--head.version", "v2", "--head.hidden", 24, "--head.out", 16]
    run("train", "--data", data, "--out", out, "--epochs", 1, "--eval.no-baselines", *options)
    return out


@pytest.fixture(scope="module")
def tuned(run, pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "run"
    start = ["--start.run", pretrained, "--start.from-layer", 1]
    quickly = ["--optim.name", "adamw", "--optim.lr", 0.01, "--optim.warmup-epochs", 0]
    run("finetune", *start, *quickly, "--labels.fraction", 0.5, "--epochs", 6, "--validate-every", 3, "--out", out)
    return out


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_fine_tuning_starts_from_the_pretrained_weights(run, pretrained, data, tmp_path):
    """With a learning rate of 0 only running statistics change, and the new layer is still zero."""
    frozen = ["--optim.lr", 0, "--epochs", 1, "--labels.fraction", 1]
    frozen += ["--start.run", pretrained, "--start.from-layer", 2]
    run("finetune", *frozen, "--out", tmp_path / "run")
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
    assert config["data"] == str(data) and config["views"]["mean"] == [0.5, 0.5, 0.5], "as in pretraining"


def test_fine_tuning_learns_and_writes_a_classifier(tuned):
    steps = [row for row in rows(tuned) if "train_top1" in row]
    assert len(steps) == 12, "40 images in batches of 16, six times"
    assert np.mean([row["loss"] for row in steps[-2:]]) < steps[0]["loss"] - 0.1
    scored = [row for row in rows(tuned) if "top1" in row]
    assert [row["step"] for row in scored] == [6, 12]
    assert scored[-1]["features"] == "finetune" and 0 <= scored[-1]["top1"] <= scored[-1]["top5"] <= 1
    classifier, _ = load_classifier(tuned / "model.safetensors")
    assert classifier.head[0].out_features == 24 and classifier.fc.weight.any()
    exported = load_file(tuned / "encoder.safetensors")
    assert all(torch.equal(exported[name], weight) for name, weight in classifier.encoder.state_dict().items())


def test_only_the_chosen_labels_are_used(run, pretrained, data, tmp_path, monkeypatch):
    seen = []

    class RecordingLoader(finetune.ViewLoader):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append((batch.index.clone(), batch.views.shape))
                yield batch

    monkeypatch.setattr(finetune, "ViewLoader", RecordingLoader)
    keys = np.concatenate([np.load(path)["key"] for path in sorted((data / "train").glob("*.npy"))])
    chosen = sorted(np.random.default_rng(0).choice(80, 20, replace=False).tolist())
    (tmp_path / "keys.txt").write_text("".join(f"{keys[sample].decode()}.jpg\n" for sample in chosen))
    options = ["--start.run", pretrained, "--epochs", 3, "--labels.keys", tmp_path / "keys.txt"]
    run("finetune", *options, "--out", tmp_path / "run")
    assert {shape for _, shape in seen} == {(16, 3, 32, 32)}, "one view of each image"
    index = torch.cat([index for index, _ in seen])
    assert set(index.tolist()) <= set(chosen) and len(index) == 3 * 16


def test_supervised_baseline_is_the_same_command(run, data, tmp_path):
    options = ["--encoder.width", 0.125, "--epochs", 1, "--labels.fraction", 1]
    run("finetune", "--data", data, *options, "--out", tmp_path / "run")
    assert load_classifier(tmp_path / "run" / "model.safetensors")[0].kept is None


def test_student_learns_from_its_teacher(run, tuned, data, tmp_path, capsys, monkeypatch):
    temperatures, distillation = set(), distill.distillation
    monkeypatch.setattr(distill, "distillation", lambda *args: temperatures.add(args[2]) or distillation(*args))
    options = ["--teacher", tuned, "--encoder.width", 0.125, "--epochs", 6, "--temperature", 0.5]
    before = (tuned / "model.safetensors").read_bytes()
    run("distill", *options, "--out", tmp_path / "run")
    steps = [row for row in rows(tmp_path / "run") if "agreement" in row]
    assert len(steps) == 30 and steps[-1]["loss"] < steps[0]["loss"] - 0.005 and temperatures == {0.5}
    scored = {row["features"]: row["top1"] for row in rows(tmp_path / "run") if "features" in row}
    assert scored["teacher"] == rows(tuned)[-1]["top1"], "frozen, and still in evaluation mode"
    assert (tuned / "model.safetensors").read_bytes() == before
    printed = capsys.readouterr().out
    assert re.search(r"teacher +│", printed) and re.search(r"distill +│", printed)
    assert load_classifier(tmp_path / "run" / "model.safetensors")[1] == load_classifier(tuned / "model.safetensors")[1]


def test_student_needs_no_labels(run, tuned, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(32):
        (folder / f"{number}.jpg").write_bytes(textures.render(0, "train", number))
    write_split(folder_source(folder), tmp_path / "shards", "train")
    run("distill", "--teacher", tuned, "--data", tmp_path / "shards", "--epochs", 1, "--out", tmp_path / "run")
    assert len(load_classifier(tmp_path / "run" / "model.safetensors")[1]) == 10


def test_labeled_share_uses_the_chosen_labels_only(run, tuned, tmp_path, monkeypatch):
    used = []
    labeled_cross_entropy = distill.labeled_cross_entropy

    def recording(logits, label):
        used.append((label >= 0).sum().item())
        return labeled_cross_entropy(logits, label)

    monkeypatch.setattr(distill, "labeled_cross_entropy", recording)
    options = ["--labeled-share", 0.5, "--labels.fraction", 0.25, "--epochs", 1]
    run("distill", "--teacher", tuned, *options, "--out", tmp_path / "run")
    assert len(used) == 5 and sum(used) == 20, "a quarter of the 80 images, each once"
    loss = next(row["loss"] for row in rows(tmp_path / "run") if "loss" in row)
    uniform = np.log(10)  # the student's probabilities in the first step, in which its last layer is zero
    assert loss == pytest.approx(0.5 * uniform + 0.5 * uniform * used[0] / 16, rel=1e-5)


def test_fine_tuning_resumes_bit_for_bit(run, pretrained, tmp_path):
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
    ("script", "arguments", "message"),
    [
        (finetune, "--preset v3", "no preset 'v3'; use one of auto, textures, v1-1, v1-10, v2-1, v2-10"),
        (finetune, "--start.run nowhere", "nowhere is not the folder of a run"),
        (finetune, "--data DATA --labels.fraction 0", "--labels.fraction is 0.0; use a fraction above 0"),
        (finetune, "--data DATA --start.from-layer 1", "random weights have no projection head"),
        (finetune, "--start.run RUN --start.from-layer 4 --labels.fraction 1", "--start.from-layer must be 0 to 3"),
        (finetune, "--start.run RUN --labels.fraction 0.125", "--batch-size"),
        (finetune, "--start.run RUN --labels.keys nowhere.txt", "nowhere.txt"),
        (finetune, "--data DATA --optim.name nesterov --optim.momentum 0", "--optim.momentum is 0.0"),
        (finetune, "--data DATA --views.std 0 1 1", "--views.std is 0.0 1.0 1.0"),
        (train, "--data DATA --micro-batch 1", "encodes an image of the batch of 16 alone"),
        (distill, "--data DATA", "There is no teacher; use --teacher"),
        (distill, "--teacher RUN", "model.safetensors"),
        (distill, "--teacher RUN --views.mean 0 0 0", "was trained with --views.mean 0.5 0.5 0.5; use the same"),
        (distill, "--teacher RUN --labeled-share 2", "--labeled-share is 2.0"),
        (distill, "--teacher RUN --labels.fraction 0.1", "--labeled-share is 0"),
    ],
)
def test_invalid_options_raise_one_sentence(pretrained, data, tmp_path, monkeypatch, script, arguments, message):
    places = {"DATA": str(data), "RUN": str(pretrained)}
    out = tmp_path / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    words = [places.get(word, word) for word in arguments.split()]
    monkeypatch.setattr(sys, "argv", [script.__file__, *words, "--out", str(out), "--batch-size", "16"])
    if "--preset" not in words:
        sys.argv += ["--preset", "textures"]
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
    assert not out.exists(), "a run that did not start leaves nothing"


def test_fine_tuning_needs_two_classes(run, tmp_path):
    data = texture_shards(tmp_path, train=1)
    with pytest.raises(UserError, match=r"Fine-tuning needs at least two classes, .*train has 1"):
        run("finetune", "--data", data, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_distillation_resumes_only_with_the_same_teacher(run, tuned, tmp_path):
    teacher = shutil.copytree(tuned, tmp_path / "teacher")
    options = ["--teacher", teacher, "--encoder.width", 0.125, "--epochs", 1, "--checkpoint.every-steps", 1]
    options += ["--labeled-share", 0.5, "--labels.fraction", 0.5, "--checkpoint.keep", 9]
    run("distill", *options, "--out", tmp_path / "whole")
    resume = ["--resume", tmp_path / "whole" / "checkpoints" / "step-00000002"]
    run("distill", *options, *resume, "--out", tmp_path / "rest")
    whole, rest = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "rest"))
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
    whole, rest = ([row for row in rows(tmp_path / name) if "features" in row] for name in ("whole", "rest"))
    assert whole == rest, "the teacher's scores come from the checkpoint"
    shutil.copy(tmp_path / "rest" / "model.safetensors", teacher)
    with pytest.raises(UserError, match="--teacher changed since"):
        run("distill", *options, *resume, "--out", tmp_path / "other")


@pytest.mark.parametrize(("mean", "refused"), [((0.5,), False), ((0.5, 0.5, 0.5), False), ((0.4,), True), (None, True)])
def test_a_teacher_has_its_normalization(pretrained, mean, refused):
    config = DistillConfig(teacher=str(pretrained), views=AugmentConfig(size=32, mean=mean, std=(0.25,)))
    with pytest.raises(UserError, match=r"with --views\.mean 0\.5 0\.5 0\.5; use") if refused else nullcontext():
        distill.check_normalization(config)
