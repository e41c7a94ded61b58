"""Two processes that share one device, with gloo on its tensors: loss, DDP and synchronized batch norm."""

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.gpu.checks import Case, Outcome, Setup, largest
from bench.implementations import projections
from loss import nt_xent
from model import synchronize_batchnorm

RANKS, TIMEOUT_S = 2, 90


def two_ranks(setup: Setup) -> Iterator[Case]:
    """Two ranks give the loss, the gradients and the statistics of one process with the whole batch, in float64."""
    yield Case("loss and batch norm", partial(in_ranks, setup))


def in_ranks(setup: Setup) -> list[Outcome]:
    """Run `_rank` in processes; the largest value of the ranks counts."""
    folder = setup.scratch / "ranks"
    folder.mkdir()
    context = mp.start_processes(_rank, (folder, setup.device, setup.small), RANKS, join=False)
    deadline = time.monotonic() + TIMEOUT_S
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"two ranks did not end within {TIMEOUT_S} s")
    found = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    return [Outcome(what, largest(of[what][0] for of in found), limit) for what, (_, limit) in found[0].items()]


def _rank(rank: int, folder: Path, device: torch.device, small: bool) -> None:
    """Write {what: (value, limit)} to <rank>.pt."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # both ranks are here, and the machine's name may not resolve
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    torch.save(loss_of_ranks(rank, device, small) | norm_of_ranks(rank, device, small), folder / f"{rank}.pt")
    dist.destroy_process_group()


class Projector(nn.Module):
    """A linear layer and a learned temperature, whose gradients DDP averages."""

    def __init__(self, d: int):
        super().__init__()
        self.linear = nn.Linear(d, d, bias=False)
        nn.init.eye_(self.linear.weight)
        self.temperature = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.temperature


def loss_of_ranks(rank: int, device: torch.device, small: bool) -> dict[str, tuple[float, float]]:
    d = 32
    views = projections(44 if small else 2048, d, torch.float32, device).unflatten(0, (2, -1))  # (2, N, D)
    own = views.chunk(RANKS, dim=1)[rank].flatten(0, 1)
    alone = [dist.new_group([number]) for number in range(RANKS)][rank]
    module = DistributedDataParallel(Projector(d).to(device))
    loss = nt_xent(*module(own))
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    whole = Projector(d).to(device).double()
    truth = nt_xent(*whole(views.flatten(0, 1).double()), group=alone, impl="reference")
    truth.backward()
    errors = {"loss": ((mean / RANKS - truth).abs().item(), 1e-5)}
    for (name, own_w), true_w in zip(module.module.named_parameters(), whole.parameters(), strict=True):
        errors[name] = (((own_w.grad - true_w.grad).norm() / true_w.grad.norm()).item(), 1e-4)
    return errors


def norm_of_ranks(rank: int, device: torch.device, small: bool) -> dict[str, tuple[float, float]]:
    random = torch.Generator().manual_seed(0)
    shape = (4, 8, 6, 6) if small else (32, 64, 28, 28)
    x = 3 * torch.randn(shape, generator=random) + 1
    weight = torch.randn(shape, generator=random)  # of the outputs in the loss
    norm = nn.BatchNorm2d(shape[1])
    nn.init.uniform_(norm.weight, 0.5, 2, generator=random)
    truth = _normalized(norm.double(), x.double(), weight.double())
    own, own_weight = (t.chunk(RANKS)[rank].to(device, memory_format=torch.channels_last) for t in (x, weight))
    candidates = {"ours": synchronize_batchnorm(nn.Sequential(norm.float()))}
    if device.type == "cuda":  # torch's refuses tensors on the CPU
        candidates["torch's"] = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm.float()))
    errors = {}
    for name, module in candidates.items():
        module = module.to(device)
        for buffer, start in zip(module.buffers(), (0.0, 1.0, 0), strict=True):
            buffer.fill_(start)
        found = _normalized(module, own, own_weight)
        for key in ("weight gradient", "bias gradient"):
            dist.all_reduce(found[key])
        for what, value in found.items():
            true = truth[what].chunk(RANKS)[rank] if value.shape == own.shape else truth[what]
            errors[f"{name}: {what}"] = (((value.double().cpu() - true).norm() / true.norm()).item(), 1e-5)
    return errors


def _normalized(module: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module.train()(x)
    (y.square() * weight).sum().backward()
    (gamma, beta), (mean, variance, _) = module.parameters(), module.buffers()
    return {
        "output": y.detach().clone(),
        "input gradient": x.grad,
        "weight gradient": gamma.grad.clone(),
        "bias gradient": beta.grad.clone(),
        "running mean": mean.clone(),
        "running variance": variance.clone(),
    }
