"""The kernels of the fused augmentation compiled without a GPU: no spills, and several programs per multiprocessor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.loss_static import VERSIONS, environment_with
from bench.views_static import Case, compile_case
from pipeline.augment.triton.kernels import crop_kernel, finish_kernel


@pytest.mark.parametrize(
    "case",
    [
        Case("sm_80", crop_kernel, 224, "exact", torch.bfloat16),
        Case("sm_90", finish_kernel, 224, "exact", torch.bfloat16),
    ],
    ids=lambda case: f"{case.kernel.__name__}-{case.architecture}",
)
def test_kernels_meet_their_limits(case):
    """Both kernels of large views, which have every device function."""
    compiled = compile_case(case)
    assert compiled.stack_bytes == 0, f"{compiled.stack_bytes} bytes of registers spilled"
    assert compiled.programs >= (4 if case.kernel is crop_kernel else 3)


@pytest.mark.soak
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_triton_meets_the_limits(version):
    """Every kernel in every form, for sm_80, sm_90 and sm_100, in a process that imports this version."""
    try:
        environment = environment_with(version)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"Triton {version} could not be installed: {error.stderr.strip()}")
    command = [sys.executable, "-m", "bench.views_static", "--rows"]
    process = {"env": environment, "cwd": Path(__file__).parents[2], "capture_output": True, "text": True}
    rows = json.loads(subprocess.run(command, **process, check=True).stdout)
    assert len(rows) == 30
    for row in rows:
        assert row["triton"] == version
        four = row["kernel"] != "finish" and row["architecture"] != "sm_100"
        assert row["stack_bytes"] == 0 and row["programs"] >= (4 if four else 3), row
