"""Checkpoints: only complete ones are found, nothing is unpickled, and training resumes bit for bit."""

import json
import os
import pickle
import re
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from common import UserError
from engine import checkpoint
from engine.checkpoint import Checkpoints, StopSignal
from engine.optim import OptimConfig, create_optimizer, parameter_groups

TENSORS = {"x": torch.arange(3.0)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_most_recent_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 10, 9_999_999):
        path = checkpoints.save(step, TENSORS, {"note": step})
        assert checkpoints.latest() == path == checkpoint.find(path) == checkpoint.find(tmp_path)
        tensors, record = checkpoint.load(path)
        assert torch.equal(tensors["x"], TENSORS["x"]) and record["step"] == record["note"] == step
    assert names(checkpoints.folder) == ["step-00000010", "step-09999999"]
    assert checkpoints.save(10, {}, {}) and checkpoint.load(checkpoints.folder / "step-00000010")[0]


def test_steps_are_compared_as_numbers_and_other_folders_are_ignored(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "step-99999999 copy").mkdir()
    for step in (99_999_998, 99_999_999, 100_000_000):
        assert checkpoints.save(step, TENSORS, {}) == checkpoints.latest()
    assert names(tmp_path) == ["step-100000000", "step-99999999", "step-99999999 copy"]


def test_later_checkpoints_are_discarded_when_an_earlier_one_is_resumed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (1, 2, 3):
        checkpoints.save(step, TENSORS, {})
    checkpoints.discard_after(2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("fails", ["save_tensors", "_to_disk", "file_sha256"])
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, fails):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, TENSORS, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, fails, full)
        with pytest.raises(UserError, match=r"step 2 can't be written .*No space left.*step-00000001"):
            checkpoints.save(2, TENSORS, {})
    assert names(tmp_path) == ["step-00000001"] and checkpoint.load(checkpoints.latest())
    checkpoints.save(2, TENSORS, {})
    assert names(tmp_path) == ["step-00000002"]


def test_leftovers_of_a_kill_are_ignored(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, TENSORS, {})
    (tmp_path / ".step-00000002.partial").mkdir()
    (tmp_path / ".step-00000002.partial" / "state.safetensors").write_bytes(b"half")
    assert checkpoints.latest().name == "step-00000001"
    checkpoints.save(2, TENSORS, {})
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("content", [b"", b"half", pickle.dumps(Bomb())])
@pytest.mark.parametrize("forged", [False, True])
def test_foreign_file_is_refused_and_never_unpickled(tmp_path, monkeypatch, content, forged):
    monkeypatch.chdir(tmp_path)
    path = Checkpoints(tmp_path, keep=1).save(7, TENSORS, {})
    (path / "state.safetensors").write_bytes(content)
    if forged:  # with a matching checksum
        record = json.loads((path / "record.json").read_text())
        record["sha256"] = checkpoint.file_sha256(path / "state.safetensors")
        del record["checksum"]
        record["checksum"] = checkpoint._checksum(record)
        (path / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"state\.safetensors can't be loaded"):
        checkpoint.load(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}'])
def test_foreign_record_is_refused(tmp_path, content):
    path = Checkpoints(tmp_path, keep=1).save(7, TENSORS, {})
    (path / "record.json").write_text(content)
    with pytest.raises(UserError, match=r"record\.json can't be loaded"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="There is no checkpoint in"):
        checkpoint.find(tmp_path / "elsewhere")


def test_every_flipped_byte_of_a_record_is_detected(tmp_path):
    record = {"loader": {"epoch": 2}, "lr": 0.1, 1: (2, 3)}
    path = Checkpoints(tmp_path, keep=1).save(7, TENSORS, record) / "record.json"
    whole = path.read_bytes()
    assert checkpoint.load(path.parent)[1]["1"] == [2, 3]
    before = json.loads(whole)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            _, record = checkpoint.load(path.parent)
        except UserError as error:
            assert re.search(r"(record\.json|state\.safetensors) can't be loaded", str(error))
            continue
        assert {name: record[name] for name in before if name != "checksum"} == {
            name: before[name] for name in before if name != "checksum"
        }


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = Checkpoints(tmp_path, keep=1).save(1, TENSORS, {})
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()} == {
        "state.safetensors": 0o666 & ~umask,
        "record.json": 0o666 & ~umask,
    }


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    return net.to(memory_format=torch.channels_last)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        net(x.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_training_resumes_bit_for_bit(tmp_path, name):
    def start():
        net = network()
        return net, create_optimizer(OptimConfig(name), parameter_groups([net], 1e-2), lr=0.1)

    whole, optimizer = start()
    train(whole, optimizer, range(6))
    first, optimizer = start()
    train(first, optimizer, range(3))
    path = Checkpoints(tmp_path, keep=1).save(3, checkpoint.state_tensors(first, [optimizer]), {})
    second, optimizer = start()
    checkpoint.load_state_tensors(checkpoint.load(path)[0], second, [optimizer])
    for parameter, state in optimizer.state.items():
        assert all(v.stride() == parameter.stride() for v in state.values() if v.shape == parameter.shape)
    train(second, optimizer, range(3, 6))
    for expected, actual in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(expected, actual)


def test_other_model_is_refused():
    with pytest.raises(UserError, match=r"belongs to another model .*weight"):
        checkpoint.load_state_tensors(checkpoint.state_tensors(nn.Linear(2, 2), []), nn.Linear(2, 3), [])


@pytest.mark.parametrize("create", [lambda: nn.Linear(3, 2), lambda: nn.Linear(2, 2, bias=False)])
def test_optimizer_states_of_other_parameters_are_refused(create):
    def optimizer_of(net):
        optimizer = create_optimizer(OptimConfig("lars"), [{"params": list(net.parameters())}], lr=0.1)
        for w in net.parameters():
            w.grad = torch.ones_like(w)
        optimizer.step()
        return optimizer

    tensors = checkpoint.state_tensors(nn.Module(), [optimizer_of(nn.Linear(2, 2))])
    with pytest.raises(UserError, match="optimizer states of other parameters"):
        checkpoint.load_state_tensors(tensors, nn.Module(), [optimizer_of(create())])


def test_checkpoint_without_its_record_is_named(tmp_path):
    path = Checkpoints(tmp_path, keep=1).save(7, TENSORS, {})
    (path / "record.json").unlink()
    with pytest.raises(
        UserError, match=r"step-00000007/record\.json can't be loaded .*No such file.*delete this checkpoint"
    ):
        checkpoint.load(path)


@pytest.fixture
def ctrl_c():
    """Python's default handling of Ctrl-C, which background jobs of a shell ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_first_signal_is_recorded_and_the_second_one_interrupts(ctrl_c):
    with StopSignal() as stop:
        assert not stop.received
        signal.raise_signal(signal.SIGINT)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_twice_is_one_request(monkeypatch, number):
    """A launcher forwards what the ranks have received themselves."""
    now_s, ended = [100.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now_s[0])
    before = signal.signal(number, lambda *_: ended.append(now_s[0]))
    try:
        with StopSignal() as stop:
            for at_s in (100.0, 104.0, 106.0):
                now_s[0] = at_s
                signal.raise_signal(number)
            assert stop.received
    finally:
        signal.signal(number, before)
    assert ended == [106.0]


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_a_signal_is_acknowledged_at_once_by_rank_0(ctrl_c, monkeypatch, capfd, rank, lines):
    monkeypatch.setenv("RANK", rank)
    with StopSignal():
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err.count("Stopping with a checkpoint; the same signal again stops at once") == lines
