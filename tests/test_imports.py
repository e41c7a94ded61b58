"""Direction of the data, read off the imports: rooms do not know each other, and nothing imports in circles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "model", "loss", "engine", "evaluation")
ABOVE = {"train", "finetune", "distill", "evaluate", "export", "report", "config", "presets", "options", "bench"}
ABOVE |= {"auto_preset", "examples", "tests"}
PACKAGES = ("augment", "shards", "loader", "convert")
"""Packages of the pipeline, each with the ones it may import."""
MAY_IMPORT = {"augment": set(), "shards": set(), "loader": {"shards", "augment"}, "convert": {"shards"}}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for pattern in (*(f"{room}/**/*.py" for room in ROOMS), "*.py")
    for path in ROOT.glob(pattern)
}


def imports(name: str) -> set[str]:
    """Absolute names of what a module imports, anywhere in it, of this project as modules."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {module}
    return found - {name}


def test_the_modules_are_found():
    assert {"train", "engine.loop", "loss.cpu.blockwise", "pipeline.augment.params"} <= MODULES.keys()
    assert "pipeline.philox" in imports("pipeline.augment.params")  # relative
    assert "engine.loop" in imports("train")  # absolute


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_other_room_and_no_script(room):
    others = (ABOVE | set(ROOMS)) - {room}
    for name in MODULES:
        if name.split(".")[0] == room:
            assert {imported.split(".")[0] for imported in imports(name)} & others == set(), name


@pytest.mark.parametrize("room", ROOMS)
def test_imports_inside_a_room_are_relative(room):
    """The installed package has other names than the checkout; `common` is the one file that knows both."""
    for name, path in MODULES.items():
        if name.split(".")[0] != room or name == f"{room}.common":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            absolute = isinstance(node, ast.ImportFrom) and not node.level
            assert not (absolute and node.module.split(".")[0] in (*ROOMS, "common")), f"{name} line {node.lineno}"


def test_nothing_imports_in_circles():
    """Neither files nor, inside the pipeline, packages; imports inside functions count."""
    graph = {name: imports(name) & MODULES.keys() for name in MODULES}
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for imported in sorted(graph[name]):
                visit(imported)
            done.add(path.pop())

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_pipeline_flows_one_way(package):
    for name in MODULES:
        parts = name.split(".")
        if parts[:2] == ["pipeline", package] and parts[-1] != "__main__":  # command lines stand on top of the room
            used = {imported.split(".")[1] for imported in imports(name) if imported.startswith("pipeline.")}
            assert used & set(PACKAGES) - {package} <= MAY_IMPORT[package], name


def test_command_lines_stand_on_top():
    for name in MODULES:
        assert not any(imported.endswith("__main__") for imported in imports(name)), name


def test_one_file_talks_to_accelerate_and_one_file_of_the_loss_to_other_ranks():
    assert {name for name in MODULES if "accelerate" in {i.split(".")[0] for i in imports(name)}} == {"engine.session"}
    loss = {name for name in MODULES if name.startswith("loss") and "torch.distributed" in imports(name)}
    assert loss == {"loss.distributed"}
