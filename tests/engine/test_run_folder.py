"""Choice of the run folder and of the checkpoint to resume from; refusing a folder changes nothing in it."""

import json
from pathlib import Path

import pytest
import torch

from common import UserError
from engine import run_lock
from engine.checkpoint import Checkpoints
from engine.run_folder import run_folder, start_run


@pytest.fixture(autouse=True)
def locks():
    yield
    run_lock.release_all()


def saved(folder: Path, *steps: int) -> list[Path]:
    checkpoints = Checkpoints(folder / "checkpoints", keep=9)
    return [checkpoints.save(step, {"x": torch.zeros(1)}, {}) for step in steps]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_new_folder_has_no_checkpoint(tmp_path):
    assert run_folder(str(tmp_path / "a"), "auto", "b") == (tmp_path / "a", None)
    assert run_folder("", "none", str(tmp_path / "b")) == (tmp_path / "b", None)


def test_newest_or_named_checkpoint_is_resumed(tmp_path):
    first, last = saved(tmp_path / "run", 3, 12)
    assert run_folder(str(tmp_path / "run"), "auto", "") == (tmp_path / "run", last)
    assert run_folder("", str(tmp_path / "run"), "") == (tmp_path / "run", last)
    assert run_folder("", str(first), "") == (tmp_path / "run", first)
    assert run_folder(str(tmp_path / "new"), str(first), "") == (tmp_path / "new", first)


def test_a_branch_is_continued_by_the_command_that_started_it(tmp_path):
    first, _ = saved(tmp_path / "run", 3, 12)
    branch, start = tmp_path / "branch", str(first)
    assert run_folder(str(branch), start, "") == (branch, first)
    start_run(branch, {"resume": start}, 3).close()
    assert run_folder(str(branch), start, "") == (branch, first), "it has no checkpoint of its own yet"
    (latest,) = saved(branch, 20)
    assert run_folder(str(branch), start, "") == (branch, latest)
    with pytest.raises(UserError, match="holds other files than the run that --resume names"):
        run_folder(str(branch), str(tmp_path / "run"), "")


def test_a_url_is_no_run_folder():
    with pytest.raises(UserError, match="s3://bucket/run is a URL, but a run folder is local; use a folder"):
        run_folder("s3://bucket/run", "auto", "")


@pytest.mark.parametrize(
    "left",
    [
        [".unfinished-1/config.json"],
        ["config.json"],
        ["config.json", "metrics.jsonl", ".unfinished-1/metrics.jsonl"],
        ["config.json", "metrics.jsonl", "bad_samples.jsonl", "diverged.json"],
        ["config.json", "checkpoints/.step-00000001.partial/state.safetensors"],
    ],
)
def test_run_that_ended_before_its_first_checkpoint_starts_again(tmp_path, left):
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    assert run_folder(str(tmp_path), "auto", "") == (tmp_path, None)
    start_run(tmp_path, {"a": 1}, 0).close()
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("left", [["notes.txt"], ["metrics.jsonl"], ["config.json", "model.py"]])
def test_folder_of_other_files_is_refused_and_unchanged(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("mine")
    (step,) = saved(tmp_path / "other", 1)
    before = files(tmp_path)
    for resume in ("auto", "none", str(step)):
        with pytest.raises(UserError, match="choose another --out"):
            run_folder(str(tmp_path), resume, "")
    assert files(tmp_path) == before


def test_invalid_run_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; choose another --out"):
        run_folder(str(tmp_path / "file"), "auto", "")
    (step,) = saved(tmp_path / "run", 1)
    step.rename(tmp_path / step.name)
    with pytest.raises(UserError, match="is not inside a run folder; set --out as well"):
        run_folder("", str(tmp_path / step.name), "")
    with pytest.raises(UserError, match="There is no checkpoint in"):
        run_folder(str(tmp_path / "new"), str(tmp_path / "nowhere"), "")
    assert not (tmp_path / "new").exists()


def test_resuming_an_earlier_checkpoint_drops_later_rows_and_checkpoints(tmp_path):
    first, *_ = saved(tmp_path, 3, 5, 8)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    run_folder("", str(first), "")
    start_run(tmp_path, {}, 3).close()
    assert Checkpoints(tmp_path / "checkpoints", keep=9).latest() == first
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n'


def test_full_disk_keeps_the_earlier_configuration(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("before")

    def full(path, text):
        path.open("w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"config\.json can't be written \(No space left on device\); free"):
        start_run(tmp_path, {"a": 1}, 0)
    monkeypatch.undo()
    assert (tmp_path / "config.json").read_text() == "before"
