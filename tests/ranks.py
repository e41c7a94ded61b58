"""gloo processes for tests of several ranks."""

import gc
import multiprocessing
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# ranks are forks of one process that has imported what takes seconds
multiprocessing.set_forkserver_preload(["train"])


def run_ranks(world_size, folder, body, *arguments):
    """Run body(rank, world_size, *arguments) on every rank of a gloo group; returns the results by rank."""
    of_all = (world_size, folder, dict(os.environ), body, arguments)
    mp.start_processes(_in_rank, of_all, nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def _in_rank(rank, world_size, folder, environment, body, arguments):
    os.environ.clear()
    os.environ.update(environment)  # which may differ from that of the first fork
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}  # for Session
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    dist.set_debug_level_from_env()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(body(rank, world_size, *arguments), folder / f"{rank}.pt")
    # gloo's threads end with the last reference to their group; a thread that outlives the interpreter aborts it
    gc.collect()
    dist.destroy_process_group()
