"""Several processes that end together, with the words of the one that failed."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from . import run_lock
from .common import UserError

FAILURE = "streamclr/failure"


def is_first_to_fail() -> bool:
    """Whether no other process of the run has failed before this one, so that its words are the ones to be shown.

    The others fail in its wake, as what they wait for breaks off.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return os.environ.get("RANK", "0") == "0"  # one of several that do not know of each other yet: all fail alike
    rank = str(dist.get_rank())
    with contextlib.suppress(RuntimeError):  # the store may have gone with the process that kept it
        return dist.distributed_c10d._get_default_store().compare_set(FAILURE, "", rank) == rank.encode()
    return True


def was_left_alone(error: Exception) -> bool:
    """Whether the error says that another process has gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo's have no type of their own


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def leave_process_group() -> None:
    """End gloo's threads, which would abort the process if they outlived the interpreter."""
    gc.collect()  # they end with the last reference to their group, and modules refer to it in cycles
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """What a script does in it ends all processes with the same words: one sentence for what a user or a disk did."""
    try:
        yield
        leave_process_group()
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's code for a run that was interrupted
    except Exception as error:
        if not is_first_to_fail():
            sys.exit(1)
        if isinstance(error, UserError | OSError):  # an unwritable folder, a full disk
            sys.exit(f"error: {error}")
        if was_left_alone(error):
            sys.exit("error: Another process ended without a word, killed for want of memory perhaps: see its log.")
        if is_out_of_memory(error):
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "the host"
            sys.exit(
                f"error: Out of memory ({reason}); use a smaller batch or encoder, or --micro-batch in pretraining."
            )
        raise
    finally:
        run_lock.release_all()
