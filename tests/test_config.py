"""Command line and configurations: what they refuse, in which words, and the numbers that the presets set."""

import importlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import pytest

from bench.harness import read_rows
from common import UserError
from config import DistillConfig, FinetuneConfig, PretrainConfig, StageConfig
from engine import processes
from engine.checkpoint import check_same_run
from engine.schedule import create_schedule
from options import option_names
from presets import DISTILL, FINETUNE, PRETRAIN, images_of, parse

STAGES = {"train.py": PRETRAIN, "finetune.py": FINETUNE, "distill.py": DISTILL}


def read(script: str, *arguments: str) -> StageConfig:
    """The configuration of a script's command line."""
    return parse(STAGES[script], list(arguments), prog=script)


@pytest.fixture
def run_folder(tmp_path):
    """A folder with the config.json of a run, for --teacher."""
    record = {"data": "x", "views": {"size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}}
    record |= {"timm_name": "simclr_resnet18", "timm_kwargs": {"num_classes": 0, "width": 0.5}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    return tmp_path


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", "--optm.lr 1", "no option '--optm.lr' (did you mean --optim.lr?); see train.py --help."),
        ("train.py", "--epoch=2", "There is no option '--epoch' (did you mean --epochs?); see train.py --help."),
        ("train.py", "--lr 1", "There is no option '--lr' (did you mean --optim.lr?); see train.py --help."),
        ("train.py", "--eval.no-baseline", "did you mean --eval.no-baselines?"),
        ("train.py", "--loader.max-bat 0", "did you mean --loader.max-bad?"),
        ("distill.py", "--teacher RUN --temperatur 1", "did you mean --temperature?); see distill.py --help."),
        ("train.py", "--zzz", "There is no option '--zzz'; see train.py --help."),
        ("train.py", "--bs 3", "There is no option '--bs'; see train.py --help."),
        ("train.py", "--encoder resnet50", "There is no option '--encoder' (did you mean --encoder.name?)"),
        ("train.py", "--views 96", "There is no option '--views' (did you mean --views.size?)"),
        ("train.py", "--views.size 96 96", "'96' is neither an option nor the value of one; see train.py --help."),
        ("train.py", "finetune", "'finetune' is neither an option nor"),
        ("train.py", "--preset cifar", "no preset 'cifar' (did you mean cifar10?); use one of auto, textures, "),
        ("train.py", "--preset", "There is no preset ''; use one of auto, textures, cifar10, cifar10-cpu, stl10, "),
        ("finetune.py", "--preset v2-2", "There is no preset 'v2-2' (did you mean v2-1?)"),
        ("train.py", "--epochs 1.5", "--epochs is '1.5'; it must be a whole number; see train.py --help."),
        ("train.py", "--optim.lr 1e-3x", "--optim.lr is '1e-3x'; it must be a number; see train.py --help."),
        ("train.py", "--precision fp16", "Invalid choice 'fp16' for argument '--precision'; expected one of ('auto', "),
        ("train.py", "--out", "Missing value for argument '--out'; expected 1 value; see train.py --help."),
        ("train.py", "--resume=", "--resume is empty; use auto, none, or the path"),
        ("train.py", "--cuda-graph --batch-size 16 --micro-batch 8", "but --micro-batch 8 takes several; omit one of"),
        ("train.py", "--views.size-schedule 16", "--views.size-schedule is 16; it must be pairs SIZE:EPOCHS"),
        ("finetune.py", "--data x --views.size-schedule 16:1", "schedule is for pretraining (train.py) only; omit the"),
        ("distill.py", "--teacher RUN --views.size-schedule 16:1", "schedule is for pretraining (train.py) only; omit"),
        ("finetune.py", "--data x --labels.fraction inf", "--labels.fraction is inf; use a fraction above 0"),
        ("finetune.py", "--start.run nowhere", "nowhere is not the folder of a run"),
    ],
)
def test_invalid_command_line_raises_one_sentence(script, arguments, message, run_folder, capsys):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read(script, *arguments.replace("RUN", str(run_folder)).split())
    assert "\n" not in str(error.value) and "  " not in str(error.value)
    printed = capsys.readouterr()
    assert printed.out == printed.err == "", "nothing but the sentence, and only once for all ranks"


@pytest.mark.parametrize("force", ["_FORCE_UTF8_BOXES", "_FORCE_ANSI"])
def test_error_sentence_does_not_depend_on_the_terminal(force, monkeypatch):
    """tyro prints UTF-8 boxes and colors on a terminal, but not into a pipe."""
    fmtlib = importlib.import_module("tyro._fmtlib")
    assert hasattr(fmtlib, force)
    monkeypatch.setattr(fmtlib, force, True)
    with pytest.raises(UserError) as error:
        read("train.py", "--optim.name", "LARS")
    names = "('lars', 'sgd', 'nesterov', 'adamw', 'muon')"
    expected = f"Invalid choice 'LARS' for argument '--optim.name'; expected one of {names} (did you mean lars?)"
    assert str(error.value) == f"{expected}; see train.py --help."


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [processes.ALIKE_S])])
def test_the_first_rank_of_a_machine_prints_a_command_line_error_before_others(rank, waits, monkeypatch):
    """The launcher ends the others while they wait."""
    slept = []
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as stopped, processes.ending_together():
        read("train.py", "--zzz")
    assert stopped.value.code == "error: There is no option '--zzz'; see train.py --help." and slept == waits


def test_help_lists_presets_with_cost_and_results(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        read("train.py", "--help")
    printed = capsys.readouterr().out
    presets = printed[printed.index("Presets:") : printed.index("--out STR")]
    assert all(f"\n  {name}: " in presets for name in PRETRAIN)
    (trained,) = (row for row in read_rows("demo") if row["features"] == "trained")
    assert f"{float(trained['knn_top1']):.3f} kNN" in presets
    assert "not measured" in presets and "--preset imagenet" in presets
    assert all(len(line) <= 80 for line in presets.splitlines())
    for part in ("optim", "checkpoint", "loader", "views", "encoder", "head", "loss", "eval"):
        assert f" {part} options " in printed


# ---- --config


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train.py", ["--preset", "stl10", "--data", "x", "--views.crop-area", "0.3", "0.9", "--no-eval.baselines"]),
        ("train.py", ["--preset", "cifar10", "--data", "x", "--views.size-schedule", "16:30", "24:40"]),
        ("finetune.py", ["--preset", "v1-10", "--data", "x", "--optim.lr", "1e-7", "--compile"]),
    ],
)
@pytest.mark.parametrize("name", ["", "config.json"])
def test_the_configuration_of_another_run_is_read_back(script, options, name, tmp_path):
    stored = read(script, *options, "--out", "there", "--resume", "none")
    (tmp_path / "config.json").write_text(json.dumps(asdict(stored) | {"timm_name": "x", "timm_kwargs": {"width": 2}}))
    config = read(script, "--config", str(tmp_path / name))
    assert config == replace(stored, out="", resume="auto", config=str(tmp_path / name))
    assert read(script, "--seed=7", "--config", str(tmp_path / name), "--epochs", "3") == replace(
        config, seed=7, epochs=3
    )


def test_other_data_is_not_normalized_as_the_data_of_the_other_run(tmp_path):
    started = ["--preset", "cifar10", "--data", "x", "--views.mean", "0.1", "0.2", "0.3", "--views.std", "0.5"]
    (tmp_path / "config.json").write_text(json.dumps(asdict(read("train.py", *started))))
    for data, mean, std in ("x", (0.1, 0.2, 0.3), (0.5,)), ("y", None, None):
        views = read("train.py", "--config", str(tmp_path), "--data", data).views
        assert (views.mean, views.std) == (mean, std)
    views = read("train.py", "--config", str(tmp_path), "--data", "y", "--views.mean", "0.4").views
    assert (views.mean, views.std) == ((0.4,), None)


def test_an_older_configuration_gets_the_preset_for_what_it_lacks(tmp_path):
    stored = asdict(read("train.py", "--preset", "cifar10", "--data", "x"))
    del stored["views"]["gray_p"], stored["max_skipped"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = read("train.py", "--config", str(tmp_path))
    assert config == replace(read("train.py", "--preset", "cifar10", "--data", "x"), config=str(tmp_path))


@pytest.mark.parametrize(
    ("script", "stored", "message"),
    [
        ("train.py", None, "is not the configuration of a run of train.py"),
        ("train.py", "{", "is not the configuration of a run of train.py"),
        ("train.py", "[]", "is not the configuration of a run of train.py"),
        ("train.py", '{"preset": "v2-1"}', "is not the configuration of a run of train.py"),
        ("finetune.py", '{"preset": "textures", "micro_batch": 4}', "finetune.py has no option --micro-batch"),
        ("train.py", '{"preset": "textures", "views": {"swirl": 1}}', "train.py has no option --views.swirl"),
        ("train.py", '{"preset": "textures", "epochs": "many"}', "--epochs is 'many'; it must be a whole number"),
        ("train.py", '{"preset": "textures", "epochs": -1}', "--epochs is -1; it must be at least 1"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_sentence(script, stored, message, tmp_path):
    if stored is not None:
        (tmp_path / "config.json").write_text(stored)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read(script, "--config", str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_preset_and_a_configuration_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="use one of them"):
        read("train.py", "--config", str(tmp_path), "--preset", "cifar10")


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        read("finetune.py", "--help")
    assert not stopped.value.code and "--start.from-layer" in capsys.readouterr().out


@pytest.mark.parametrize("switch", ["--eval.no-baselines", "--no-eval.baselines"])
def test_nested_switches_have_both_negative_forms(switch):
    assert read("train.py").eval.baselines and not read("train.py", switch).eval.baselines


# ---- every number is validated


def numbers(config: Any, prefix: str = "--") -> Iterator[tuple[str, Any, str, float]]:
    """Every number of a configuration: (option, part it belongs to, field, value); tuples by their first element."""
    for field in fields(config):
        value, option = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if is_dataclass(value):
            yield from numbers(value, f"{option}.")
        else:
            number = next(iter(value), None) if isinstance(value, tuple) else value
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield option, config, field.name, number


def changed(part: Any, field: str, number: float) -> Any:
    """The part with another number; its own validation runs again."""
    before = getattr(part, field)
    return replace(part, **{field: (number, *before[1:]) if isinstance(before, tuple) else number})


@pytest.mark.parametrize("stage", [PretrainConfig, FinetuneConfig, DistillConfig])
def test_no_number_is_accepted_unchecked(stage):
    checked = 0
    for option, part, field, number in numbers(stage()):
        invalid = [-1, *([10**40] if isinstance(number, int) else [math.nan, math.inf, -math.inf, 1e300])]
        for value in invalid[: 1 if option == "--views.size" else None]:  # the encoder limits large views
            with pytest.raises(UserError, match=rf"^{re.escape(option)} is ") as error:
                changed(part, field, value)
            assert str(error.value).endswith(".") and "\n" not in str(error.value)
            checked += 1
    assert checked > 80


@pytest.mark.parametrize("stage", [PretrainConfig, FinetuneConfig, DistillConfig])
def test_bounds_named_by_an_error_are_valid(stage):
    """An error says "at least 1" or "at most 5": exactly these values must be accepted."""
    bounds = 0
    for option, part, field, number in numbers(stage()):
        for outside in (-(10**40), 10**40)[: 1 if option == "--views.size" else None]:
            with pytest.raises(UserError) as error:
                changed(part, field, type(number)(outside))
            if found := re.search(r"it must be at (?:least|most) (\S+)\.$", str(error.value)):
                changed(part, field, type(number)(found[1]))
                bounds += 1
    assert bounds > 30


@pytest.mark.parametrize(("script", "value"), [("train.py", "-7"), ("distill.py", "9" * 40)])
def test_numbers_are_validated_on_the_command_line(script, value, run_folder):
    start = ["--teacher", str(run_folder), "--preset", "textures"] if script == "distill.py" else []
    for option, part, field, _ in numbers(read(script, *start)):
        if not isinstance(getattr(part, field), tuple) and (option != "--views.size" or value[0] == "-"):
            with pytest.raises(UserError, match=re.escape(option)):
                read(script, *start, f"{option}={value}")


def test_option_names_are_those_of_the_help(capsys):
    with pytest.raises(SystemExit):
        read("train.py", "--help")
    printed = capsys.readouterr().out
    assert all(f"{option}" in printed for option in option_names(asdict(read("train.py"))) if "no-" not in option)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"data": "", "views": {"size": 1, "mean": 5}}'])
def test_folder_without_a_valid_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="is not the folder of a run"):
        images_of(tmp_path)


def test_teacher_may_move_between_start_and_resume(run_folder):
    """Its path may change, because the checkpoint holds a checksum of its weights."""
    config = read("distill.py", "--preset", "textures", "--teacher", str(run_folder))
    saved = {**json.loads(json.dumps(asdict(config))), "teacher": "elsewhere"}
    check_same_run(config, saved)
    with pytest.raises(UserError, match=r"--temperature 3 \(now 0\.1\)"):
        check_same_run(config, {**saved, "temperature": 3})


def test_runs_that_are_older_than_an_option_can_be_resumed():
    config = read("train.py")
    saved = json.loads(json.dumps(asdict(config)))
    del saved["loss"]["queue"], saved["views"]["size_schedule"]
    check_same_run(config, saved)
    with pytest.raises(UserError, match=r"--loss.queue 0 \(now 9\)"):
        check_same_run(read("train.py", "--loss.queue", "9"), saved)


# ---- the presets and their sources
#
# 2002.05709: section 2.2 and appendix A (augmentation), 2.1 (optimization), B.1 (learning rate), B.5 (fine-tuning).
# 2006.10029: section 3. CIFAR-10: github.com/dkobak/simclr-cifar10.
#
#          preset        epochs batch optimizer  base    scaling  decay  warmup   peak = base x B / 256 or x sqrt(B)
PAPERS = {
    ("train.py", "imagenet"): (100, 4096, "lars", 0.3, "linear", 1e-6, 10, 4.8),
    ("train.py", "cifar10"): (1000, 512, "sgd", 0.03, "linear", 5e-4, 0, 0.06),
    ("finetune.py", "v1-1"): (60, 4096, "nesterov", 0.05, "linear", 0.0, 0, 0.8),
    ("finetune.py", "v1-10"): (30, 4096, "nesterov", 0.05, "linear", 0.0, 0, 0.8),
    ("finetune.py", "v2-1"): (60, 1024, "lars", 0.005, "sqrt", 0.0, 0, 0.16),
    ("finetune.py", "v2-10"): (30, 1024, "lars", 0.005, "sqrt", 0.0, 0, 0.16),
    ("distill.py", "v2"): (400, 4096, "lars", 0.1, "sqrt", 1e-4, 20, 6.4),  # warm-up during 5 % of the epochs
}


@pytest.mark.parametrize(("script", "name"), PAPERS)
def test_presets_have_the_numbers_of_the_papers(script, name):
    config = STAGES[script][name]()
    optim = config.optim
    epochs, batch_size, optimizer, base, scaling, decay, warmup, peak = PAPERS[script, name]
    assert config.preset == name and (config.epochs, config.batch_size) == (epochs, batch_size)
    assert (optim.name, optim.lr, optim.scaling) == (optimizer, base, scaling)
    assert (optim.weight_decay, optim.warmup_epochs, optim.momentum) == (decay, warmup, 0.9)
    lr = create_schedule(optim, batch_size, epochs, steps_per_epoch=10)
    assert lr(10 * warmup) == pytest.approx(peak, rel=1e-12) == max(lr(step) for step in range(10 * epochs))
    assert lr(10 * epochs) == pytest.approx(0, abs=1e-12)


def test_augmentation_of_the_presets():
    imagenet, cifar = PRETRAIN["imagenet"]().views, PRETRAIN["cifar10"]().views
    for views in (imagenet, cifar):
        assert views.crop_aspect == (3 / 4, 4 / 3) and views.jitter == "exact"
        assert (views.flip_p, views.jitter_p) == (0.5, 0.8) and views.blur_sigma == (0.1, 2.0)
    assert (imagenet.crop_area, imagenet.gray_p) == ((0.08, 1.0), 0.2)
    assert (cifar.crop_area, cifar.gray_p) == ((0.2, 1.0), 0.1)
    assert (imagenet.size, imagenet.jitter_strength, imagenet.blur_p, imagenet.blur_window) == (224, 1.0, 0.5, 23)
    assert (cifar.size, cifar.jitter_strength, cifar.blur_p) == (32, 0.5, 0.0)
    labeled = [preset().views for presets in (FINETUNE, DISTILL) for preset in presets.values()]
    assert all((views.flip_p, views.jitter_p, views.gray_p, views.blur_p) == (0.5, 0, 0, 0) for views in labeled)


def test_heads_temperatures_and_labels_of_the_presets():
    imagenet, cifar = PRETRAIN["imagenet"](), PRETRAIN["cifar10"]()
    assert (imagenet.encoder.name, imagenet.head.version) == ("resnet50", "v1")
    assert (imagenet.head.hidden, imagenet.head.out) == (2048, 128)
    assert (imagenet.loss.temperature, cifar.loss.temperature) == (0.1, 0.5)
    assert (cifar.encoder.name, cifar.head.hidden, cifar.head.out) == ("resnet18", 1024, 128)
    from_layer = {name: preset().start.from_layer for name, preset in FINETUNE.items()}
    assert from_layer == {"auto": 0, "textures": 0, "v1-1": 0, "v1-10": 0, "v2-1": 1, "v2-10": 1}
    fraction = {name: preset().labels.fraction for name, preset in FINETUNE.items()}
    assert fraction == {"auto": 1, "textures": 0.02, "v1-1": 0.01, "v1-10": 0.1, "v2-1": 0.01, "v2-10": 0.1}
    student = DISTILL["v2"]()
    assert student.temperature == 1.0 and student.labeled_share == 0


def test_options_override_the_preset():
    config = read("finetune.py", "--preset", "v2-1", "--data", "x", "--start.from-layer", "0")
    assert isinstance(config, FinetuneConfig) and config.start.from_layer == 0
    assert replace(config, data="", start=FINETUNE["v2-1"]().start) == FINETUNE["v2-1"]()
