"""Joint termination of several processes, with the error of the one that failed first."""

import contextlib
import gc
import os
import re
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist

from . import run_lock
from .common import UserError

FAILURE = "streamclr/failure"
ALIKE_S = 5.0
"""How long an error waits in other ranks than a machine's first before the process group exists. Mostly all ranks fail
alike, by their command line, and the launcher ends the others once the first has failed."""
LEFT_ALONE = (
    "gloo",  # whose errors have no type of their own
    "ncclRemoteError",
    "Connection closed by remote peer",  # NCCL may report it as an internal error
    "NCCL communicator was aborted",
    "collective operation timeout",
    "ncclUniqueId from",  # the communicator could not be set up
)
"""Texts of errors that follow from the failure of another process, in torch's ProcessGroupGloo and ProcessGroupNCCL."""


def is_first_to_fail() -> bool:
    """Whether no other process of the run failed before this one, so that its error is the one to show.

    The others fail as a consequence, when the collectives they wait for break.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(ALIKE_S)
        return True
    rank = str(dist.get_rank())
    with contextlib.suppress(RuntimeError):  # the store ends with the process that hosts it
        return dist.distributed_c10d._get_default_store().compare_set(FAILURE, "", rank) == rank.encode()
    return True


def was_left_alone(error: Exception) -> bool:
    """Whether the error says that another process has ended, or has not answered for too long."""
    return isinstance(error, dist.DistNetworkError | dist.DistStoreError) or any(
        text in str(error) for text in LEFT_ALONE
    )


def out_of_memory(error: Exception) -> str | None:
    """The line of the error that says that memory ran out, of a GPU or the host; None for other errors."""
    if isinstance(error, MemoryError):
        return str(error).strip() or "the host"
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if re.search("out of memory|can't allocate memory", line)), None)


def leave_process_group() -> None:
    """Stop gloo's threads, which would abort the process if they outlived the interpreter."""
    gc.collect()  # they stop with the last reference to their group, which modules hold in cycles
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Context of a script: any error ends all processes, and users see one sentence for what they can fix."""
    try:
        yield
        leave_process_group()
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's exit code for an interrupted program
    except Exception as error:
        if isinstance(error, BrokenPipeError) or not is_first_to_fail():  # `... --help | head` closes stdout
            sys.exit(1)
        if isinstance(error, UserError | OSError):  # an unwritable folder, a full disk
            sys.exit(f"error: {error}")
        if reason := out_of_memory(error):
            sys.exit(
                f"error: Out of memory ({reason}); use a smaller batch or encoder, or --micro-batch in pretraining."
            )
        if was_left_alone(error):
            sys.exit(
                "error: Another process ended without an error message and may have been killed for lack of memory, or "
                "did not answer in time; see its log."
            )
        raise
    finally:
        run_lock.release_all()
