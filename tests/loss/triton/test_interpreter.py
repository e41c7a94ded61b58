"""Run the tests of the Triton kernels in a separate process: Triton reads TRITON_INTERPRET when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_in_the_interpreter():
    here = Path(__file__)
    tests = [here.with_name("interpreted.py"), here.with_name("triangle.py"), here.parents[1] / "test_every_impl.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *map(str, tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=here.parents[3],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
