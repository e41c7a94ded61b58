"""train.py as users run it, on a few textures: one process, two gloo ranks, and invalid options."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rich.console
import timm
import torch
from accelerate.state import AcceleratorState, PartialState
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import train
from engine import checkpoint, loop
from engine.nonfinite import CollapseWatch
from pipeline.convert import textures
from pipeline.convert.sources import Source, folder_source
from pipeline.convert.writer import write_split
from presets import PRETRAIN, parse
from tests.ranks import run_ranks
from tests.small_sets import remove_labels, texture_shards

ROOT = Path(__file__).parents[1]
SHORT = ["--preset", "textures", "--no-report", "--head.hidden", "32", "--head.out", "16", "--batch-size", "16"]
SHORT += ["--log-every", "1"]
SMALL = ["--encoder.width", "0.125", *SHORT]
ROW = {"step", "epoch", "loss", "lr", "probe_top1", "gradient_norm", "images_per_s", "data_wait_ms", "step_ms"}
ROW |= {"replaced_images", "skipped_steps"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 train and 40 test textures of ten classes, as shards."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=80, test=40)


@pytest.fixture
def run_here(monkeypatch):
    """Run train.py in this process: fast, and enough for everything but exit codes."""
    threads = torch.get_num_threads()

    def run_train(*arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        train.main()

    yield run_train
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not PartialState._shared_state
    torch.set_num_threads(threads)


def launch(*arguments, processes):
    """Start several ranks on the CPU with `accelerate launch`.

    Its --cpu option starts one process whatever --num_processes says, unless MPI is installed; --multi_gpu starts
    several, and the environment variable keeps them off any GPU.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--main_process_port", "0", str(ROOT / "train.py")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "COLUMNS": "200"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


def train_in_rank(rank, world_size, *arguments):
    """Body of one of several ranks that are forks, which start faster than by the launcher."""
    train.pretrain(parse(PRETRAIN, list(map(str, arguments)), prog="train.py"))


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_run_folder_and_output_of_a_run(run_here, data, tmp_path, capsys):
    out = tmp_path / "run"
    run_here("--data", data, "--out", out, "--epochs", 2, "--eval.knn-every", 1, "--trackers", "none", *SMALL)
    left = ["checkpoints", "config.json", "encoder.safetensors", "head.safetensors", "metrics.jsonl", "summary.json"]
    assert sorted(path.name for path in out.iterdir()) == left
    config = json.loads((out / "config.json").read_text())
    assert config["preset"] == "textures" and config["batch_size"] == 16 and config["encoder"]["width"] == 0.125

    steps = [row for row in rows(out) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert all(row.keys() == ROW and math.isfinite(row["loss"]) for row in steps)
    assert all(0 <= row["data_wait_ms"] <= row["step_ms"] and row["images_per_s"] > 0 for row in steps)
    evaluations = [row for row in rows(out) if "knn_top1" in row]
    assert [row.get("features") for row in evaluations] == [None, "raw pixels", "untrained", "trained"]
    assert all(0 <= row["knn_top1"] <= 1 for row in evaluations)

    with safe_open(out / "encoder.safetensors", "pt") as file:
        metadata = file.metadata()
    encoder = timm.create_model(metadata["timm_name"], **json.loads(metadata["timm_kwargs"]))
    encoder.load_state_dict(load_file(out / "encoder.safetensors"), strict=True)
    assert config["timm_name"] == metadata["timm_name"]

    printed = capsys.readouterr().out
    for expected in ("raw pixels", "untrained", "trained", "images/s", "waiting for data", "-bound: ", str(out)):
        assert expected in printed.replace("\n", "")


def test_slow_loader_shows_as_data_wait(run_here, data, tmp_path, monkeypatch, capsys):
    """Two rows of two steps and one of one; every batch is 60 ms late, and every step takes 20 ms longer."""
    nt_xent = train.nt_xent_and_append

    class SlowLoader(train.ViewLoader):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.06)
                yield batch

    monkeypatch.setattr(train, "ViewLoader", SlowLoader)
    monkeypatch.setattr(
        train, "nt_xent_and_append", lambda *args, **options: time.sleep(0.02) or nt_xent(*args, **options)
    )
    options = ["--data", data, "--epochs", 1, "--eval.no-baselines", *SMALL, "--log-every", 2]
    started = time.perf_counter()
    run_here(*options, "--out", tmp_path / "run")
    elapsed_ms = 1000 * (time.perf_counter() - started)
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in steps] == [2, 4, 5]
    for row in steps:
        assert 60 <= row["data_wait_ms"] <= row["step_ms"] - 20, "what is not waiting is the step"
        assert row["images_per_s"] == pytest.approx(1000 * 16 / row["step_ms"], rel=1e-9), "of the global batch"
    total = sum(number * row["step_ms"] for number, row in zip((2, 2, 1), steps, strict=True))
    waited = sum(number * row["data_wait_ms"] for number, row in zip((2, 2, 1), steps, strict=True))
    assert total <= elapsed_ms
    printed = " ".join(capsys.readouterr().out.split())
    speed, share = re.search(r"([\d.]+) images/s, ([\d.]+)% of the time waiting for data", printed).groups()
    assert float(speed) == pytest.approx(5000 * 16 / total, abs=0.51)
    assert float(share) == pytest.approx(100 * waited / total, abs=0.051)


def test_progress_bar_shows_epoch_loss_and_speed(run_here, data, tmp_path, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(rich.console, "Console", lambda **options: terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_here("--data", data, "--out", tmp_path / "run", "--epochs", 1, "--eval.no-baselines", *SMALL)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.file.getvalue())
    assert re.search(r"5/5 .* epoch 1  loss \d+\.\d{3}  [\d,]+ images/s", shown), shown


def test_encoder_head_and_probe_are_trained(run_here, data, tmp_path):
    often = ["--checkpoint.every-steps", 1, "--checkpoint.keep", 9, "--eval.no-baselines"]
    run_here("--data", data, "--out", tmp_path / "run", "--epochs", 1, *often, *SMALL)
    states = sorted((tmp_path / "run" / "checkpoints").glob("*/state.safetensors"))
    first, last = load_file(states[0]), load_file(states[-1])
    weights = [name for name in first if name.startswith("model/") and name.endswith("weight")]
    assert {name.split("/")[1].split(".")[0] for name in weights} == {"encoder", "head", "probe"}
    assert not [name for name in weights if torch.equal(first[name], last[name])]


def test_same_seed_gives_the_same_losses(run_here, data, tmp_path, monkeypatch):
    losses, seeds = [], []
    loader = train.ViewLoader
    monkeypatch.setattr(train, "ViewLoader", lambda *args, **kw: seeds.append(kw["seed"]) or loader(*args, **kw))
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run_here("--data", data, "--out", tmp_path / name, "--epochs", 1, "--seed", seed, "--eval.no-baselines", *SMALL)
        losses.append([row["loss"] for row in rows(tmp_path / name) if "loss" in row])
    assert losses[0] == losses[1] != losses[2] and seeds == [3, 3, 4]


def test_pretraining_without_labels_and_without_test_split(run_here, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(16):
        (folder / f"{number}.jpg").write_bytes(textures.render(0, "train", number))
    write_split(folder_source(folder), tmp_path / "shards", "train")
    run_here("--data", tmp_path / "shards", "--out", tmp_path / "run", "--epochs", 1, *SMALL)
    assert (tmp_path / "run" / "encoder.safetensors").exists()
    assert [row["probe_top1"] for row in rows(tmp_path / "run")] == [None]


def test_probe_top1_counts_labeled_views_only(run_here, tmp_path):
    """One image of 80 has a label: batches without it have no accuracy, rather than an accuracy of 0."""
    items = [("cells" if number == 7 else None, f"{number:03d}", (0, "train", number)) for number in range(80)]
    write_split(Source("mixed", items, textures.render), tmp_path / "shards", "train")
    run_here("--data", tmp_path / "shards", "--out", tmp_path / "run", "--epochs", 1, *SMALL)
    assert sorted(str(row["probe_top1"]) for row in rows(tmp_path / "run")) == ["1.0", *["None"] * 4]


def test_probe_does_not_affect_the_encoder(run_here, tmp_path):
    """The same images with and without labels give the same losses and gradients, bit for bit."""
    logged = []
    for name, labeled in (("with", True), ("without", False)):
        items = [(f"{n % 3}" if labeled else None, f"{n:03d}", (0, "train", n)) for n in range(48)]
        write_split(Source(name, items, textures.render), tmp_path / name / "shards", "train")
        run_here("--data", tmp_path / name / "shards", "--out", tmp_path / name / "run", "--epochs", 1, *SMALL)
        logged.append([(row["loss"], row["gradient_norm"]) for row in rows(tmp_path / name / "run")])
    assert logged[0] == logged[1] and len(logged[0]) == 3


def test_gradient_accumulation_is_refused(run_here, data, tmp_path, monkeypatch):
    """Accelerate reads it from the environment and would divide the gradients by it without accumulating any."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(SystemExit, match=r"Gradient accumulation would lose negatives .*use --micro-batch"):
        run_here("--data", data, "--out", tmp_path / "run", *SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_other_parallelism_of_accelerate_is_refused(run_here, data, tmp_path, monkeypatch, name):
    """`accelerate config`, perhaps answered for another project, sets it through the launcher."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(SystemExit, match=rf"Only data parallelism is supported, .* sets ACCELERATE_USE_{name}; answer"):
        run_here("--data", data, "--out", tmp_path / "run", *SMALL)
    assert not (tmp_path / "run").exists()


def test_an_implementation_of_the_loss_that_does_not_run_is_refused(run_here, data, tmp_path):
    with pytest.raises(SystemExit, match=r"--loss\.impl triton .* use --loss\.impl auto or blockwise\.$"):
        run_here("--data", data, "--out", tmp_path / "run", *SMALL, "--loss.impl", "triton")


def test_a_compiler_chosen_by_accelerate_is_refused(run_here, data, tmp_path, monkeypatch):
    """It would wrap the network, and with it rename every weight in checkpoints."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(SystemExit, match=r"A compiler chosen by accelerate .*use --compile"):
        run_here("--data", data, "--out", tmp_path / "run", *SMALL)
    assert not (tmp_path / "run").exists()


def test_probe_objective_of_slices_and_ranks_adds_up_to_the_whole_batch():
    """Only one half of the batch has labels, which is all that one of two ranks or slices sees."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 3, generator=generator, dtype=torch.float64).requires_grad_()
    label = torch.tensor([0, 2, 1, -1, -1, -1, -1, -1])
    whole = train.probe_objective(logits, label=label)
    expected = nn.functional.cross_entropy(logits[[0, 1, 2, 8, 9, 10]], label[[0, 1, 2, 0, 1, 2]]) * 6 / 16
    assert whole[0].item() == pytest.approx(expected.item(), rel=1e-6) and whole[2].item() == 6 / 16
    one_hot = nn.functional.one_hot(torch.tensor([0, 2, 1, 0, 0, 0, 0, 0] * 2), 3).double()
    assert train.probe_objective(one_hot, label=label)[1].item() == 6 / 16, "all labeled views, and no other"
    assert train.probe_objective(-one_hot, label=label)[1].item() == 0
    halves = slice(0, 4), slice(4, 8)
    half_logits = [torch.cat([logits[half], logits[8:][half]]) for half in halves]
    of_slices = [train.probe_objective(*pair, label=label) for pair in zip(half_logits, halves, strict=True)]
    of_ranks = [train.probe_objective(own, label=label[half]) for own, half in zip(half_logits, halves, strict=True)]
    for value, first, second in zip(whole, *of_slices, strict=True):
        assert (first + second).item() == pytest.approx(value.item(), rel=1e-6)
    for value, first, second in zip(whole, *of_ranks, strict=True):
        assert (first + second).item() / 2 == pytest.approx(value.item(), rel=1e-6)


def test_two_ranks_equal_one_process(run_here, data, tmp_path):
    """Five fp32 steps at the same global batch, with batch norm in encoder and head.

    The settings do not magnify rounding: SGD, because AdamW divides by the size of the gradient, even where that is
    rounding alone; the small stem, so that batch norm has pixels to average over; ResNet-18, because runs of the
    preset's ResNet-10 drift apart from the third step on; and a low learning rate: at 0.02, some CPUs magnify it, too.
    """
    common = ["--data", data, "--epochs", 1, *SMALL, "--precision", "fp32", "--encoder.stem", "small"]
    common += ["--encoder.name", "resnet18"]
    common += ["--loss.temperature", 0.5, "--loss.learn-temperature", "--optim.name", "sgd", "--optim.lr", 0.005]
    # rows of two steps: a checkpoint after the first of them holds the sums of an open row, one part per process
    common += ["--checkpoint.every-steps", 1, "--checkpoint.keep", 9, "--log-every", 2, "--out"]
    run_here(*common, tmp_path / "one")
    done = launch(*common, tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert "steps on 2 x cpu" in done.stdout
    one, two = ([row for row in rows(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for alone, together in zip(one, two, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert together["lr"] == alone["lr"] and together["probe_top1"] == pytest.approx(alone["probe_top1"])
        assert together["temperature"] == pytest.approx(alone["temperature"], abs=1e-6)
    assert max(row["loss"] for row in one) - min(row["loss"] for row in one) > 0.01, "the weights must have moved"
    assert abs(one[-1]["temperature"] - 0.5) > 1e-3, "the temperature must have moved"
    one, two = (
        {row["features"]: row["knn_top1"] for row in rows(tmp_path / name) if "features" in row}
        for name in ("one", "two")
    )
    assert one["raw pixels"] == two["raw pixels"] and two["trained"] == pytest.approx(one["trained"], abs=0.026)

    # a run of one process resumes on two, and the reverse
    def after_three_steps(name):
        return ["--resume", tmp_path / name / "checkpoints" / "step-00000003"]

    run_here(*common, tmp_path / "two, then one", *after_three_steps("two"))
    run_ranks(2, tmp_path, train_in_rank, *common, tmp_path / "one, then two", *after_three_steps("one"))
    losses = {
        name: {row["step"]: row["loss"] for row in rows(tmp_path / name) if "loss" in row}
        for name in ("one", "two, then one", "one, then two")
    }
    for name in ("two, then one", "one, then two"):
        assert losses[name].keys() == {4, 5}
        assert losses[name] == pytest.approx({step: losses["one"][step] for step in (4, 5)}, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "No shards at nowhere"),
        (["--preset", "imagnet"], "no preset 'imagnet' (did you mean imagenet?)"),
        (["--preset", "cifar10"], "--preset cifar10 needs --data"),
        (
            ["--data", "DATA", "--batch-size", "16", "--encoder.name", "resnet19"],
            "timm has no encoder 'resnet19'",
        ),
        (["--data", "DATA", "--batch-size", "81"], "larger than the data set"),
        (["--data", "DATA", "--batch-size", "1"], "--batch-size is 1; it must be at least 2"),
        (["--data", "DATA", "--epochs", "0"], "--epochs is 0"),
        (["--data", "DATA", "--loss.temperature", "0"], "--loss.temperature is 0.0"),
        (["--data", "DATA", "--loss.temperature", "nan"], "--loss.temperature is nan"),
        (["--data", "DATA", "--seed", "-1"], "--seed is -1"),
        (["--data", "DATA", "--optim.lr", "-1"], "--optim.lr is -1"),
        (["--data", "DATA", "--views.crop-area", "1.0", "0.1"], "--views.crop-area is 1.0 0.1"),
        (["--preset", "textures", "--batch-size", "16", "--encoder.name", "vit_tiny_patch16_224"], "--encoder.width 1"),
        (["--epochs", "3", "--views.size-schedule", "16:4"], "covers 4 epochs, but --epochs is 3"),
        (
            ["--views.size-schedule", "16:1", "--encoder.name", "vit_tiny_patch16_224", "--encoder.width", "1"],
            "can't take views of 16 px (Input height (16) doesn't match model (32).); change --views.size-schedule",
        ),
        (["--data", "EMPTY"], "No images in"),
    ],
)
def test_invalid_options_raise_one_sentence(run_here, data, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"DATA": data, "EMPTY": tmp_path / "empty"}
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        run_here(*[places.get(word, word) for word in arguments], "--out", out)
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
    assert not out.exists(), "a run that did not start leaves nothing"


def test_other_files_are_not_overwritten(run_here, data, tmp_path):
    (tmp_path / "encoder.safetensors").write_text("mine")
    with pytest.raises(SystemExit, match="holds a run or other files already"):
        run_here("--data", data, "--out", tmp_path, *SMALL)
    with pytest.raises(SystemExit, match="is a file"):
        run_here("--data", data, "--out", tmp_path / "encoder.safetensors", *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_run_killed_before_its_first_checkpoint_starts_again(run_here, data, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "bad_samples.jsonl").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "lo')
    run_here("--data", data, "--out", tmp_path, "--epochs", 1, "--eval.no-baselines", *SMALL)
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5]


def test_unreadable_image_is_replaced_and_reported(run_here, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "shards")
    rows_of_shard = np.load(tmp_path / "shards" / "train" / "train-000000.index.npy")
    with open(tmp_path / "shards" / "train" / "train-000000.tar", "r+b") as tar:
        tar.seek(int(rows_of_shard["offset"][3]))
        tar.write(bytes(100))
    options = ["--data", tmp_path / "shards", "--epochs", 1, "--eval.no-baselines", *SMALL]
    run_here(*options, "--out", tmp_path / "run", "--loader.max-bad", 0.02, "--checkpoint.every-steps", 1)
    (bad,) = map(json.loads, (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines())
    assert bad["key"] == rows_of_shard["key"][3].decode() and bad["shard"] == "train-000000.tar"
    assert [row["replaced_images"] for row in rows(tmp_path / "run") if "loss" in row][-1] == 1
    resume_from = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert json.loads((resume_from / "record.json").read_text())["replaced"] == 1
    assert "Replacements of unreadable images: 1;" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(SystemExit, match=r"--loader\.max-bad"):
        run_here(*options, "--out", tmp_path / "strict")
    # images replaced before the checkpoint count, and are reported even if no unreadable one follows
    resume_from = resume_from.with_name("step-00000004")
    record = json.loads((resume_from / "record.json").read_text()) | {"replaced": 2}
    del record["checksum"]
    record["checksum"] = checkpoint._checksum(record)
    (resume_from / "record.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=r"[23] of 80 images of .*--loader\.max-bad 0\.02"):
        run_here(*options, "--out", tmp_path / "more", "--loader.max-bad", 0.02, "--resume", resume_from)


def test_unwritable_run_folder_is_refused(run_here, data, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SystemExit, match=r"^error: .*file"):
            run_here("--data", data, "--out", out, *SMALL)


def test_knn_before_the_first_row_and_unlabeled_test_split(run_here, data, tmp_path, capsys):
    often = [*SMALL[:-2], "--log-every", 100, "--epochs", 2, "--eval.knn-every", 1, "--eval.no-baselines"]
    run_here("--data", data, "--out", tmp_path / "a", *often)
    assert [row["step"] for row in rows(tmp_path / "a") if "loss" in row] == [5, 10]
    unlabeled = tmp_path / "shards"
    shutil.copytree(data, unlabeled)
    remove_labels(unlabeled / "test")
    run_here("--data", unlabeled, "--out", tmp_path / "b", *often)
    assert "There is no labeled test split" in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "b" / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--precision", "bf16", "--optim.name", "lars", "--optim.lr", "0.1", "--head.version", "v2"],
        ["--loader.backend", "kornia", "--optim.name", "sgd", "--optim.lr", "0.01", "--loss.impl", "reference"],
    ],
    ids=["bf16, LARS, head v2", "Kornia, SGD, reference loss"],
)
def test_other_backends_precisions_and_optimizers_train(run_here, data, tmp_path, options):
    run_here("--data", data, "--out", tmp_path / "run", "--epochs", 1, "--eval.no-baselines", *SMALL, *options)
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert len(losses) == 5 and all(0 < loss < 2 * math.log(31) for loss in losses)


def test_diverging_run_skips_steps_then_stops_and_lists_the_images(run_here, data, tmp_path):
    out = tmp_path / "run"
    explode = ["--optim.name", "sgd", "--optim.lr", "1e30", "--optim.warmup-epochs", "0", "--max-skipped", 3]
    with pytest.raises(SystemExit, match=r"not finite in 4 consecutive steps, the last of them step \d+ .*--optim\.lr"):
        run_here("--data", data, "--out", out, "--eval.no-baselines", *explode, *SMALL)
    assert not (out / "encoder.safetensors").exists()
    skipped = [row["skipped_steps"] for row in rows(out)]
    assert skipped[-3:] == [1, 2, 3] and rows(out)[-1]["loss"] is None
    listed = json.loads((out / "diverged.json").read_text())
    loader_images = {key.decode() for name in (data / "train").glob("*.npy") for key in np.load(name)["key"]}
    assert listed["step"] == rows(out)[-1]["step"] + 1
    assert len(listed["images"]) == 16 and set(listed["images"]) <= loader_images


def test_non_finite_weights_at_the_end_are_not_written(run_here, data, tmp_path):
    """After the overflow fewer steps follow than --max-skipped allows, so no step stops the run."""
    explode = ["--optim.name", "sgd", "--optim.lr", "1e30", "--optim.warmup-epochs", "0", "--epochs", 1]
    with pytest.raises(SystemExit, match=r"weights are not finite at the end .*; use a lower --optim\.lr"):
        run_here("--data", data, "--out", tmp_path / "run", "--eval.no-baselines", *explode, *SMALL)
    assert not list((tmp_path / "run").rglob("*.safetensors")), "neither encoder nor checkpoint"


@pytest.mark.parametrize(("options", "candidates"), [([], 31), (["--loss.decoupled"], 30), (["--loss.queue", 8], 39)])
def test_collapse_is_reported(run_here, data, tmp_path, monkeypatch, capsys, options, candidates):
    """All projections are equal, as in a collapsed network: the loss is ln(2B - 1) from the first step.

    The decoupled loss does not count the positive; the entries of a full queue are as similar as the batch.
    """
    contrast = train.nt_xent_and_append
    monkeypatch.setattr(train, "nt_xent_and_append", lambda z, *rest, **options: contrast(0 * z + 1, *rest, **options))
    monkeypatch.setattr(loop, "CollapseWatch", partial(CollapseWatch, patience_steps=6))
    options = ["--data", data, "--epochs", 2, "--eval.no-baselines", "--eval.knn-every", 0, *SMALL, *options]
    run_here(*options, "--out", tmp_path / "run")
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(f"The loss stays at {math.log(candidates):.4f}") == 1 and "(collapse)" in printed


@pytest.mark.soak
def test_compiled_networks_train_alike(run_here, data, tmp_path):
    """Compiling takes two minutes; the losses differ by rounding, which AdamW would magnify."""
    options = ["--data", data, "--epochs", 1, "--precision", "fp32", "--eval.no-baselines", *SMALL]
    options += ["--optim.name", "sgd", "--optim.lr", 0.02, "--encoder.stem", "small", "--loss.temperature", 0.5]
    options += ["--loss.learn-temperature"]
    losses = {}
    for name, compiled in (("plain", []), ("compiled", ["--compile"])):
        run_here(*options, *compiled, "--out", tmp_path / name)
        losses[name] = [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
    assert losses["compiled"] == pytest.approx(losses["plain"], abs=1e-5) and len(losses["plain"]) == 5


def test_micro_batches_keep_the_contrastive_batch(run_here, data, tmp_path):
    """Slices of 4 images; only the statistics of the head's batch norm tell them from the whole batch."""
    encoder = ["--encoder.name", "convnext_atto", "--encoder.stem", "auto", "--encoder.width", 1, "--precision", "fp32"]
    options = ["--data", data, "--epochs", 1, "--eval.no-baselines", *SHORT, *encoder, "--optim.name", "sgd"]
    options += ["--loss.queue", 40]
    losses = []
    for name, sliced in (("whole", []), ("sliced", ["--micro-batch", 5])):
        run_here(*options, "--optim.lr", 0.0, "--out", tmp_path / name, *sliced)
        losses.append([row["loss"] for row in rows(tmp_path / name) if "loss" in row])
    assert len(losses[0]) == 5 and losses[0] != losses[1], "the head's batch norm sees slices"
    assert losses[1] == pytest.approx(losses[0], rel=0.25)


def test_exit_codes_without_traceback(data, tmp_path):
    refused = subprocess.run(
        [sys.executable, ROOT / "train.py", "--data", tmp_path / "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: No shards at") and "Traceback" not in refused.stderr
    ranks = launch("--data", data, "--batch-size", 15, "--out", tmp_path / "run", processes=2)
    assert ranks.returncode != 0
    assert "error: A global batch of 15" in ranks.stderr
    assert not (tmp_path / "run").exists()
