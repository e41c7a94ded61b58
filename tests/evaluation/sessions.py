"""Sessions whose ranks are threads of this process."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch


class FakeSession:
    """The part of `engine.session.Session` that the evaluation uses; one rank unless created by `on_ranks`."""

    device = torch.device("cpu")

    def __init__(self, rank=0, world_size=1, slots=None, barrier=None):
        self.rank, self.world_size = rank, world_size
        self.slots, self.barrier = slots or [None], barrier or threading.Barrier(1)
        self.gathered_rows = 0

    def exchange(self, x):
        self.slots[self.rank] = x
        self.barrier.wait()
        parts = list(self.slots)
        self.barrier.wait()
        return parts

    def gather(self, x):
        self.gathered_rows += len(x)
        return torch.cat(self.exchange(x))

    def sum(self, x):
        return sum(self.exchange(x))

    def mean(self, x):
        return self.sum(x) / self.world_size

    def autocast(self):
        return nullcontext()


def on_ranks(world_size, function):
    """Call `function` with the session of each rank at the same time; returns the results by rank."""
    slots, barrier = [None] * world_size, threading.Barrier(world_size, timeout=30)

    def run(rank):
        try:
            return function(FakeSession(rank, world_size, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
