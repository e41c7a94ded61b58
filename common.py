"""Helpers that every room and script shares: the user's errors, files, cores and progress bars."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["UserError", "available_cores", "check_range", "file_sha256", "progress_bar", "replacing"]


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


def available_cores() -> int:
    """Number of cores this process may use; not every system supports CPU affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Atomic replacement: yields a temporary path next to `path`, which is renamed to it if the block succeeds.

    Readers see the old content or the new content, never a part of it; after an error the old file is untouched and
    the temporary one is gone. The content reaches the disk before the rename, so a crash of the machine cannot leave
    an empty file under the final name.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as progress:
        task = progress.add_task(text, total=total, **values)

        def update(**changes: float | str) -> None:
            progress.update(task, **changes)

        yield update
