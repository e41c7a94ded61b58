"""The wheel, built, installed into an empty folder, and used from another one without the checkout."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

USE = """
import sys
import streamclr, streamclr.evaluation, streamclr.pipeline
from streamclr.loss import nt_xent
from streamclr.pipeline.shards import open_shards
heavy = {"nvidia.dali", "triton", "kornia", "webdataset", "sklearn", "scipy", "accelerate", "numba"}
assert not heavy & sys.modules.keys(), f"imported before they are used: {heavy & sys.modules.keys()}"
import streamclr.model  # timm imports torchvision, which imports Triton
assert not (heavy - {"triton"}) & sys.modules.keys()
import timm, torch
assert nt_xent(torch.randn(8, 4), 0.1).isfinite()
encoder = timm.create_model("simclr_resnet18", num_classes=0, small_stem=True)  # registered by streamclr.model
assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
from streamclr.pipeline.augment import AugmentConfig
from streamclr.pipeline.augment.backend import create_backend
create_backend("opencv", AugmentConfig(size=32), torch.device("cpu"), 2, 2, 1).close()  # compiles, and stores it
print(streamclr.__file__, len(open_shards(sys.argv[1])))
"""

BOTH = """
import torch, warnings
warnings.simplefilter("error")
import loss, model, streamclr.loss, streamclr.model
z = torch.randn(8, 4, requires_grad=True)
first, second = loss.nt_xent(z, 0.1), streamclr.loss.nt_xent(z, 0.1)
(first + second).backward()
assert first.equal(second) and z.grad.isfinite().all()
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """An otherwise empty folder into which the wheel is installed."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--no-compile", "--target", target, wheel], check=True)
    return target


def run(code, cwd, *path, arguments=()):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_one_import_name_is_installed(target):
    names = {path.name for path in target.iterdir()}
    (metadata,) = (name for name in names if name.endswith(".dist-info"))
    assert names == {"streamclr", metadata}
    assert (target / metadata / "licenses" / "LICENSE").is_file()


def test_what_is_imported_is_installed(target):
    """Dependencies are not installed by these tests, which run next to all packages of the checkout."""
    assert (target / "streamclr" / "evaluation" / "report" / "page.html.jinja").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared, modules = list(project["dependencies"]), packages_distributions()
    for extra in ("trackers", "hf", "dicom", "tiff"):
        declared += project["optional-dependencies"][extra]
    known = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in declared}
    imported = set()
    for file in (target / "streamclr").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.partition(".")[0] for name in names}
    missing = {
        name
        for name in imported - sys.stdlib_module_names - {"common", "huggingface_hub"}  # of the checkout; of datasets
        if not {distribution.lower().replace("_", "-") for distribution in modules.get(name, [])} & known
    }
    assert not missing


def test_it_works_without_the_checkout(target, tmp_path, small_shards):
    done = run(USE, tmp_path, target, arguments=[small_shards])
    assert done.returncode == 0, done.stderr
    file, count = done.stdout.split()
    assert Path(file).is_relative_to(target) and count == "20"


def test_commands_have_the_package_in_their_names(target, tmp_path):
    """The help and the remedies of errors name commands that exist without the checkout."""
    (tmp_path / "photos.tar").write_bytes(b"")
    environment = os.environ | {"PYTHONPATH": str(target)}
    for arguments, expected in ((["--help"], "shards verify ROOT"), (["verify", str(tmp_path)], "shards index")):
        command = [sys.executable, "-m", "streamclr.pipeline.shards", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert f"python -m streamclr.pipeline.{expected}" in done.stdout + done.stderr
        assert "-m pipeline" not in done.stdout + done.stderr


def test_checkout_and_installed_package_share_a_process(target, tmp_path):
    """Custom operators and timm models are registered once."""
    done = run(BOTH, tmp_path, ROOT, target)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory):
    from tests.small_sets import texture_shards

    return texture_shards(tmp_path_factory.mktemp("data"), train=20, test=10) / "train"
