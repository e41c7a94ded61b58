"""Weight files: safetensors whose metadata states which module to build. Nothing is ever unpickled."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .common import UserError, replacing, save_tensors

KINDS = {"classes": "a classifier", "head": "a projection head", "timm_name": "an encoder"}
"""Metadata key that identifies each kind of file. A classifier has all three keys, so the first match decides."""


def write_weights(module: nn.Module, metadata: dict, path: Path) -> None:
    """Write a module's state to `path` atomically.

    Args:
        metadata: stored in the file; values other than strings are encoded as JSON.

    Raises:
        UserError: the file cannot be written, for example because the disk is full.
    """
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with replacing(path) as temporary:
        save_tensors(module.state_dict(), temporary, texts)


def read_weights(path: Path, kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and state onto the CPU.

    Args:
        path: file written by `write_weights`.
        kind: key of KINDS, the kind of file expected.

    Raises:
        UserError: the file is missing, is not safetensors or holds weights of another kind.
    """
    path = Path(path)
    if not path.is_file():
        script = "finetune.py or distill.py" if kind == "classes" else "StreamCLR"
        raise UserError(f"There is no file {path}; use {KINDS[kind]} written by {script}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); use {KINDS[kind]}.") from error
    found = next((key for key in KINDS if key in metadata), None)
    if found != kind:
        content = KINDS[found] if found else "weights not written by StreamCLR"
        raise UserError(f"{path} holds {content}; use {KINDS[kind]}.")
    return metadata, state


@contextmanager
def reading_metadata(path: Path) -> Iterator[None]:
    """Context in which metadata is parsed and a module built from it; unusable metadata raises a UserError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"The metadata of {path} is damaged ({error!r}); write the file again.") from error


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """Load a state that must match the module exactly; returns the module in evaluation mode.

    Raises:
        UserError: the state belongs to another module, or a value in it is not finite.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"The weights in {path} do not match its metadata ({reason}); write the file again.") from error
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{len(broken)} tensors in {path} hold NaN or infinity, {broken[0]} first; use weights of a run that did "
            "not diverge."
        )
    return module.eval()
