"""Runs every test on the CPU: a resumed run is promised to be bit-identical there only."""

import os
import signal
from pathlib import Path

HERE = Path(__file__).parent
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would ignore Ctrl-C in tests


def pytest_collection_modifyitems(items):
    """Whole runs and the interpreter first, which take longest: then two processes end at about the same time."""
    items.sort(key=lambda item: (item.path.name != "test_interpreter.py", item.path.parent != HERE))
