"""A lock on a run folder, so that two jobs never write into the same one.

The lock file names its holder, who keeps an flock on it and touches it every few seconds. The flock ends with its
process. A network file system may not enforce it between machines: a lock left by another machine is therefore watched,
and taken over if nobody touches it.
"""

import json
import os
import secrets
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from .common import UserError

NAME = ".lock"
HEARTBEAT_S = 5.0
SILENCE_S = 30.0
"""How long a lock of another machine must go untouched before its holder is taken for dead."""
_held: dict[Path, "_Lock"] = {}


def acquire(folder: Path) -> None:
    """Create the folder if needed and lock it for this process, until `release` or the end of the process.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    lock = _held.get(folder)
    if lock is None or lock.holder["process"] != os.getpid():  # a fork holds nothing
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _held[folder] = _Lock(folder, created)
        except OSError as error:
            _remove_empty(created)
            raise UserError(f"The run folder {folder} cannot be written ({error}); choose another --out.") from error


def check(folder: Path) -> None:
    """Check that no other process has taken the folder over, as it may when this one was suspended for long.

    Raises:
        UserError: another process has.
    """
    lock = _held.get(Path(os.path.abspath(folder)))
    if lock is not None and (holder := _read(lock.path)) and holder["token"] != lock.holder["token"]:
        raise _in_use(folder, holder)


def release(folder: Path) -> None:
    """Unlock the folder, and remove it if this process created it and left nothing in it."""
    lock = _held.pop(Path(os.path.abspath(folder)), None)
    if lock is not None and lock.holder["process"] == os.getpid():
        lock.release()


def release_all() -> None:
    """Unlock everything that this process has locked."""
    for folder in list(_held):
        release(folder)


class _Lock:
    def __init__(self, folder: Path, created: list[Path]):
        self.path, self.created = folder / NAME, created
        self.holder = {"host": socket.gethostname(), "process": os.getpid(), "started": time.time()}
        self.holder |= {"machine": _machine(), "token": secrets.token_hex(8)}
        self.descriptor = self._lock()
        self.stopping = threading.Event()
        self.heart = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self.heart.start()

    def _lock(self) -> int:
        """Descriptor of the lock file, which names this process."""
        while True:
            try:
                descriptor, is_new = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
            except FileExistsError:
                descriptor, is_new = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), False
            with ExitStack() as opened:
                opened.callback(os.close, descriptor)
                if self._take(descriptor, is_new):
                    opened.pop_all()
                    return descriptor

    def _take(self, descriptor: int, is_new: bool) -> bool:
        """Lock the file and write its holder; False if the file was released after it was opened."""
        enforced, holder = _flock(descriptor), _read(self.path)
        if enforced is False:
            raise _in_use(self.path.parent, holder)
        if os.fstat(descriptor).st_nlink == 0:
            return False
        # an flock that this kernel grants proves that no process of this kernel holds it
        proven = is_new or (enforced and holder is not None and holder["machine"] == self.holder["machine"])
        if not proven and _is_touched(self.path):
            raise _in_use(self.path.parent, _read(self.path) or holder)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(self.holder).encode(), 0)
            os.fsync(descriptor)
        except OSError:  # a full disk; a lock without a holder would make the next job watch it
            self.path.unlink()
            raise
        if not proven:  # another machine may have watched the same lock: the last to write has it
            time.sleep(SILENCE_S / 10)
            if (holder := _read(self.path)) is None or holder["token"] != self.holder["token"]:
                raise _in_use(self.path.parent, holder)
        return True

    def _beat(self) -> None:
        while not self.stopping.wait(HEARTBEAT_S):
            with suppress(OSError):  # a file server that hangs for a while
                os.utime(self.descriptor if os.utime in os.supports_fd else self.path)

    def release(self) -> None:
        self.stopping.set()
        self.heart.join()
        if (holder := _read(self.path)) and holder["token"] == self.holder["token"]:
            with suppress(OSError):
                self.path.unlink()
        os.close(self.descriptor)
        _remove_empty(self.created)


def _flock(descriptor: int) -> bool | None:
    """Whether the file is now locked; None where the file system cannot lock."""
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError:
        return None


def _is_touched(path: Path) -> bool:
    """Whether anybody touches or rewrites the file within SILENCE_S; no two clocks are compared."""
    before, until = _state(path), time.monotonic() + SILENCE_S
    while time.monotonic() < until:
        time.sleep(SILENCE_S / 30)
        if _state(path) != before:
            return True
    return False


def _state(path: Path) -> tuple[int, bytes] | None:
    try:
        with path.open("rb") as file:  # opened each time, or NFS would answer from its cache
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any] | None:
    """The holder that a lock file names; None if it names none, as when its writer was killed."""
    try:
        holder = json.loads((_state(path) or (0, b""))[1])
        known = {name: holder[name] for name in ("host", "process", "machine", "token")}
        return {**known, "started": float(holder["started"])}
    except (ValueError, KeyError, TypeError):
        return None


def _in_use(folder: Path, holder: dict[str, Any] | None) -> UserError:
    by = "another process"
    if holder is not None:
        age_s = max(time.time() - holder["started"], 0)
        age = f"{age_s:.0f} s" if age_s < 120 else f"{age_s / 60:.0f} min" if age_s < 7200 else f"{age_s / 3600:.0f} h"
        by = f"process {holder['process']} on {holder['host']}, started {age} ago"
    return UserError(f"{folder} is in use by {by}; wait for it, stop it or choose another --out.")


def _machine() -> str:
    """Identifier of the running kernel; hosts and containers may share a name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
