"""train.py on a folder of images: the same run as on its shards, and errors that users meet."""

import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from engine import run_lock
from pipeline.convert.folder import folder_source
from pipeline.convert.writer import write_split
from tests.pipeline.image_sets import pictures, write_folder

SHORT = ["--epochs", "1", "--batch-size", "8", "--encoder.width", "0.125", "--head.hidden", "32", "--head.out", "16"]
SHORT += ["--no-report", "--precision", "fp32", "--loader.workers", "1", "--eval.no-baselines"]


@pytest.fixture
def pretrain(monkeypatch, tmp_path):
    """pretrain(data, name, *options) runs train.py in this process; returns its exit message and the run folder."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))

    def run(data, name, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = ["--data", str(data), "--out", str(tmp_path / name), *SHORT, *options]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            train.main()
        except SystemExit as error:
            return error.code, tmp_path / name
        finally:
            run_lock.release_all()
        return None, tmp_path / name

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def test_a_folder_trains_like_its_shards(pretrain, tmp_path, capsys):
    for split in "train", "test":
        write_folder(tmp_path / "photos" / split, pictures(each=6))
        write_split(folder_source(tmp_path / "photos" / split), tmp_path / "shards", split)
    runs = [pretrain(tmp_path / data, f"run_{data}") for data in ("photos", "shards")]
    assert [code for code, _ in runs] == [None, None]
    photos, shards = (load_file(run / "encoder.safetensors") for _, run in runs)
    assert photos.keys() == shards.keys() and all(torch.equal(photos[name], shards[name]) for name in photos)
    assert "18 evaluation images are also training images" in capsys.readouterr().err


def test_unlabeled_images_train_without_knn_scores(pretrain, tmp_path, capsys):
    """The report finds the shards where the run has put them."""
    images = {name.replace("/", "_"): content for name, content in pictures().items()}
    place = str(tmp_path / "place")
    code, run = pretrain(write_folder(tmp_path / "photos", images), "run", "--loader.cache-dir", place, "--report")
    printed = capsys.readouterr()
    assert len(list((tmp_path / "place" / "photos").iterdir())) == 1 and not (tmp_path / "cache" / "photos").exists()
    assert code is None and (run / "encoder.safetensors").exists()
    assert "12 training images. Without labels there are no kNN scores." in printed.err
    assert "no labeled test split" in printed.out


def test_too_few_or_no_images_end_with_one_sentence(pretrain, tmp_path):
    code, _ = pretrain(write_folder(tmp_path / "few", dict(list(pictures().items())[:5])), "few_run")
    assert code.startswith("error: ") and "use --batch-size" in code and "\n" not in code
    code, _ = pretrain(write_folder(tmp_path / "text", {"a.txt": b"text"}), "text_run")
    assert code.startswith("error: No images in") and "\n" not in code
