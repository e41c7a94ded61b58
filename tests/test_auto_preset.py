"""--preset auto: the rules over a table of facts, the facts themselves, and command lines that use and override it."""

import csv
import json
import re
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from rich.console import Console

import auto_preset
import train
from auto_preset import Facts, choices_table, choose_classifier, choose_pretraining, read_facts, with_option
from common import UserError
from engine import run_lock
from model import encoder_spec
from model.encoder import EncoderConfig
from pipeline.convert import textures
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.images.pixel_format import PixelFormat
from presets import DISTILL, FINETUNE, PRETRAIN, encoder_of, parse
from tests.ranks import run_ranks
from tests.small_sets import remove_labels, texture_shards

ROOT = Path(__file__).parents[1]
LAPTOP = {"device": "cpu", "memory_gb": 16, "bf16": False, "cores": 8}
GPU_8 = {"device": "cuda", "memory_gb": 8, "bf16": True, "cores": 8}
GPU_80 = {"device": "cuda", "memory_gb": 80, "bf16": True, "cores": 16}
SMALL = {"images": 50_000, "side_px": 32, "megapixels": 0.001, "labeled": 50_000, "classes": 10}
SCANS = {"images": 5_000, "side_px": 512, "megapixels": 0.26, "labeled": 5_000, "classes": 2}
PHOTOGRAPHS = {"images": 1_281_167, "side_px": 375, "megapixels": 0.19, "labeled": 1_281_167, "classes": 1000}
CASES = {
    "small images on a laptop": Facts(**SMALL, **LAPTOP),
    "small images on two cores": Facts(**SMALL, device="cpu", memory_gb=16, bf16=True, cores=2),
    "small images on two cores in fp32": Facts(**SMALL, device="cpu", memory_gb=16, bf16=False, cores=2),
    "small images on a GPU": Facts(**SMALL, **GPU_80),
    "scans on a laptop": Facts(**SCANS, **LAPTOP),
    "scans on a GPU of 8 GB": Facts(**SCANS, **GPU_8),
    "photographs on a laptop": Facts(**PHOTOGRAPHS, **LAPTOP),
    "photographs on a GPU of 8 GB": Facts(**PHOTOGRAPHS, **GPU_8),
    "photographs on eight GPUs": Facts(**PHOTOGRAPHS, **GPU_80, processes=8),
    "a GPU of 2 GB": Facts(**PHOTOGRAPHS, device="cuda", memory_gb=2, bf16=False),
    "unlabeled": Facts(**{**SMALL, "labeled": 0, "classes": 0}, **GPU_8),
    "one class": Facts(**{**SCANS, "classes": 1}, **LAPTOP),
    "one image": Facts(1, 8, 0.0001, 1, 1, **LAPTOP, processes=2),
    "six processes": Facts(**SMALL, **GPU_8, processes=6),
    "many million images": Facts(**{**PHOTOGRAPHS, "images": 400_000_000}, **GPU_80, processes=64),
}
STAGES = {
    "train.py": (PRETRAIN, choose_pretraining),
    "finetune.py": (FINETUNE, choose_classifier),
    "distill.py": (DISTILL, choose_classifier),
}


def pretraining(facts, **given):
    """Settings of pretraining, with options as in `views__size=64` given."""
    config = PRETRAIN["auto"]()
    options = {name.replace("__", "."): value for name, value in given.items()}
    for option, value in options.items():
        config = with_option(config, option, value)
    return choose_pretraining(config, facts, dict.fromkeys(options, "given"))


# ---- the rules


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("script", STAGES)
def test_every_choice_is_valid_and_has_a_reason(script, name):
    presets, choose = STAGES[script]
    facts, default = CASES[name], presets["auto"]()
    config = choose(default, facts, {})
    encoder_spec(config.encoder, config.views.size)
    assert config.batch_size % facts.processes == 0 and config.epochs >= 10
    assert {*config.reasons} >= {auto_preset.DATA, "views.size", "encoder.name", "batch_size", "epochs", "optim.lr"}
    assert all(config.reasons.values()) and "nan" not in str(config)
    for option in config.reasons.keys() - {auto_preset.DATA, auto_preset.TIME}:
        default = with_option(default, option, attrgetter(option)(config))
    assert replace(config, reasons={}) == default, "an option has changed that the table does not show"


DOCUMENTED = {
    "50,000 images of 32 px, a GPU of 80 GB": "small images on a GPU",
    "50,000 images of 32 px, two cores with bf16": "small images on two cores",
    "50,000 images of 32 px, two cores without": "small images on two cores in fp32",
    "50,000 images of 32 px, a laptop": "small images on a laptop",
    "5,000 scans of 512 px, a GPU of 8 GB": "scans on a GPU of 8 GB",
    "5,000 scans of 512 px, a laptop": "scans on a laptop",
    "1.3 million photographs, eight GPUs of 80 GB": "photographs on eight GPUs",
    "1.3 million photographs, a GPU of 8 GB": "photographs on a GPU of 8 GB",
    "1.3 million photographs, a laptop": "photographs on a laptop",
}


@pytest.mark.parametrize("case", DOCUMENTED)
def test_the_documentation_states_what_is_chosen(case):
    config = pretraining(CASES[DOCUMENTED[case]])
    encoder, optim, slices = config.encoder, config.optim, config.micro_batch
    width = "" if encoder.width == 1 else f" x {encoder.width:g}"
    network = encoder.name.replace("resnet", "ResNet-") + width + (", standard stem" if encoder.stem != "auto" else "")
    batch = f"{config.batch_size}" + (f" in slices of {slices}" if slices else "")
    name = {"adamw": "AdamW", "lars": "LARS", "muon": "Muon"}[optim.name]
    rate = f"{name} {optim.lr:g}" + (" x sqrt(B)" if optim.scaling == "sqrt" else "")
    temperature = f"{config.loss.temperature:g}"
    cells = [case, f"{config.views.size} px", network, batch, str(config.epochs), rate, temperature]
    assert f"| {' | '.join(cells)} |\n" in (ROOT / "docs" / "settings.md").read_text()


def test_augmentation_follows_the_size_of_the_views():
    small, large = (pretraining(CASES[name]).views for name in ("small images on a GPU", "photographs on eight GPUs"))
    assert (small.crop_area, small.gray_p, small.jitter_strength, small.blur_p) == ((0.2, 1.0), 0.2, 0.5, 0.0)
    assert (large.crop_area, large.gray_p, large.jitter_strength, large.blur_p) == ((0.08, 1.0), 0.2, 1.0, 0.5)


def test_grayscale_and_hue_need_colors():
    facts = replace(CASES["scans on a laptop"], pixels=PixelFormat(1, 16))
    config = pretraining(facts)
    assert config.views.gray_p == 0 and "brightness and contrast only" in config.reasons["views.gray_p"]
    assert "512 px (gray, 16 bits)" in config.reasons[auto_preset.DATA]
    assert replace(config, views=replace(config.views, gray_p=0.2), reasons={}) == replace(
        pretraining(CASES["scans on a laptop"]), reasons={}
    ), "nothing else changes"


def test_scores_need_two_labeled_classes():
    assert pretraining(CASES["photographs on eight GPUs"]).eval.k == 200
    assert pretraining(CASES["small images on a GPU"]).eval.knn_every == 50
    for name in ("unlabeled", "one class"):
        evaluation = pretraining(CASES[name]).eval
        assert evaluation.knn_every == 0 and not evaluation.baselines


@pytest.mark.parametrize("machine", [LAPTOP, GPU_8, GPU_80], ids=["laptop", "8 GB", "80 GB"])
def test_more_images_mean_fewer_epochs_and_no_smaller_batch(machine):
    counts = (50, 500, 5_000, 50_000, 500_000, 5_000_000)
    configs = [pretraining(Facts(**{**SMALL, "images": images}, **machine)) for images in counts]
    epochs, batches = ([getattr(config, name) for config in configs] for name in ("epochs", "batch_size"))
    assert batches == sorted(batches) and len(set(batches)) > 2
    widths = [config.encoder.width for config in configs]
    assert widths == sorted(widths, reverse=True)
    if machine["device"] == "cuda":  # on a CPU a smaller network may make room for more
        assert epochs == sorted(epochs, reverse=True) and len(set(epochs)) > 2


def test_more_memory_means_no_smaller_batch():
    memories = (4, 8, 12, 24, 48, 80, 180)
    configs = [pretraining(Facts(**PHOTOGRAPHS, device="cuda", memory_gb=gb, bf16=True)) for gb in memories]
    encoded = [config.micro_batch or config.batch_size for config in configs]
    assert [config.encoder.name for config in configs] == ["resnet18"] * 2 + ["resnet50"] * 5
    for name in ("resnet18", "resnet50"):
        of_name = [n for n, config in zip(encoded, configs, strict=True) if config.encoder.name == name]
        assert of_name == sorted(of_name) and len(set(of_name)) > 1
    assert encoded[-1] == configs[-1].batch_size == 512


def test_more_cores_mean_no_smaller_network_and_no_longer_run():
    facts = [Facts(**SMALL, device="cpu", memory_gb=64, bf16=False, cores=cores) for cores in (1, 2, 4, 16, 64, 256)]
    configs = [pretraining(each) for each in facts]
    sizes = [auto_preset.network_cost(config)[0] for config in configs]
    assert sizes == sorted(sizes) and len(set(sizes)) > 2
    for config, each in zip(configs, facts, strict=True):
        time_s = config.epochs * each.images / auto_preset.images_per_s(config, each, views=2)
        assert time_s <= auto_preset.CPU_TIME_S or config.epochs == 10


@pytest.mark.parametrize(
    ("encoder", "optimizer", "expected"),
    [
        ("resnet50", "adamw", ("none", 0.0015, 1e-4)),
        ("resnet50", "muon", ("none", 0.05, 0.01)),
        ("resnet50", "lars", ("sqrt", 0.075, 1e-6)),
        ("resnet18", "sgd", ("linear", 0.03, 5e-4)),
        ("resnet18", "lars", ("sqrt", 0.075, 1e-6)),
    ],
)
def test_the_learning_rate_follows_the_optimizer(encoder, optimizer, expected):
    optim = pretraining(CASES["small images on a GPU"], encoder__name=encoder, optim__name=optimizer).optim
    assert (optim.scaling, optim.lr, optim.weight_decay) == expected
    assert optim.momentum == (0.95 if optimizer == "muon" else 0.9)


def test_an_optimizer_without_a_rule_needs_a_learning_rate():
    config = replace(DISTILL["auto"](), optim=replace(DISTILL["auto"]().optim, name="sgd", lr=0.7))
    facts, fixed = CASES["scans on a laptop"], {"optim.name": "given"}
    with pytest.raises(UserError, match=r"no learning rate for --optim\.name sgd in this stage; set --optim\.lr"):
        choose_classifier(config, facts, fixed)
    assert choose_classifier(config, facts, fixed | {"optim.lr": "given"}).optim.lr == 0.7


def test_fine_tuning_takes_time_for_labeled_images_only():
    facts = CASES["small images on two cores in fp32"]

    def choose(**labels):
        config = FINETUNE["auto"]()
        return choose_classifier(replace(config, labels=replace(config.labels, **labels)), facts, given)

    given = {"labels.fraction": "given"}
    few = choose(fraction=0.01)
    assert few.encoder.width == 1 and few.epochs == 100 and few.batch_size == 64
    assert few.reasons[auto_preset.TIME].startswith("about 7 min") and "50,000 images" in few.reasons[auto_preset.DATA]
    assert choose(fraction=1.0).encoder.width < 1
    given = {}
    listed = choose(keys="list.txt")
    assert "labels.fraction" not in listed.reasons and listed.batch_size == 256


def test_a_resnet_d_is_treated_as_the_plain_one():
    facts = CASES["small images on two cores"]
    plain, averaging = (pretraining(facts, encoder__name=name) for name in ("resnet18", "resnet18d"))
    assert replace(averaging, encoder=plain.encoder) == plain and plain.views.size_schedule
    assert pretraining(CASES["photographs on eight GPUs"], encoder__name="resnet50d").head.hidden == 2048


def test_options_on_the_command_line_win_and_other_choices_follow_them():
    facts = CASES["photographs on a GPU of 8 GB"]
    config = pretraining(facts, views__size=64, encoder__name="resnet50", batch_size=96, loss__temperature=0.3)
    assert (config.views.size, config.encoder.name, config.batch_size, config.loss.temperature) == (
        64,
        "resnet50",
        96,
        0.3,
    )
    assert all(config.reasons[name] == "given" for name in ("views.size", "encoder.name", "batch_size"))
    assert config.views.blur_p == 0 and config.head.hidden == 2048 and config.optim.name == "lars"
    assert 0 < config.micro_batch < 96, "ResNet-50 with the small stem needs more memory"
    narrow = pretraining(CASES["small images on a laptop"], encoder__width=0.125)
    assert narrow.encoder == EncoderConfig("resnet10t", width=0.125) and narrow.head.hidden == 64
    vit = pretraining(CASES["small images on a laptop"], encoder__name="vit_tiny_patch16_224")
    assert vit.encoder == EncoderConfig("vit_tiny_patch16_224"), "no width and no stem, which it has not"


@pytest.mark.parametrize("setting", ["textures", "stl10", "imagenet"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_estimated_speed_agrees_with_the_measured_rows(setting, precision):
    with open(ROOT / "bench" / "results" / "train_step.csv") as file:
        rows = {(row["setting"], row["source"], row["trainer"], row["precision"]): row for row in csv.DictReader(file)}
    measured = float(rows[setting, "images", "ours", precision]["images_per_s"])
    megapixels = {"textures": 0.0016, "stl10": 0.0092, "imagenet": 0.19}[setting]
    facts = Facts(1, 1, megapixels, 0, 0, "cpu", 16, precision == "bf16", cores=2)
    assert 1 / 1.5 < auto_preset.images_per_s(PRETRAIN[setting](), facts, views=2) / measured < 1.5


def test_the_table_shows_value_and_reason_of_each_choice(capsys):
    config = pretraining(CASES["small images on two cores"], epochs=3)
    Console(width=200).print(choices_table(config))
    printed = re.sub(" +", " ", capsys.readouterr().out)
    assert "--views.size 32 the images have 32 px" in printed and "--views.crop-area 0.2 1 small images" in printed
    assert "--epochs 3 given" in printed and re.search(
        r"expected time about 4 min of training at \d+ images/s", printed
    )


@pytest.mark.parametrize(
    ("epochs", "schedule"),
    [
        (1, ("20:1",)),
        (2, ("20:2",)),
        (3, ("16:1", "20:1", "24:1")),
        (10, ("16:2", "20:6", "24:2")),
        (49, ("16:10", "20:29", "24:10")),
    ],
)
def test_small_views_on_a_cpu_grow_during_the_run(epochs, schedule):
    assert pretraining(CASES["small images on a laptop"], epochs=epochs).views.size_schedule == schedule


def test_views_keep_their_size_where_growing_was_not_measured():
    configs = [pretraining(CASES[name]) for name in ("small images on a GPU", "scans on a laptop")]
    laptop = CASES["small images on a laptop"]
    configs += [pretraining(laptop, encoder__name="vit_tiny_patch16_224"), pretraining(laptop, views__size=16)]
    assert {config.views.size_schedule for config in configs} == {()}


def test_the_estimated_time_follows_the_size_of_the_views():
    laptop, schedules = CASES["small images on a laptop"], [(), ("24:1",), ("16:1",), ("16:1", "24:1")]
    given = {"epochs": 3, "encoder__name": "resnet10t"}
    configs = [pretraining(laptop, views__size_schedule=schedule, **given) for schedule in schedules]
    full, middle, small, mixed = (1 / auto_preset.images_per_s(config, laptop, views=2) for config in configs)
    assert small < middle < full
    assert mixed - full == pytest.approx((small - full) + (middle - full))


# ---- the facts


def test_facts_of_a_data_set(tmp_path, monkeypatch):
    data = texture_shards(tmp_path, train=64)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = replace(PRETRAIN["auto"](), data=str(data), precision="fp32")
    facts = read_facts(config)
    assert (facts.images, facts.side_px, facts.labeled, facts.classes) == (64, textures.SIDE, 64, 10)
    assert facts.megapixels == pytest.approx(textures.SIDE**2 / 1e6) and not facts.bf16
    assert (facts.device, facts.processes) == ("cpu", 2)
    one = replace(facts, memory_gb=facts.memory_gb * 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert read_facts(config).memory_gb == pytest.approx(one.memory_gb), "shared by the processes of a machine"
    remove_labels(data / "train", count=16)
    assert read_facts(config).labeled == 32


def test_facts_of_a_large_data_set_come_from_blocks_all_over_it(tmp_path, monkeypatch):
    """Sorted by class, the first half is 40 px and labeled, the second half has another size and no labels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(textures.render(0, "train", number))
    write_split(folder_source(folder), tmp_path / "shards", "train")
    config = replace(PRETRAIN["auto"](), data=str(tmp_path / "shards"))
    train_split, _ = auto_preset.open_data(config.data, config.loader)
    index = np.repeat(train_split.index[:1], 200_000)
    index["label"][:120_000] = 0
    index["height"][120_000:], index["width"][120_000:] = 100, 300
    large = replace(train_split, index=index)
    monkeypatch.setattr(auto_preset, "open_data", lambda *_: (large, None))
    assert len(auto_preset.spread_rows(large)) == 16 * auto_preset.BLOCK
    facts = read_facts(config)
    assert (
        facts.images == 200_000 and facts.labeled == pytest.approx(120_000, rel=0.05) and facts.side_px == textures.SIDE
    )


# ---- command lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 train and 20 test textures of ten classes, as shards."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=80, test=20)


def read(script, *arguments):
    return parse(STAGES[script][0], list(map(str, arguments)), prog=script)


def test_auto_is_the_default_with_data_only(data, capsys):
    assert read("train.py").preset == "textures" and capsys.readouterr().out == ""
    config = read("train.py", "--data", data, "--loss.temperature=0.3", "--no-eval.baselines", "--batch-size", 8)
    assert config.preset == "auto" and config == read(
        "train.py",
        "--preset",
        "auto",
        *["--data", data],
        *["--eval.no-baselines", "--loss.temperature", "0.3", "--batch-size=8"],
    )
    assert (config.loss.temperature, config.batch_size, config.eval.baselines) == (0.3, 8, False)
    printed = capsys.readouterr().out
    assert re.search(r"--loss.temperature +0.3 +given", printed) and re.search(r"--views.size +40 +the images", printed)


def test_other_ranks_do_not_print(data, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert read("train.py", "--data", data).preset == "auto" and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset auto", "--preset auto needs --data: shards written by"),
        ("--data nowhere", "No shards at nowhere"),
        ("--data DATA --optim.lr -1", "--optim.lr is -1"),
        ("--data DATA --resume nowhere", "There is no checkpoint in nowhere"),
        ("--preset aut --data DATA", "no preset 'aut' (did you mean auto?)"),
    ],
)
def test_errors_are_one_sentence(arguments, message, data, capsys):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read("train.py", *(str(data) if word == "DATA" else word for word in arguments.split()))
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


QUICK = ["--encoder.width", "0.125", "--encoder.stem", "standard", "--batch-size", "16", "--precision", "fp32"]
QUICK += ["--views.size", "32", "--eval.no-baselines", "--eval.knn-every", "0", "--no-report", "--epochs", "1"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Folder of a run that the preset chose, but for QUICK; it has five steps."""
    out = tmp_path_factory.mktemp("run") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    train.pretrain(read("train.py", "--data", data, "--out", out, *QUICK, "--checkpoint.every-steps", 2))
    run_lock.release_all()
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


def test_a_run_stores_the_reasons(run):
    record = json.loads((run / "config.json").read_text())
    assert record["preset"] == "auto" and record["reasons"]["views.size"] == "given"
    assert record["reasons"]["loss.temperature"].startswith("used in")


@pytest.mark.parametrize("stem", ["small", "standard"])
def test_the_stem_of_a_run_is_known(stem, tmp_path):
    spec = encoder_spec(EncoderConfig("resnet18", stem, 0.5), 32)
    (tmp_path / "config.json").write_text(json.dumps({"timm_name": spec.name, "timm_kwargs": spec.kwargs}))
    assert encoder_of(tmp_path) == EncoderConfig("resnet18", stem, 0.5)


def test_a_run_that_continues_keeps_its_choices(run, data, monkeypatch, capsys):
    """Even on another machine, where a new run would choose differently."""
    started = read("train.py", "--data", data, "--out", run, *QUICK)
    monkeypatch.setattr(auto_preset, "CPU_TIME_S", 1e-9)
    monkeypatch.setattr(auto_preset, "PASSES", ((float("inf"), 7),))
    stored = json.loads((run / "config.json").read_text())
    as_stored = json.loads(json.dumps(asdict(started)))
    assert {name for name in as_stored if as_stored[name] != stored[name]} <= {"checkpoint"}
    capsys.readouterr()
    for options in (["--out", run], ["--resume", run], ["--resume", run / "checkpoints" / "step-00000004"]):
        config = read("train.py", *options)
        assert json.loads(json.dumps(asdict(config)))["optim"] == stored["optim"] and config.data == str(data)
        assert config.epochs == 1 and config.reasons == stored["reasons"]
        assert "--optim.lr" in capsys.readouterr().out
    assert read("train.py", "--out", run, "--seed", 3).seed == 3, "which the checkpoint will refuse"
    assert read("train.py", "--out", run, "--preset", "textures").preset == "textures"
    assert read("train.py", "--config", run).optim == started.optim
    assert read("train.py", "--data", data).epochs == 7, "a new run"


def test_a_run_without_a_checkpoint_is_chosen_anew(run, data, tmp_path):
    """It starts again, perhaps on other images: choices for those of the first attempt would not fit."""
    stored = json.loads((run / "config.json").read_text())
    stored["views"]["mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read("train.py", "--data", data, "--out", tmp_path).views.mean != (0.1, 0.2, 0.3)


def test_options_given_when_a_run_continues_are_shown_as_given(run):
    reasons = read("train.py", "--out", run, "--optim.lr", "0.01").reasons
    assert reasons["optim.lr"] == "given" and reasons["optim.name"].startswith("better than")


def test_a_folder_of_another_stage_is_refused_with_another_remedy(run):
    with pytest.raises(UserError, match=r"belongs to another script.*; choose another --out\."):
        read("finetune.py", "--start.run", run, "--out", run)


def test_fine_tuning_and_distillation_start_from_the_encoder_of_the_run(run, data, tmp_path):
    config = read("finetune.py", "--start.run", run)
    assert config.preset == "auto" and config.data == str(data) and config.labels.fraction == 1
    assert config.encoder == encoder_of(run) == EncoderConfig("resnet10t", "standard", 0.125)
    assert config.views.size == 32 and config.views.jitter_p == 0
    assert config.reasons["views.size"] == "as in the run to start from"
    assert (config.optim.name, config.optim.lr, config.optim.momentum) == ("muon", 0.02, 0.95)
    adamw = read("finetune.py", "--start.run", run, "--optim.name", "adamw")
    assert adamw.optim.lr == pytest.approx(0.006), "in inverse proportion to the width"
    student = read("distill.py", "--teacher", run)
    assert student.encoder == config.encoder and student.temperature == 0.1
    other = read("distill.py", "--teacher", run, "--encoder.width", 0.25)
    assert other.encoder.width == 0.25 and other.temperature == 1.0
    record = json.loads((run / "config.json").read_text())
    record["timm_kwargs"]["width"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(record))
    other = read("distill.py", "--teacher", run, "--start.run", tmp_path)
    assert (
        other.encoder.width == 0.5
        and other.temperature == 1.0
        and other.reasons["encoder.width"] == "as in --start.run"
    )
    keys = np.load(data / "train" / "train-000000.index.npy")["key"][:8]
    (tmp_path / "list.txt").write_text("\n".join(key.decode() for key in keys))
    few = read("finetune.py", "--start.run", run, "--labels.keys", tmp_path / "list.txt")
    assert f"labels: {len(keys)}," in few.reasons[auto_preset.DATA] and few.batch_size <= len(keys) / 4
    assert read("finetune.py", "--start.run", run, "--preset", "textures").labels.fraction == 0.02


def train_in_rank(rank, world_size, data, out):
    """Body of a rank that would choose another number of epochs than the other rank; returns its own choice."""
    auto_preset.PASSES = ((10, 9), (float("inf"), 1 + rank))
    config = read("train.py", "--data", data, "--out", out, *QUICK[: QUICK.index("--epochs")])
    train.pretrain(config)
    return config.epochs


def test_two_ranks_agree_although_their_machines_differ(data, tmp_path):
    assert run_ranks(2, tmp_path, train_in_rank, data / "train", tmp_path / "run") == [1, 2]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 1
    assert (tmp_path / "run" / "encoder.safetensors").exists()
