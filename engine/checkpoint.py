"""Checkpoints: everything a run needs to continue bit for bit, in folders that are always complete.

    RUN/checkpoints/step-00001200/state.safetensors   weights, optimizer states, queue, sums of the open metrics row
    RUN/checkpoints/step-00001200/record.json         step, loader position, configuration, checksum of the other file

A folder is written under a temporary name and renamed once it is complete and on the disk. Nothing is unpickled.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from .common import UserError, check_range, file_sha256, flatten, save_tensors

FORMAT = "streamclr-checkpoint-3"
MAY_CHANGE = {"may_change": True}
"""Metadata of a configuration's field that may differ when a run is resumed: it does not change the result."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, in addition to the end of every epoch."""

    every_steps: int = 0
    """Steps between checkpoints; 0 for none."""
    every_minutes: float = 10
    """Minutes between checkpoints, checked when a metrics row is written; 0 for none."""
    keep: int = 3
    """Number of most recent checkpoints to keep."""

    def __post_init__(self) -> None:
        check_range("--checkpoint.every-steps", self.every_steps, 0, 10**9)
        check_range("--checkpoint.every-minutes", self.every_minutes, 0, 10**9)
        check_range("--checkpoint.keep", self.keep, 1, 10**9)


def check_same_run(config: Any, saved: dict[str, Any]) -> None:
    """Refuse to resume a run under other options, except those that do not change its result.

    Args:
        config: dataclass; fields with `MAY_CHANGE` as metadata are not compared.
        saved: `dataclasses.asdict` of the configuration in the checkpoint.

    Raises:
        UserError: names every option that differs, with both values.
    """
    free = {field.name for field in fields(config) if field.metadata.get("may_change")}
    before, now, default = (
        flatten({name: value for name, value in options.items() if name not in free})
        for options in (saved, asdict(config), asdict(type(config)()))
    )
    before = default | before  # an option that is newer than the run had its default value in it
    differing = ", ".join(
        f"--{name.replace('_', '-')} {before.get(name)} (now {now.get(name)})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )
    if differing:
        raise UserError(
            f"The run was started with {differing}; use the same values, or start again with another --out."
        )


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of one run; only the `keep` most recent ones are kept."""

    folder: Path
    keep: int

    def latest(self) -> Path | None:
        """Most recent checkpoint, or None."""
        return next(reversed(self._complete()), None)

    def discard_after(self, step: int) -> None:
        """Delete checkpoints of later steps, which a run that continues from `step` will write again."""
        for path in self._complete():
            if _step_of(path) > step:
                self._discard(path)

    def save(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> Path:
        """Write the checkpoint of a step, then delete the oldest ones.

        Raises:
            UserError: it could not be written; earlier checkpoints are untouched.
        """
        target = self.folder / f"step-{step:08d}"
        if target.exists():  # same run, same step, same content
            return target
        partial = self.folder / f".{target.name}.partial"
        try:
            for left in self.folder.glob(".step-*.partial"):  # left by a killed save or deletion
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
            record_file, state_file = partial / "record.json", partial / "state.safetensors"
            save_tensors(tensors, state_file, {})
            record = {"format": FORMAT, "step": step, "sha256": file_sha256(state_file), **record}
            record_file.write_text(json.dumps({**record, "checksum": _checksum(record)}, indent=1) + "\n")
            for path in (*partial.iterdir(), partial):
                _to_disk(path)
            os.rename(partial, target)
            _to_disk(self.folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            latest = self.latest()
            raise UserError(
                f"The checkpoint of step {step} can't be written to {self.folder} ({error}); check space and "
                f"permissions, then run the same command to continue from {latest.name if latest else 'the start'}."
            ) from error
        for old in self._complete()[: -self.keep]:
            self._discard(old)
        return target

    def _complete(self) -> list[Path]:
        """Checkpoints in the order of their steps."""
        named = (path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
        return sorted(filter(Path.is_dir, named), key=_step_of)

    @staticmethod
    def _discard(path: Path) -> None:
        discarded = path.with_name(f".{path.name}.partial")
        os.rename(path, discarded)  # atomic: the process may be killed at any time
        shutil.rmtree(discarded, ignore_errors=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def find(path: Path) -> Path:
    """Checkpoint at `path`: the folder itself, or the most recent one of a run folder.

    Raises:
        UserError: there is none.
    """
    if (path / "record.json").exists():
        return path
    latest = Checkpoints(path / "checkpoints", keep=1).latest()
    if latest is None:
        raise UserError(f"There is no checkpoint in {path}; use a run folder or one of its checkpoints.")
    return latest


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: its tensors, on the CPU, and its record.

    Raises:
        UserError: it is incomplete, damaged or of another version.
    """
    file = path / "record.json"
    try:
        record = json.loads(file.read_text())
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        if record.pop("checksum") != _checksum(record):
            raise ValueError("it does not match its checksum")
        file = path / "state.safetensors"
        if file_sha256(file) != record["sha256"]:
            raise ValueError("it does not match its checksum and may be truncated")
        return load_file(file), record
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{file} can't be loaded ({error}); use a run folder that every node sees, delete this checkpoint to "
            "continue from the one before, or start again with another --out."
        ) from error


def state_tensors(module: nn.Module, optimizers: list[Optimizer], memory: nn.Module | None = None) -> dict[str, Tensor]:
    """Weights, buffers and optimizer states as one dictionary of tensors on the CPU.

    Args:
        memory: state of the run outside of the network, see `engine.loop.TrainingLoop`.
    """
    tensors = {f"model/{name}": tensor for name, tensor in module.state_dict().items()}
    if memory is not None:
        tensors |= {f"memory/{name}": tensor for name, tensor in memory.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{index}/{name}": value for name, value in state.items()}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}


def load_state_tensors(
    tensors: dict[str, Tensor], module: nn.Module, optimizers: list[Optimizer], memory: nn.Module | None = None
) -> None:
    """Load what `state_tensors` returned into a module, its optimizers and the memory of the run.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    try:
        for prefix, owner in (("model/", module), ("memory/", memory or nn.Module())):
            own = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
            owner.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The checkpoint belongs to another model ({reason}); use the same --encoder.") from error
    for number, optimizer in enumerate(optimizers):
        prefix, states = f"optimizer/{number}/", {}
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                index, field = name.removeprefix(prefix).split("/")
                states.setdefault(int(index), {})[field] = tensor
        parameters = [w for group in optimizer.param_groups for w in group["params"]]
        for index, state in states.items():
            if index >= len(parameters) or any(v.ndim and v.shape != parameters[index].shape for v in state.values()):
                raise UserError(
                    "The checkpoint holds optimizer states of other parameters and may come from another version of "
                    "timm or StreamCLR; continue with that version, or start again with another --out."
                )
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        for parameter, state in optimizer.state.items():
            for field, value in state.items():
                if value.shape == parameter.shape:  # same strides, or fused kernels are not used
                    state[field] = torch.empty_like(parameter).copy_(value)


MESSAGE = b"\nStopping with a checkpoint; the same signal again stops at once, without one.\n"
REPEAT_S = 5.0
"""For so long, another SIGTERM or SIGHUP is no second request: who signals a whole job reaches its ranks twice,
directly and through their launcher."""


class StopSignal:
    """Context in which SIGTERM, SIGHUP and Ctrl-C only set `received`, so that the step completes; a second one of the
    same kind stops now, Ctrl-C at once and the others after `REPEAT_S`.

    Under nohup, SIGHUP stays ignored. Rank 0 answers at once, because a step may take long and the shell's prompt may
    already be back.
    """

    def __enter__(self) -> "StopSignal":
        self.received = False
        self._received_at_s: dict[int, float] = {}
        numbers = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def _receive(self, number: int, _frame: object) -> None:
        now_s, first = time.monotonic(), number not in self._received_at_s
        if not first and (number == signal.SIGINT or now_s - self._received_at_s[number] > REPEAT_S):
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
        elif first:
            self.received, self._received_at_s[number] = True, now_s
            if os.environ.get("RANK", "0") == "0":
                os.write(2, MESSAGE)  # print is not allowed to be entered twice, and a signal may interrupt one

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _checksum(record: dict[str, Any]) -> str:
    as_read = json.loads(json.dumps(record))  # tuples become lists, keys become strings
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
