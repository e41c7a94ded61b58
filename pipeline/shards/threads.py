"""Daemon threads for network calls, which may hang."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import TypeVar

from ..common import UserError

STOP_POLL_S = 0.1
T = TypeVar("T")


class DaemonThreads:
    """A thread pool that neither `close` nor the end of the process waits for, unlike an executor."""

    def __init__(self, count: int, name: str):
        self._tasks, self._count = SimpleQueue(), count
        for _ in range(count):
            threading.Thread(target=self._work, args=(self._tasks,), name=name, daemon=True).start()

    def submit(self, function: Callable[..., T], *arguments) -> Future[T]:
        future: Future = Future()
        self._tasks.put((future, function, arguments))
        return future

    def map(self, function: Callable[..., T], arguments: Iterable[tuple], stop: threading.Event) -> Iterator[T]:
        """Yield `function(*arguments)` for each tuple, in order; raises as `wait_for` and cancels the rest."""
        futures = [self.submit(function, *each) for each in arguments]
        try:
            for future in futures:
                yield wait_for(future, stop)
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Let idle threads end now and the others after their current task."""
        for _ in range(self._count):
            self._tasks.put(None)

    __del__ = close  # for an owner that was never closed

    @staticmethod
    def _work(tasks: SimpleQueue) -> None:
        while task := tasks.get():
            future, function, arguments = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:  # raised again by whoever waits for the result
                    future.set_exception(error)
            del task, future, function, arguments  # an idle thread must not keep its owner alive


def wait_for(future: Future[T], stop: threading.Event) -> T:
    """Wait for a result of `DaemonThreads` until `stop` is set or Ctrl-C is pressed.

    Raises:
        UserError: `stop` was set. Exceptions of the task are raised again.
    """
    while not wait([future], timeout=STOP_POLL_S).done:
        if stop.is_set():
            raise UserError("Reading was stopped.")
    return future.result()
