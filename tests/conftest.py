"""Runs every test on the CPU: a resumed run is promised to be bit-identical there only."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the processes that tests start
