"""Two jobs never write into the same run folder, and a crashed job does not block the next one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import UserError
from engine import run_lock
from engine.run_folder import run_folder

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from engine import run_lock
run_lock.HEARTBEAT_S = 0.05
MACHINE
run_lock.acquire(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""
OTHER_MACHINE = "run_lock._flock, run_lock._machine = lambda descriptor: True, lambda: 'other'"
NO_FLOCK = "run_lock._flock = lambda descriptor: None"


@pytest.fixture
def holder(tmp_path):
    """holder(machine) locks tmp_path/run in another process, which the test may kill."""
    processes = []

    def start(machine=""):
        command = [sys.executable, "-c", HOLD.replace("MACHINE", machine), str(tmp_path / "run")]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        assert processes[-1].stdout.readline() == "locked\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
    run_lock.release_all()


@pytest.fixture
def unenforced(monkeypatch):
    """A file system that grants every flock, and short waits."""
    monkeypatch.setattr(run_lock, "_flock", lambda descriptor: True)
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "SILENCE_S", 1.0)


def kill(process):
    process.kill()
    process.wait()


def test_second_job_is_refused_with_host_process_and_age(holder, tmp_path):
    first = holder()
    with pytest.raises(UserError) as refused:
        run_folder(str(tmp_path / "run"), "auto", "")
    pattern = (
        rf"{tmp_path}/run is in use by process {first.pid} on {os.uname().nodename}, started \d+ s ago; .* --out\."
    )
    assert re.fullmatch(pattern, str(refused.value))
    assert json.loads((tmp_path / "run" / ".lock").read_text())["process"] == first.pid, "the refused job wrote nothing"


def test_crash_leaves_nothing_to_clean_up(holder, tmp_path, monkeypatch):
    """On the same machine a free flock proves that the holder has ended, so that nobody waits for its heartbeat."""
    kill(holder())
    assert (tmp_path / "run" / ".lock").exists()
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: pytest.fail("it waited"))
    assert run_folder(str(tmp_path / "run"), "auto", "") == (tmp_path / "run", None)


@pytest.mark.parametrize("granted", [True, None], ids=["between machines", "without flock"])
def test_heartbeat_decides_where_flock_is_not_enforced(holder, tmp_path, unenforced, monkeypatch, granted):
    monkeypatch.setattr(run_lock, "_flock", lambda descriptor: granted)
    first = holder(OTHER_MACHINE if granted else NO_FLOCK)
    with pytest.raises(UserError, match=f"is in use by process {first.pid} on"):
        run_lock.acquire(tmp_path / "run")
    kill(first)
    run_lock.acquire(tmp_path / "run")
    assert json.loads((tmp_path / "run" / ".lock").read_text())["process"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b'{"token": 1}', b"\xff", b"[]"])
def test_damaged_lock_file_does_not_block(tmp_path, unenforced, monkeypatch, content):
    monkeypatch.setattr(run_lock, "SILENCE_S", 0.1)
    (tmp_path / ".lock").write_bytes(content)
    run_lock.acquire(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    run_lock.release_all()
    assert not (tmp_path / ".lock").exists()


def test_suspended_job_detects_that_it_lost_the_folder(holder, tmp_path, unenforced):
    first = holder(OTHER_MACHINE)
    first.send_signal(signal.SIGSTOP)
    run_lock.acquire(tmp_path / "run")
    run_lock.check(tmp_path / "run")
    record = json.loads((tmp_path / "run" / ".lock").read_text())
    (tmp_path / "run" / ".lock").write_text(json.dumps({**record, "token": "another", "process": 7}))
    with pytest.raises(UserError, match="is in use by process 7 on"):
        run_lock.check(tmp_path / "run")
    run_lock.release(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").exists(), "the lock of another process remains"


def test_one_of_two_jobs_that_take_over_wins(holder, tmp_path, unenforced, monkeypatch):
    kill(holder(OTHER_MACHINE))
    sleep, lock = time.sleep, tmp_path / "run" / ".lock"

    def meanwhile(seconds):
        sleep(seconds)
        if (holder := run_lock._read(lock)) and holder["process"] == os.getpid():
            lock.write_text(json.dumps({**holder, "token": "another", "process": 7}))

    monkeypatch.setattr(run_lock.time, "sleep", meanwhile)
    with pytest.raises(UserError, match="is in use by process 7 on"):
        run_lock.acquire(tmp_path / "run")


def test_empty_folder_is_removed(tmp_path):
    run_lock.acquire(tmp_path / "a" / "b" / "run")
    run_lock.acquire(tmp_path / "a" / "b" / "run")  # by the same process again
    run_lock.release_all()
    assert not (tmp_path / "a").exists()
    (tmp_path / "run").mkdir()
    run_lock.acquire(tmp_path / "run")
    (tmp_path / "run" / "config.json").touch()
    run_lock.release_all()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"The run folder .*file/run cannot be written .*choose another --out"):
        run_lock.acquire(tmp_path / "file" / "run")


def test_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_lock.os, "fsync", full)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(UserError, match=r"cannot be written .*No space left"):
            run_lock.acquire(folder)
    assert not list(tmp_path.iterdir())
