"""The run folder that the main process chooses for all ranks."""

import os
import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import UserError
from engine import run_lock, session
from engine.session import Session


@pytest.fixture
def open_run(tmp_path, monkeypatch):
    """open_run(out) of a session on rank 0; returns the run folder and the checkpoint to resume from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "broadcast_object_list", lambda objects: objects)
    monkeypatch.setattr(time, "strftime", lambda pattern: "NOW")

    def run(out: str = ""):
        rank_0 = SimpleNamespace(is_main=True)
        Session.open_run(rank_0, out, "auto", name="textures")
        return rank_0.out, rank_0.resume_from

    yield run
    run_lock.release_all()


def test_jobs_started_in_the_same_second_use_different_folders(open_run):
    folders = []
    for _ in range(3):
        folder, resume_from = open_run()
        assert resume_from is None
        (folder / "encoder.safetensors").touch()
        folders.append(str(folder))
    assert folders == ["runs/textures-NOW", "runs/textures-NOW-2", "runs/textures-NOW-3"]


def test_explicit_folder_is_never_replaced_by_another(open_run, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="choose another --out"):
        open_run(str(tmp_path))
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_unwritable_place_fails_under_every_name(open_run):
    Path("runs").touch()
    with pytest.raises(UserError, match="cannot be written"):
        open_run()


def test_tests_run_on_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # a machine with a GPU
    runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
