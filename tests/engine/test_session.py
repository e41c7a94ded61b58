"""The run folder that the main process chooses for all ranks."""

import os
import platform
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from common import UserError, available_cores
from engine import run_lock, session
from engine.session import RANK_TIMEOUT, Session

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def tf32():
    """TF32 allowed everywhere, until the end of the test."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_fp32_means_no_tf32(tf32, precision):
    Session(precision)
    conv, matmul = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    assert (conv == "tf32") == (matmul == "tf32") == (precision != "fp32")  # the loss reads that of matmul
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision != "fp32")


def test_graphs_are_refused_on_a_cpu():
    with pytest.raises(UserError, match="--cuda-graph needs an NVIDIA GPU; omit the option on a CPU"):
        Session(cuda_graph=True)


def test_ranks_wait_longer_for_each_other_than_nccl_does(monkeypatch):
    def create(kwargs_handlers, **_):
        assert {"timeout": RANK_TIMEOUT} in [each.to_kwargs() for each in kwargs_handlers]
        raise InterruptedError

    monkeypatch.setattr(session, "Accelerator", create)
    with pytest.raises(InterruptedError):
        Session()
    assert 6 * torch.distributed.distributed_c10d.default_pg_nccl_timeout < RANK_TIMEOUT


def test_paths_are_printed_as_they_are(capsys):
    path = f"runs/[v2]/{'long-' * 30}/[/y]/seed-0"
    rank_0 = SimpleNamespace(is_main=True, console=Console(width=80))
    Session.print(rank_0, f"run folder: {path}")
    assert capsys.readouterr().out == f"run folder: {path}\n"


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), (None, 8)],
)
def test_cores_are_those_that_a_container_may_use(tmp_path, monkeypatch, content, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if content is not None:
        (tmp_path / "cpu.max").write_text(content + "\n")
    assert available_cores(tmp_path / "cpu.max") == cores


ACTIVATIONS = """
import resource, torch
from engine.session import Session

def new_pages(tensors):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(tensors):
        torch.ones(2**24)  # 64 MB
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()

print(new_pages(5))
Session()
new_pages(20)  # the heap finds its size
print(new_pages(5))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_activations_of_the_next_step_are_not_new_pages_of_the_system(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # pages of 4 KB
    process = subprocess.run([sys.executable, "-c", ACTIVATIONS], cwd=ROOT, capture_output=True, text=True, check=True)
    before, with_a_session = map(int, process.stdout.split())
    assert before >= 5 * 2**26 and with_a_session < 2**20


@pytest.mark.parametrize(("share", "bf16"), [(0.5, False), (1.0, True)])
def test_precision_is_what_the_hardware_of_all_ranks_has(monkeypatch, share, bf16):
    monkeypatch.setattr(Session, "mean", lambda session, x: x * share)
    monkeypatch.setattr("engine.session.computes_in_bf16", lambda device: True)
    session = Session("auto")
    assert session.bf16 is bf16 and session.dtype == (torch.bfloat16 if bf16 else torch.float32)
