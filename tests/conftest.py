"""Runs every test on the CPU, where a resumed run is promised to be bit-identical, and from the same random numbers."""

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would ignore Ctrl-C in tests


def pytest_collection_modifyitems(items):
    """Whole runs and the interpreter first, which take longest: then two processes end at about the same time."""
    items.sort(key=lambda item: (item.path.name != "test_interpreter.py", item.path.parent != HERE))


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers of a test depend neither on the tests before it nor on the process that runs it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
