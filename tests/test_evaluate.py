"""evaluate.py from the command line, on a few textures and an untrained encoder."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import evaluate
import presets
from common import file_sha256
from engine import session
from evaluation import knn_top1, linear, sgd_probe
from evaluation.accuracy import wilson
from evaluation.cache import code_checksum
from model import EncoderConfig, create_encoder, encoder_spec, load_encoder, save_encoder
from pipeline.convert import textures
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.images.pixel_format import decode_pixels
from pipeline.loader import resident
from pipeline.shards.dataset import open_splits
from tests.pipeline.loaders import center_crops
from tests.small_sets import remove_labels, texture_shards

ROOT = Path(__file__).parents[1]
SPEC = encoder_spec(EncoderConfig("resnet18", stem="standard", width=0.125), image_size=32)
VIEWS = ["--size", 32, "--mean", 0.5, 0.5, 0.5, "--std", 0.25, 0.25, 0.25]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 train and 40 test textures of ten classes, as shards."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=80, test=40)


@pytest.fixture
def run(data, tmp_path):
    """Folder of a finished run."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(0)
    save_encoder(create_encoder(SPEC), SPEC, folder / "encoder.safetensors")
    options = dataclasses.replace(presets.textures(), data=str(data))
    record = {**dataclasses.asdict(options), "timm_name": SPEC[0], "timm_kwargs": SPEC[1]}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run evaluate.py in this process; returns what it prints, joined into one line."""
    threads = torch.get_num_threads()

    def run(*arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(session, "available_cores", lambda: 1)  # threads would only wait for each other
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        return " ".join(capsys.readouterr().out.split())  # wherever the terminal wraps it

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def launch(processes, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--main_process_port", "0", str(ROOT / "evaluate.py")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "COLUMNS": "200"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


def record_of(run, name):
    return json.loads((run / "evaluation" / f"{name}.json").read_text())


def embedded_by_hand(run, data):
    """Features and labels of both splits, computed without evaluate.py."""
    encoder, views = load_encoder(run / "encoder.safetensors"), presets.textures().views
    found = []
    for split in open_splits(str(data)):
        batches = center_crops(split, views, np.arange(len(split)), batch_size=256, device=torch.device("cpu"))
        with torch.no_grad():
            parts = [(encoder(batch.views), batch.label) for batch in batches]
        found.append(tuple(torch.cat(part) for part in zip(*parts, strict=True)))
    return found


def test_knn_writes_scores_and_their_origin(run, data, run_here):
    printed = run_here("knn", run, "--k", 3, 20, "--temperature", 0.1, 0.07, "--precision", "fp32")
    train, test = embedded_by_hand(run, data)
    record = record_of(run, "knn")
    assert [(row["k"], row["temperature"]) for row in record["results"]] == [(3, 0.1), (3, 0.07), (20, 0.1), (20, 0.07)]
    for row in record["results"]:
        assert row["top1"] == pytest.approx(knn_top1(*train, *test, k=row["k"], temperature=row["temperature"]))
        assert row["top1"] <= row["top5"] and row["top1_wilson_95"] == list(wilson(round(40 * row["top1"]), 40))
        assert f"{row['top1']:.4f}" in printed
    assert record["what"] == "knn" and record["precision"] == "fp32" and record["classes"] == 10
    assert record["encoder_sha256"] == file_sha256(run / "encoder.safetensors")
    assert (record["size"], record["mean"], record["std"]) == (32, [0.5] * 3, [0.25] * 3)
    about = record["data"]
    assert (about["train"]["images"], about["test"]["images"], about["test"]["left_out"]) == (80, 40, 0)
    assert about["train"]["sha256"] != about["test"]["sha256"] and about["train"]["images_per_s"] > 0
    assert record["seconds"] > 0 and record["processes"] == 1 and "--k" in record["arguments"]
    assert [path.name for path in (run / "evaluation").iterdir()] == ["knn.json"]


def test_a_default_k_is_at_most_all_images(run, data, run_here, tmp_path):
    few = unlabel(data, tmp_path, "train", 25)
    run_here("knn", run, "--data", few)
    assert [row["k"] for row in record_of(run, "knn")["results"]] == [2 * 7]


def test_features_are_embedded_once(run, data, run_here, tmp_path, monkeypatch):
    assert "from the cache" not in run_here("knn", run)
    first = record_of(run, "knn")
    stored = sorted((tmp_path / "cache" / "features").iterdir())
    assert len(stored) == 2

    def not_needed(*args, **options):
        raise AssertionError("features were embedded again")

    monkeypatch.setattr(evaluate, "center_crop_batches", not_needed)
    printed = run_here("knn", run)
    again = record_of(run, "knn")
    assert printed.count("from the cache") == 2 and again["data"]["test"]["from_cache"]
    assert again["results"] == first["results"]
    # a copy of the encoder elsewhere is the same encoder
    shutil.copy(run / "encoder.safetensors", tmp_path / "other.safetensors")
    out = tmp_path / "other.json"
    run_here("knn", tmp_path / "other.safetensors", "--data", data, *VIEWS, "--out", out)
    assert json.loads(out.read_text())["results"] == first["results"]
    monkeypatch.undo()
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))
    # other views, precisions or encoders are not
    for change in (["--mean", 0.4, 0.5, 0.5], ["--precision", "bf16" if first["precision"] == "fp32" else "fp32"]):
        assert "from the cache" not in run_here("knn", run, *change)
    weights = load_file(run / "encoder.safetensors")
    encoder = create_encoder(SPEC)
    encoder.load_state_dict({name: 1.01 * each for name, each in weights.items()})
    save_encoder(encoder, SPEC, run / "encoder.safetensors")
    assert "from the cache" not in run_here("knn", run)


def test_features_belong_to_their_images(run, data, run_here, tmp_path):
    """As many other images of the same classes."""
    run_here("knn", run)
    for split in ("train", "test"):
        folder = tmp_path / "images" / split
        for number, name in enumerate(textures.CLASSES * (8 if split == "train" else 4)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{number}.jpg").write_bytes(textures.render(1, split, number))
        write_split(folder_source(folder), tmp_path / "shards", split)
    assert "from the cache" not in run_here("knn", run, "--data", tmp_path / "shards")


def test_no_cache_leaves_nothing(run, run_here, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    run_here("knn", run)
    kept = record_of(run, "knn")["results"]
    (tmp_path / "cache").rename(tmp_path / "other cache")
    run_here("knn", run, "--no-cache")
    assert record_of(run, "knn")["results"] == kept
    assert not (tmp_path / "cache" / "features").exists() and not list((tmp_path / "temporary").iterdir())


def test_linear_fast_reports_every_seed_and_an_interval(run, run_here, monkeypatch):
    monkeypatch.setattr(linear, "L2_PATH", (1.0, 0.1))
    printed = run_here("linear", run, "--seeds", 3)
    record = record_of(run, "linear-fast")
    assert [row["seed"] for row in record["results"]] == [0, 1, 2]
    assert all(row["converged"] and row["gradient"] <= 1e-6 and row["l2"] in (1.0, 0.1) for row in record["results"])
    assert all(row["held_out_images"] == 20 and row["top1"] <= row["top5"] for row in record["results"])
    mean = sum(row["top1"] for row in record["results"]) / 3
    assert record["over_seeds"]["top1"]["mean"] == pytest.approx(mean) and f"{mean:.4f} ±" in printed
    printed = run_here("linear", run, "--max-iterations", 1, "--held-out", 0.5)
    assert "not converged" in printed and not record_of(run, "linear-fast")["results"][0]["converged"]


def damage(data, tmp_path, samples):
    """Copy the shards and overwrite samples of the first test shard with zeros, keeping the recorded checksums."""
    shutil.copytree(data, tmp_path / "shards", dirs_exist_ok=True)
    rows = np.load(tmp_path / "shards" / "test" / "test-000000.index.npy")
    with open(tmp_path / "shards" / "test" / "test-000000.tar", "r+b") as tar:
        for sample in samples:
            tar.seek(int(rows["offset"][sample]))
            tar.write(bytes(int(rows["size"][sample])))
    return tmp_path / "shards"


def test_linear_simclr_in_two_processes_equals_one(run, data, run_here, tmp_path):
    """Also: two processes share the embedding, one of them writes the cache, and the limit on unreadable images applies
    to all processes together, although both such images belong to the first one, which embeds 20 images.
    """
    options = ["linear", run, "--protocol", "simclr", "--epochs", 2, "--batch-size", 32, "--precision", "fp32"]
    options += ["--data", damage(data, tmp_path, [2, 4]), "--loader.max-bad", 0.05]
    run_here(*options, "--seeds", 2)
    one = record_of(run, "linear-simclr")
    assert one["batch_size"] == 32 and one["lr"] == 0.0125 and one["results"][0]["steps"] == 4
    assert one["results"][0]["train_loss"] != one["results"][1]["train_loss"]
    (stored,) = (tmp_path / "cache" / "features").iterdir()
    features = {name: tensor.clone() for name, tensor in load_file(stored).items()}  # not mapped from the file
    stored.unlink()
    done = launch(2, *options, "--seeds", 2)
    assert done.returncode == 0, done.stderr
    two = record_of(run, "linear-simclr")
    assert two["processes"] == 2 and two["data"]["test"]["from_cache"] is False
    assert two["data"]["test"]["left_out"] == one["data"]["test"]["left_out"] == 2
    again = load_file(stored)
    assert torch.equal(again["index"], features["index"])
    torch.testing.assert_close(again["features"], features["features"])
    for alone, together in zip(one["results"], two["results"], strict=True):
        assert together["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-5)
        assert together["top1"] == pytest.approx(alone["top1"], abs=0.027)  # one image may be a tie
    assert done.stdout.count("written:") == 1


def test_seeds_of_linear_simclr_share_resident_images(run, run_here, monkeypatch):
    decoded = []
    monkeypatch.setattr(resident, "decode_pixels", lambda *image: decoded.append(image) or decode_pixels(*image))
    augments, loader = [], evaluate.ViewLoader
    monkeypatch.setattr(evaluate, "ViewLoader", lambda *args, **kw: augments.append(args[1]) or loader(*args, **kw))
    options = ["--protocol", "simclr", "--epochs", 2, "--loader.resident", "on", "--loader.prefetch", 0]
    run_here("linear", run, *options, "--seeds", 2)
    assert len(decoded) == 80
    assert {(views.jitter_p, views.gray_p, views.blur_p, views.flip_p) for views in augments} == {(0, 0, 0, 0.5)}


@pytest.mark.soak
@pytest.mark.parametrize("what", [["knn"], ["linear"], ["embed", "--out", "OUT"]])
def test_two_processes_produce_the_scores_of_one(run, run_here, tmp_path, what):
    out = tmp_path / "features.safetensors"
    name, *rest = [out if word == "OUT" else word for word in what]
    options = [name, run, "--precision", "fp32", "--no-cache", *rest]

    def outcome():
        if name == "embed":
            return load_file(out)
        results = record_of(run, {"linear": "linear-fast"}.get(name, name))["results"]
        return torch.tensor([[row["top1"], row["top5"]] for row in results])

    run_here(*options)
    alone = outcome()
    done = launch(2, *options)
    assert done.returncode == 0, done.stderr
    # batches of other shapes are rounded differently, which may change the prediction for one of the 40 images
    tolerance = {} if name == "embed" else {"rtol": 0, "atol": 0.026}
    torch.testing.assert_close(outcome(), alone, **tolerance)


def test_embed_writes_every_split_and_accepts_a_single_one(run, data, run_here, tmp_path):
    out = tmp_path / "features.safetensors"
    run_here("embed", run, "--out", out, "--precision", "fp32")
    written = load_file(out)
    for split, (features, label) in zip(("train", "test"), embedded_by_hand(run, data), strict=True):
        torch.testing.assert_close(written[f"{split}.features"], features)
        assert torch.equal(written[f"{split}.label"], label)
        assert written[f"{split}.index"].tolist() == list(range(len(label)))
    run_here("embed", run, "--data", data / "train", "--out", out)
    assert sorted(load_file(out)) == ["train.features", "train.index", "train.label"]


def unlabel(data, tmp_path, split, count=None):
    """Copy the shards and remove the labels of the first `count` samples of each shard of a split."""
    shutil.copytree(data, tmp_path / "unlabeled")
    remove_labels(tmp_path / "unlabeled" / split, count)
    return tmp_path / "unlabeled"


def test_unlabeled_images_are_embedded_but_not_evaluated(run, data, run_here, tmp_path):
    partly = unlabel(data, tmp_path, "train", 5)
    run_here("knn", run, "--data", partly)
    assert record_of(run, "knn")["data"]["train"]["images"] == 80 - 3 * 5
    run_here("linear", run, "--data", partly, "--protocol", "simclr", "--epochs", 1)
    assert record_of(run, "linear-simclr")["batch_size"] == 65
    run_here("embed", run, "--data", partly, "--out", tmp_path / "f.safetensors")
    assert (load_file(tmp_path / "f.safetensors")["train.label"] == -1).sum() == 15


def test_unreadable_image_is_left_out_and_listed(run, data, run_here, tmp_path):
    shutil.copytree(data, tmp_path / "shards")
    rows = np.load(tmp_path / "shards" / "test" / "test-000000.index.npy")
    with open(tmp_path / "shards" / "test" / "test-000000.tar", "r+b") as tar:
        tar.seek(int(rows["offset"][3]))
        tar.write(bytes(100))
    printed = run_here("knn", run, "--data", tmp_path / "shards", "--loader.max-bad", 0.05)
    record = record_of(run, "knn")
    assert record["data"]["test"]["images"] == 39 and record["data"]["test"]["left_out"] == 1
    assert "1 unreadable images left out" in printed
    (bad,) = map(json.loads, (run / "evaluation" / "knn.bad_samples.jsonl").read_text().splitlines())
    assert bad["key"] == rows["key"][3].decode()


def test_features_without_unreadable_images_are_reused_until_an_image_is_repaired(run, data, run_here, tmp_path):
    shards = damage(data, tmp_path, [3, 5])
    options = ["knn", run, "--data", shards, "--loader.max-bad", 0.05]
    run_here(*options)
    out = tmp_path / "again.json"
    printed = run_here(*options, "--out", out)
    assert printed.count("from the cache") == 2 and "2 unreadable images left out" in printed
    listed = (tmp_path / "again.bad_samples.jsonl").read_text().splitlines()
    assert len(listed) == 2, "the file named in the message"
    with pytest.raises(SystemExit, match=r"2 of 40 images of .*test can't be read \(see .*--loader\.max-bad 0\.04"):
        run_here(*options[:-1], 0.04)  # although the features are stored already
    damage(data, tmp_path, [3])  # repairs sample 5
    run_here(*options)
    about = record_of(run, "knn")["data"]
    assert about["train"]["from_cache"] and not about["test"]["from_cache"] and about["test"]["images"] == 39
    damage(data, tmp_path, [])
    run_here(*options)
    repaired = record_of(run, "knn")
    assert repaired["data"]["test"]["images"] == 40 and "from the cache" in run_here(*options)
    run_here("knn", run, "--out", out)
    assert json.loads(out.read_text())["results"] == repaired["results"]


def test_code_and_versions_determine_the_name_of_features(run, run_here, monkeypatch):
    run_here("knn", run)
    assert "from the cache" in run_here("knn", run)
    record = record_of(run, "knn")
    assert {"torch", "timm", "cv2", "code_sha256"} <= record.keys()
    for change in (lambda *packages: "other", "torch", "timm"):
        with monkeypatch.context() as patch:
            if change == "torch":
                patch.setattr(evaluate.torch, "__version__", "2.99.0")
            elif change == "timm":
                patch.setattr(evaluate.timm, "__version__", "1.0")
            else:
                patch.setattr(evaluate, "code_checksum", change)
            assert "from the cache" not in run_here("knn", run)
    assert len(code_checksum(evaluate.model)) == 64


def test_result_replaces_an_earlier_result_and_no_other_file(run, run_here, tmp_path):
    config, weights = run / "config.json", run / "encoder.safetensors"
    folder = tmp_path / "folder"
    folder.mkdir()
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"what": "else"}')
    before = {path: path.read_bytes() for path in (config, weights, foreign)}
    for out in (*before, folder, Path("/dev/null")):
        for command in ("knn", "embed", "report"):
            with pytest.raises(SystemExit, match=r"exists and is not a result of .*; use another --out"):
                run_here(command, run, "--out", out)
    with pytest.raises(SystemExit, match=r"s3:/bucket/knn\.json is a URL, but results are written to a local file"):
        run_here("knn", run, "--out", "s3://bucket/knn.json")
    with pytest.raises(SystemExit, match=r"--run is given without its name: evaluate\.py knn RUN\."):
        run_here("knn", "--run", run)
    assert {path: path.read_bytes() for path in before} == before and Path("/dev/null").is_char_device()
    assert sorted(tmp_path.iterdir()) == sorted({folder, foreign, run})
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit, match=r"a\.json can't be written"):
        run_here("knn", run, "--out", tmp_path / "taken" / "a.json")
    out = tmp_path / "result"
    out.touch()
    for command in ("knn", "embed", "knn"):
        run_here(command, run, "--out", out)
        assert out.stat().st_mode & 0o444 == 0o444 & ~os.umask(os.umask(0))
    assert json.loads(out.read_text())["what"] == "knn"


def test_diverged_classifier_has_no_result(run, run_here, monkeypatch):
    def broken(width, classes, seed, device):
        probe = torch.nn.Linear(width, classes)
        torch.nn.init.constant_(probe.weight, float("inf"))
        return probe

    monkeypatch.setattr(sgd_probe, "probe_layer", broken)
    with pytest.raises(SystemExit, match=r"The training of the classifier diverged \(seed 0, mean loss nan"):
        run_here("linear", run, "--protocol", "simclr", "--epochs", 1)
    assert not (run / "evaluation" / "linear-simclr.json").exists()


def other_classes(data, tmp_path):
    shutil.copytree(data, tmp_path / "shards")
    manifest = tmp_path / "shards" / "test" / "dataset.json"
    manifest.write_text(manifest.read_text().replace(f'"{textures.CLASSES[0]}"', '"something else"'))
    return tmp_path / "shards"


def not_finite(run):
    weights = load_file(run / "encoder.safetensors")
    weights["bn1.running_mean"][0] = float("nan")
    metadata = {"timm_name": SPEC[0], "timm_kwargs": json.dumps(SPEC[1])}
    save_file(weights, run / "encoder.safetensors", metadata)


def unfinished(run):
    (run / "encoder.safetensors").unlink()
    (run / "checkpoints").mkdir()


def test_errors_are_one_sentence(run, data, run_here, tmp_path):
    def refused(*arguments):
        with pytest.raises(SystemExit) as stopped:
            run_here(*arguments)
        assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)
        assert not (run / "evaluation" / "knn.json").exists()
        return str(stopped.value)

    encoder = run / "encoder.safetensors"
    assert "There is nothing at" in refused("knn", tmp_path / "nowhere")
    assert "set --data --size --mean --std or use its run folder" in refused("knn", encoder)
    assert "set --mean or use its run folder" in refused("knn", encoder, "--data", data, *VIEWS[:2], *VIEWS[6:])
    assert "No shards at" in refused("knn", run, "--data", tmp_path / "nowhere")
    assert "There is no test split in" in refused("linear", run, "--data", data / "train")
    assert "--k 81 exceeds the 80 labeled training images" in refused("knn", run, "--k", 5, 81)
    assert "--k is 0; it must be at least 1" in refused("knn", run, "--k", 0)
    assert "--temperature is 0.0; it must be at least" in refused("knn", run, "--temperature", 0)
    assert "--temperature is 0; it must be" in refused("knn", run, "--temperature")
    assert "--temperature is nan; it must be" in refused("knn", run, "--temperature", 0.1, "nan")
    assert "--std is nan; it must be" in refused("knn", run, "--std", 1, "nan", 1)
    assert "--loader.cache-gb is inf; it must be" in refused("knn", run, "--loader.cache-gb", "inf")
    assert "--size is 7; it must be at least 8" in refused("knn", run, "--size", 7)
    assert "--mean is 128.0; it must be at most 1" in refused("knn", run, "--mean", 1, 128, 1)
    assert "There is no option '--workers' (did you mean --loader.workers?)" in refused("knn", run, "--workers", 2)
    assert "There is no command 'lineer' (did you mean linear?)" in refused("lineer", run)
    assert "There is no run to evaluate" in refused("knn")
    assert "--k can't be 'x'; see evaluate.py knn --help" in refused("knn", run, "--k", "x")
    assert "no option go before it" in refused("knn", "--k", 5, run)
    assert "--seeds is 0" in refused("linear", run, "--seeds", 0)
    assert "--held-out is 1.0" in refused("linear", run, "--held-out", 1)
    assert "--std is 0.0; it must be" in refused("knn", run, "--std", 0, 1, 1)
    assert "embed has no file to write; use --out" in refused("embed", run)
    assert "exists and is not a result of evaluate.py" in refused("embed", run, "--out", encoder)
    assert "has other classes than" in refused("knn", run, "--data", other_classes(data, tmp_path))
    assert "No image of" in refused("knn", run, "--data", unlabel(data, tmp_path, "test"))
    (tmp_path / "blocked").touch()
    os.environ["STREAMCLR_CACHE"] = str(tmp_path / "blocked")
    assert "or use --no-cache" in refused("knn", run)
    os.environ["STREAMCLR_CACHE"] = str(tmp_path / "cache")
    not_finite(run)
    assert "hold NaN or infinity" in refused("knn", run)
    encoder.write_bytes(b"nothing")
    assert "encoder.safetensors" in refused("knn", run)
    unfinished(run)
    assert "is not finished" in refused("knn", run)
    (run / "checkpoints").rmdir()
    assert "is not the folder of a finished run" in refused("knn", run)


def test_config_without_views_is_rejected(run, run_here):
    (run / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"config\.json is missing or incomplete"):
        run_here("knn", run)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("views", "size", "32"),
        ("views", "size", None),
        ("views", "mean", [0.5, 0.5]),
        ("views", "std", [0.5, 0.5, float("nan")]),
        ("views", "crop_area", 1),
        ("eval", "k", 0),
        (None, "data", 7),
        (None, "eval", None),
        (None, "views", []),
    ],
)
def test_config_with_invalid_values_is_rejected(run, run_here, part, name, value):
    config = json.loads((run / "config.json").read_text())
    (config[part] if part else config)[name] = value
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"^error: .*config\.json is missing or incomplete"):
        run_here("knn", run)


def test_help_lists_commands_and_options(run_here, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_here("linear", "--help")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    with pytest.raises(SystemExit) as stopped:
        run_here("--help")
    assert stopped.value.code == 0 and "python evaluate.py linear RUN" in capsys.readouterr().out
    for option in ("--data", "--size", "--protocol", "--seeds", "--no-cache", "--loader.workers"):
        assert option in shown
