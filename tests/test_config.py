"""The command line: what it refuses, in which words, and the numbers that the presets set."""

import dataclasses
import importlib
import json
import math
import re

import pytest

from common import UserError
from config import LIMITS, Config, Distill, FineTune, check_same_run
from engine.processes import ending_together
from presets import PRESETS, images_of, option_names, parse
from run import schedule

FINE_TUNE = ["finetune", "--data", "x"]
DISTILL = ["distill", "--data", "x", "--teacher", "RUN"]


@pytest.fixture
def run_folder(tmp_path):
    """A folder with the config.json of a run, for --teacher."""
    (tmp_path / "config.json").write_text('{"data": "x", "views": {"size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}}')
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--optm.lr", "1"],
            "There is no option '--optm.lr' (did you mean --optim.lr?); see train.py pretrain --help.",
        ),
        (["--epoch=2"], "There is no option '--epoch' (did you mean --epochs?); see train.py pretrain --help."),
        (["--lr", "1"], "There is no option '--lr' (did you mean --optim.lr?); see train.py pretrain --help."),
        (["--eval.no-baseline"], "did you mean --eval.no-baselines?"),
        (["--data.max-bat", "0"], "did you mean --loader.max-bad?"),
        (["distill", "--temperatur", "1"], "did you mean --temperature?); see train.py distill --help."),
        (["--zzz"], "There is no option '--zzz'; see train.py pretrain --help."),
        (["fintune"], "There is no stage 'fintune' (did you mean finetune?); use one of pretrain, finetune, distill."),
        (["--preset", "cifar"], "There is no preset 'cifar' (did you mean cifar10?); use one of textures, cifar10,"),
        (["--preset"], "There is no preset ''; use one of textures, cifar10, stl10, imagenet."),
        (["finetune", "--preset", "v2-2"], "There is no preset 'v2-2' (did you mean v2-1?)"),
        (["--epochs", "1.5"], "Error parsing --epochs: invalid literal for int()"),
        (["--precision", "fp16"], "Invalid choice 'fp16' for argument '--precision'; expected one of ('auto', "),
        (["--out"], "Missing value for argument '--out'"),
        (["--resume", ""], "--resume is empty; use auto, none, or the path"),
        ([*FINE_TUNE, "--labels.fraction", "inf"], "--labels.fraction is inf; use a fraction above 0"),
        (["finetune", "--start.run", "nowhere"], "nowhere is not the folder of a run"),
    ],
)
def test_a_mistyped_command_line_gets_one_sentence(arguments, message, capsys):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        parse(arguments)
    assert "\n" not in str(refused.value) and "  " not in str(refused.value)
    printed = capsys.readouterr()
    assert printed.out == printed.err == "", "nothing but the sentence, and that once for all ranks"


@pytest.mark.parametrize("force", ["_FORCE_UTF8_BOXES", "_FORCE_ANSI"])
def test_the_sentence_does_not_depend_on_the_terminal(force, monkeypatch):
    """A terminal gets boxes in UTF-8, in colors; a pipe gets neither."""
    fmtlib = importlib.import_module("tyro._fmtlib")
    assert hasattr(fmtlib, force)
    monkeypatch.setattr(fmtlib, force, True)
    with pytest.raises(UserError) as refused:
        parse(["--optim.name", "LARS"])
    expected = "Invalid choice 'LARS' for argument '--optim.name'; expected one of ('lars', 'sgd', 'nesterov', 'adamw')"
    assert str(refused.value) == f"{expected}; see train.py pretrain --help."


@pytest.mark.parametrize(
    ("rank", "code"), [("0", "error: There is no option '--zzz'; see train.py pretrain --help."), ("1", 1)]
)
def test_one_of_several_ranks_says_what_is_wrong(rank, code, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stopped, ending_together():
        parse(["--zzz"])
    assert stopped.value.code == code


def test_help_is_still_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["finetune", "--help"])
    assert not stopped.value.code and "--start.from-layer" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e300", "9" * 40])
def test_no_number_is_taken_without_a_look_at_it(value, run_folder):
    """Each number of each stage, the views' apart, which the recipe checks: refused by name, never passed on."""
    for stage in ([], FINE_TUNE, [*DISTILL[:-1], str(run_folder)]):
        start = parse(stage)
        for name in LIMITS:
            field, whole = start, None
            for part in name.split("."):
                field, whole = getattr(field, part, None), field
            if field is None or whole is start.views:
                continue
            if isinstance(field, int) and not re.fullmatch(r"-?\d+", value):
                continue  # not an integer, which the command line refuses by itself
            option = "--" + name.replace("_", "-").replace("loading.", "data.")
            with pytest.raises(UserError, match=re.escape(option)):
                parse([*stage, f"{option}={value}"])


@pytest.mark.parametrize("stage", [Config, FineTune, Distill])
def test_every_number_has_limits(stage):
    def numbers(options, prefix=""):
        for name, value in options.items():
            if isinstance(value, dict):
                yield from numbers(value, f"{prefix}{name}.")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield prefix + name

    checked_elsewhere = {
        "labels.fraction",
        *(name for name in numbers(dataclasses.asdict(stage())) if "views." in name),
    }
    assert set(numbers(dataclasses.asdict(stage()))) <= {*LIMITS, *checked_elsewhere}


def test_the_limits_themselves_are_taken(run_folder):
    for stage in ([], FINE_TUNE, [*DISTILL[:-1], str(run_folder)]):
        names = option_names(dataclasses.asdict(parse(stage)))
        for end in (0, 1):
            options = []
            for name, limits in LIMITS.items():
                option = "--" + name.replace("_", "-").replace("loading.", "data.")
                if option in names and name != "start.from_layer":
                    options += [option, str(limits[end])]
            parse([*stage, *options])


def test_a_run_folder_that_is_none(tmp_path):
    for content in ("", "[]", "{}", '{"data": "", "views": {"size": 1, "mean": 5}}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="is not the folder of a run"):
            images_of(tmp_path)


def test_a_teacher_that_moved_is_the_same_teacher(run_folder):
    """Its path may change; a checksum of its weights is in the checkpoint."""
    config = parse([*DISTILL[:-1], str(run_folder)])
    begun = {**json.loads(json.dumps(dataclasses.asdict(config))), "teacher": "elsewhere"}
    check_same_run(config, begun)
    with pytest.raises(UserError, match=r"--temperature 3 \(now 0\.1\)"):
        check_same_run(config, {**begun, "temperature": 3})


# ---- the presets against their sources
#
# 2002.05709: section 2.2 and appendix A (augmentation), 2.1 (optimization), B.1 (learning rate), B.5 (fine-tuning), B.9
# (CIFAR-10, with the command of the official code's README for ResNet-18). 2006.10029: section 3.
#
#          preset        epochs batch optimizer  base    scaling  decay  warm-up  peak = base x B / 256 or x sqrt(B)
PAPERS = {
    ("pretrain", "imagenet"): (100, 4096, "lars", 0.3, "linear", 1e-6, 10, 4.8),
    ("pretrain", "cifar10"): (1000, 512, "lars", 1.0, "linear", 1e-4, 10, 2.0),
    ("finetune", "v1-1"): (60, 4096, "nesterov", 0.05, "linear", 0.0, 0, 0.8),
    ("finetune", "v1-10"): (30, 4096, "nesterov", 0.05, "linear", 0.0, 0, 0.8),
    ("finetune", "v2-1"): (60, 1024, "lars", 0.005, "sqrt", 0.0, 0, 0.16),
    ("finetune", "v2-10"): (30, 1024, "lars", 0.005, "sqrt", 0.0, 0, 0.16),
    ("distill", "v2"): (400, 4096, "lars", 0.1, "sqrt", 1e-4, 20, 6.4),  # warm-up for 5 % of the epochs
}


@pytest.mark.parametrize(("stage", "name"), PAPERS)
def test_a_preset_has_its_papers_numbers(stage, name):
    config = PRESETS[stage][name]()
    optim = config.optim
    epochs, batch, optimizer, base, scaling, decay, warmup, peak = PAPERS[stage, name]
    assert config.preset == name and (config.epochs, config.batch_size) == (epochs, batch)
    assert (optim.name, optim.lr, optim.scaling) == (optimizer, base, scaling)
    assert (optim.weight_decay, optim.warmup_epochs, optim.momentum) == (decay, warmup, 0.9)
    rate = schedule(config, 10)
    assert rate(10 * warmup) == pytest.approx(peak, rel=1e-12) == max(rate(step) for step in range(10 * epochs))
    assert rate(10 * epochs) == pytest.approx(0, abs=1e-12)


def test_the_views_of_the_presets():
    imagenet, cifar = PRESETS["pretrain"]["imagenet"]().views, PRESETS["pretrain"]["cifar10"]().views
    for views in (imagenet, cifar):
        assert views.crop_area == (0.08, 1.0) and views.crop_aspect == (3 / 4, 4 / 3) and views.jitter == "exact"
        assert (views.flip_p, views.jitter_p, views.gray_p) == (0.5, 0.8, 0.2) and views.blur_sigma == (0.1, 2.0)
    assert (imagenet.size, imagenet.jitter_strength, imagenet.blur_p, imagenet.blur_window) == (224, 1.0, 0.5, 23)
    assert (cifar.size, cifar.jitter_strength, cifar.blur_p) == (32, 0.5, 0.0)
    labeled = [make().views for stage in ("finetune", "distill") for make in PRESETS[stage].values()]
    assert all((views.flip_p, views.jitter_p, views.gray_p, views.blur_p) == (0.5, 0, 0, 0) for views in labeled)


def test_heads_temperatures_and_first_layers_of_the_presets():
    imagenet, cifar = PRESETS["pretrain"]["imagenet"](), PRESETS["pretrain"]["cifar10"]()
    assert (imagenet.encoder.name, imagenet.head.version, imagenet.head.hidden, imagenet.head.out) == (
        "resnet50",
        "v1",
        2048,
        128,
    )
    assert (imagenet.loss.temperature, cifar.loss.temperature) == (0.1, 0.5)
    assert (cifar.encoder.name, cifar.head.hidden, cifar.head.out) == ("resnet18", 512, 128)
    first = {name: make().start.from_layer for name, make in PRESETS["finetune"].items()}
    assert first == {"textures": 0, "v1-1": 0, "v1-10": 0, "v2-1": 1, "v2-10": 1}
    shares = {name: make().labels.fraction for name, make in PRESETS["finetune"].items()}
    assert shares == {"textures": 0.1, "v1-1": 0.01, "v1-10": 0.1, "v2-1": 0.01, "v2-10": 0.1}
    student = PRESETS["distill"]["v2"]()
    assert student.temperature == 1.0 and student.labeled_share == 0 and math.isclose(student.optim.warmup_epochs, 20)
