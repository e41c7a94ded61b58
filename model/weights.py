"""Weights on disk: safetensors, whose metadata says what to build before they are loaded; nothing is ever unpickled."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errors import UserError

KINDS = ("classes", "head", "timm_name")
"""The entry that tells a file of each kind: a classifier has all three, a projection head the second, an encoder the
last."""
NAMES = {"classes": "a classifier", "head": "a projection head", "timm_name": "an encoder"}


def write_weights(module: nn.Module, metadata: dict, path: Path) -> None:
    """The module's state at `path`, whole or not at all; `metadata` is kept as JSON, strings as they are."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"")
    mode = partial.stat().st_mode
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, partial, texts)
    partial.chmod(mode)  # safetensors writes for the owner alone, whatever the umask
    partial.replace(path)


def read_weights(path: Path, kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and state on the CPU.

    Args:
        path: file that `write_weights` made. kind: one of KINDS, what is expected in it.

    Raises:
        UserError: no such file, no safetensors, or weights of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}: give {NAMES[kind]} that StreamCLR has written.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}): give {NAMES[kind]}.") from error
    found = next((key for key in KINDS if key in metadata), None)
    if found != kind:
        holds = NAMES[found] if found else "weights that StreamCLR has not written"
        raise UserError(f"{path} holds {holds}: give {NAMES[kind]}.")
    return metadata, state


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """The module with that state, in evaluation mode.

    Raises:
        UserError: the state is for another module.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"The weights in {path} are not what its metadata says ({reason}): save them anew.") from error
    return module.eval()
