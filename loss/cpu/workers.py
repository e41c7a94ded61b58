"""Threads that compute bands of rows independently, without a barrier between small matrix products."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

MAX_WORKERS = 16
"""Beyond this number, each worker uses several cores: all workers share the interpreter lock between calls."""
MIN_BAND_ROWS = 64
"""Smaller bands cost more to hand over than to compute."""
T = TypeVar("T")


class Workers:
    """A lead thread, which runs the body of an operation, and helper threads that compute bands of rows for it.

    The body does not run in the caller's thread because OpenMP threads spin for milliseconds after each operation, on
    the cores that the workers need. torch's number of threads is per thread, but threads started later inherit the last
    number that was set: therefore all workers start here, and the caller's number is restored afterwards.

    Args:
        threads: number of threads divided among the workers; if it is 1, the caller is the only worker.
    """

    def __init__(self, threads: int):
        each = -(-threads // MAX_WORKERS)
        self.count = threads // each

        def prepare() -> None:
            torch.set_num_threads(each)
            torch.set_grad_enabled(False)

        def pool(size: int) -> ThreadPoolExecutor:
            started = Barrier(size + 1)
            executor = ThreadPoolExecutor(size, "nt_xent", initializer=prepare)
            try:
                for _ in range(size):  # a waiting thread takes no second task, so that the pool starts all threads
                    executor.submit(started.wait)
            except RuntimeError:  # no more threads available: waiting ones would keep the process alive
                started.abort()
                raise
            started.wait()
            return executor

        if self.count > 1:
            threads_of_caller = torch.get_num_threads()
            try:
                self._lead, self._helpers = pool(1), pool(self.count - 1)
            finally:
                torch.set_num_threads(threads_of_caller)

    def run(self, body: Callable[..., T], *arguments) -> T:
        """Call body(self, *arguments) in the lead thread; concurrent callers wait for their turn."""
        if self.count == 1:
            return body(self, *arguments)
        return _submit(self._lead, body, self, *arguments)()

    def map_bands(self, work: Callable[[list[slice]], Tensor], rows: int, max_band_rows: int) -> list[Tensor]:
        """Results of `work` for every worker's bands of rows, in the order of the workers.

        Bands are assigned back and forth (0 1 | 1 0 | 0 1 ...), which balances the workers in a triangle, where every
        band has less work than the previous one.

        Args:
            work: maps ascending bands to a tensor; must not write to memory shared with other calls.
            rows: number of rows to divide into bands.
            max_band_rows: largest band.
        """
        height = min(max_band_rows, max(MIN_BAND_ROWS, -(-rows // (2 * self.count))))
        bands = [slice(top, min(top + height, rows)) for top in range(0, rows, height)]
        turn = 2 * self.count
        shares = [[b for n, b in enumerate(bands) if n % turn in (w, turn - 1 - w)] for w in range(self.count)]
        helped = [_submit(self._helpers, work, share) for share in shares[1:] if share]
        return [work(shares[0]), *(result() for result in helped)]


def _submit(pool: ThreadPoolExecutor, task: Callable[..., T], *arguments) -> Callable[[], T]:
    """Start a task in the pool; the returned function waits for its result."""
    try:
        return pool.submit(task, *arguments).result
    except RuntimeError:  # after the main thread has ended, pools accept no tasks, but other threads may still train
        return partial(task, *arguments)


def workers(device: torch.device) -> Workers:
    """Workers of this process: one per torch thread on a CPU, the caller alone on any other device."""
    return _workers(torch.get_num_threads() if device.type == "cpu" else 1, os.getpid())


@lru_cache(maxsize=1)
def _workers(threads: int, process: int) -> Workers:
    return Workers(threads)  # kept between calls; keyed by process because threads do not survive a fork
