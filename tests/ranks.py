"""gloo processes for tests of several ranks."""

import gc

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size, folder, body, *arguments):
    """Run body(rank, world_size, *arguments) on every rank of a gloo group; returns the results by rank."""
    mp.spawn(_in_rank, (world_size, folder, body, arguments), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def _in_rank(rank, world_size, folder, body, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(body(rank, world_size, *arguments), folder / f"{rank}.pt")
    # gloo's threads end with the last reference to their group; a thread that outlives the interpreter aborts it
    gc.collect()
    dist.destroy_process_group()
