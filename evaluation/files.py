"""Result files that are written completely or not at all."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .common import UserError


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A temporary path for a file or folder, which becomes `out` at the end and is deleted if anything fails.

    Raises:
        UserError: it can't be written: the disk is full, or the folder does not permit it.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=".unfinished-") as folder:
            yield Path(folder) / out.name
            (Path(folder) / out.name).replace(out)
    except OSError as error:
        raise UserError(
            f"{out} can't be written ({error.strerror or error}): free some space or use another place."
        ) from error


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that is readable as far as the umask allows, like any other new file.

    safetensors itself makes files that only their owner can read, and its errors are not those of the system.

    Raises:
        OSError: it can't be written.
    """
    with open(path, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    os.chmod(path, mode)
