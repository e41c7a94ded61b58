"""The direction of the data, as imports: the rooms don't know each other, only the scripts know them all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train", "run", "evaluate", "export")
ROOMS = ("pipeline", "model", "loss", "engine", "evaluation")


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_other_room(room):
    files = list((ROOT / room).glob("*.py"))
    assert files
    for path in files:
        packages = {name.split(".")[0] for name in imported(path)}
        assert packages & ({*ROOMS, *SCRIPTS, "config", "presets", "accelerate"} - {room}) == set(), path


def test_only_one_file_of_the_loss_talks_to_other_ranks():
    speakers = {path.name for path in (ROOT / "loss").glob("*.py") if "torch.distributed" in imported(path)}
    assert speakers == {"distributed.py"}
