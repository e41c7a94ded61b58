"""Helpers that every room and script shares: the user's errors, files, cores and progress bars."""

import hashlib
import os
import shutil
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

UNFINISHED = ".unfinished-"
"""Prefix of the hidden folders that `replacing` writes in; a process that is killed leaves one behind."""
PIPELINE = f"{__package__}.pipeline" if __package__ else "pipeline"
"""Where `python -m` finds the command lines: in `pipeline` in the checkout, in `streamclr.pipeline` once installed."""


class UserError(Exception):
    """An error that the user can fix: one sentence with cause and remedy, shown without a traceback."""


def check_range(option: str, value: float, smallest: float, largest: float) -> None:
    """Refuse an option's value outside [smallest, largest], nan included.

    Raises:
        UserError: names the option, the value and the bound.
    """
    if not value >= smallest:
        raise UserError(f"{option} is {value}; it must be at least {smallest}.")
    if value > largest:
        raise UserError(f"{option} is {value}; it must be at most {largest}.")


def available_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Number of cores for this process: its share if the launcher started several processes on this machine.

    Args:
        quota: file with the CPU time that a container may use, in microseconds, and the period for which it is granted.
    """
    affinity = hasattr(os, "sched_getaffinity")  # not every system has it
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or "max": no limit
        granted, period = map(int, quota.read_text().split())
        cores = min(cores, max(1, granted // period))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@cache
def has_c_compiler() -> bool:
    """Whether Triton can compile its launcher, for which it calls CC, gcc or clang at the first launch of a kernel."""
    candidates = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # as in triton/runtime/build.py
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return any(map(shutil.which, candidates)) and header.exists()


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """Decorator that compiles a function with Numba, without the interpreter lock, and stores the result where it can.

    Args:
        options: of `numba.njit`.
    """
    from numba import config, njit
    from numba.core.codegen import get_host_cpu_features

    # LLVM prefers 256 bits of the vectors on every processor, because the first with 512 bits lowered their clock for
    # them; Intel's since Ice Lake (AVX512_VBMI2) do not. Results are the same. The setting is Numba's for the process:
    # without effect once it has compiled anything, and NUMBA_CPU_FEATURES wins.
    features = get_host_cpu_features()
    if config.CPU_FEATURES is None and "+avx512vbmi2" in features.split(","):
        config.CPU_FEATURES = f"{features},-prefer-256-bit"

    def decorate(function: Callable) -> Callable:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache can be written: every process compiles
            return njit(nogil=True, **options)(function)

    return decorate


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Atomic replacement: yields a temporary path, which becomes `path` if the block succeeds.

    The temporary path, for a file or a folder, has the same name inside a hidden folder next to `path`. Readers see the
    old content or the new one, never a part of it; after an error the old content is untouched and nothing is left. A
    file reaches the disk before it is renamed, so that a crash of the machine cannot leave an empty one.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            if temporary.is_file():
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} can't be written ({reason}); free some space or use another place.") from error


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested options under the names of the command line, such as optim.lr; what is not a scalar becomes a string."""
    flat = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            flat[prefix + name] = " ".join(map(str, value))
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def save_tensors(tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that is readable as far as the umask allows, like any other new file.

    safetensors itself creates files that only their owner can read, refuses tensors that share memory, and raises
    errors that are not those of the operating system.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    separate, seen = {}, set()
    for name, tensor in tensors.items():
        tensor, memory = tensor.contiguous(), tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    with open(path, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        save_file(separate, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    os.chmod(path, mode)


@contextmanager
def progress_bar(
    total: int, text: str = "", *, fields: str = "", shown: bool = True, **values: float | str
) -> Iterator[Callable[..., None]]:
    """Progress bar on stderr, shown only if that is a terminal.

    Args:
        total: number of steps.
        text: description in front of the bar.
        fields: rich format string shown behind the bar, such as "loss {task.fields[loss]:.3f}".
        shown: False on processes that must stay quiet.
        values: initial values of the fields.

    Yields:
        A function that moves the bar: `update(advance=1)` or `update(completed=n)`, and new values of the fields.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns += [TextColumn(fields)] if fields else []
    hidden = not (shown and sys.stderr.isatty())
    # rich would send what is printed meanwhile to stderr, also where stdout is a file
    options = {"disable": hidden, "transient": True, "redirect_stdout": sys.stdout.isatty()}
    with Progress(*columns, console=Console(stderr=True), **options) as progress:
        task = progress.add_task(text, total=total, **values)

        def update(**changes: float | str) -> None:
            progress.update(task, **changes)

        yield update
