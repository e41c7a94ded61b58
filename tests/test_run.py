"""The run folder as the main process chooses it for all ranks."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import run
from common import UserError
from config import Config
from engine import run_lock


@pytest.fixture
def choose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "broadcast_object_list", lambda objects: objects)
    monkeypatch.setattr(run.time, "strftime", lambda pattern: "NOW")
    yield lambda config: run.chosen_folder(SimpleNamespace(is_main_process=True), config, "textures")
    run_lock.release_all()


def test_jobs_that_start_in_the_same_second_get_folders_of_their_own(choose, tmp_path):
    folders = []
    for _ in range(3):
        folder, resume_from = choose(Config())
        assert resume_from is None
        (folder / "encoder.safetensors").touch()
        folders.append(str(folder))
    assert folders == ["runs/textures-NOW", "runs/textures-NOW-2", "runs/textures-NOW-3"]


def test_a_folder_that_was_asked_for_is_never_replaced_by_another(choose, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="choose another --out"):
        choose(Config(out=str(tmp_path)))
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_no_name_helps_where_nothing_can_be_written(choose, tmp_path):
    Path("runs").touch()
    with pytest.raises(UserError, match="cannot be written"):
        choose(Config())
