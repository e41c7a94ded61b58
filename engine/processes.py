"""Several processes that end together, with the words of the one that failed."""

import contextlib
import gc
import os

import torch.distributed as dist

FAILURE = "streamclr/failure"


def is_first_to_fail(message: str) -> bool:
    """Whether no other process of the run has failed before this one, so that its words are the ones to be shown.

    The others fail in its wake, as collectives break off, or are told so by the launcher.
    """
    store = _store()
    if store is None:  # one process, or one of several that do not know of each other yet
        return os.environ.get("RANK", "0") == "0"
    rank = dist.get_rank()
    with contextlib.suppress(RuntimeError):  # the store may have gone with the process that kept it
        return store.compare_set(FAILURE, "", f"{rank}: {message}") == f"{rank}: {message}".encode()
    return True


def failed_elsewhere() -> bool:
    """Whether another process has announced a failure."""
    store = _store()
    with contextlib.suppress(RuntimeError):
        return store is not None and store.check([FAILURE])
    return False


def leave_process_group() -> None:
    """End gloo's threads, which would abort the process if they outlived the interpreter."""
    gc.collect()  # they end with the last reference to their group, and modules refer to it in cycles
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _store() -> dist.Store | None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.distributed_c10d._get_default_store()
    return None
