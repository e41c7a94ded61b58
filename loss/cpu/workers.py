"""Host threads that share out bands of rows: each computes alone, so no barrier stands between two small products."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

MOST_WORKERS = 16
"""With more cores than that each worker takes several, since all workers wait for one interpreter between calls."""
LEAST_ROWS = 64
"""Of a band: below that, handing it over costs more than computing it."""
T = TypeVar("T")


class Workers:
    """A lead, which runs the body of an operation, and helpers to which it hands bands of rows.

    The body leaves the caller's thread because OpenMP's threads spin for milliseconds after each of its operations,
    on the cores that the workers need. torch's number of threads belongs to each thread, but the last one set is also
    what threads that start later take: so all workers start here, and the caller's number is set again after them.

    Args:
        threads: divided among the workers; with one thread the caller is the only worker.
    """

    def __init__(self, threads: int):
        each = -(-threads // MOST_WORKERS)
        self.count = threads // each

        def prepare() -> None:
            torch.set_num_threads(each)
            torch.set_grad_enabled(False)

        def pool(size: int) -> ThreadPoolExecutor:
            started = Barrier(size + 1)
            executor = ThreadPoolExecutor(size, "nt_xent", initializer=prepare)
            try:
                for _ in range(size):
                    executor.submit(started.wait)  # a waiting thread takes no second task: every one gets its own
            except RuntimeError:  # no more threads available: those that wait would keep the process from ending
                started.abort()
                raise
            started.wait()
            return executor

        if self.count > 1:
            callers = torch.get_num_threads()
            try:
                self._lead, self._helpers = pool(1), pool(self.count - 1)
            finally:
                torch.set_num_threads(callers)

    def run(self, body: Callable[..., T], *arguments) -> T:
        """body(self, *arguments) in the lead's thread; of several callers at once each waits for its turn."""
        if self.count == 1:
            return body(self, *arguments)
        return _submit(self._lead, body, self, *arguments)()

    def share_out(self, work: Callable[[list[slice]], Tensor], rows: int, most_rows: int) -> list[Tensor]:
        """What `work` returns for each worker's bands of rows, in the order of the workers.

        Bands go to the workers there and back again (0 1 | 1 0 | 0 1 ...), so that in a triangle, where every band has
        less to do than the one before it, all have about the same.

        Args:
            work: bands, ascending -> tensor; it must not touch what another call of it writes.
            rows: what is cut into bands of at most `most_rows`.
        """
        height = min(most_rows, max(LEAST_ROWS, -(-rows // (2 * self.count))))
        bands = [slice(top, min(top + height, rows)) for top in range(0, rows, height)]
        turn = 2 * self.count
        shares = [[b for n, b in enumerate(bands) if n % turn in (w, turn - 1 - w)] for w in range(self.count)]
        helped = [_submit(self._helpers, work, share) for share in shares[1:] if share]
        return [work(shares[0]), *(result() for result in helped)]


def _submit(pool: ThreadPoolExecutor, task: Callable[..., T], *arguments) -> Callable[[], T]:
    """Start the task in the pool; the function returned waits for its result."""
    try:
        return pool.submit(task, *arguments).result
    except RuntimeError:  # once the main thread has ended, pools take no tasks while other threads may still train
        return partial(task, *arguments)


def workers(device: torch.device) -> Workers:
    """The workers of this process: as many as torch's threads on a CPU, the caller alone on any other device."""
    return _workers(torch.get_num_threads() if device.type == "cpu" else 1, os.getpid())


@lru_cache(maxsize=1)
def _workers(threads: int, process: int) -> Workers:
    return Workers(threads)  # kept between calls; threads do not survive a fork, hence the process
