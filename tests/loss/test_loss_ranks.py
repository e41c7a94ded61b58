"""Several gloo processes compared with one: loss, gradients averaged by DDP, errors for differing calls."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from loss import NegativeQueue, nt_xent
from tests.loss import cases
from tests.ranks import run_ranks

SAMPLES_PER_RANK, WIDTH, D = 5, 9, 7
CASES = [(impl, decoupled) for impl in ("blockwise", "reference") for decoupled in (False, True)]


class Projector(torch.nn.Module):
    """A linear layer and a learned temperature, whose gradients DDP averages."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(D, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.weight = torch.nn.Parameter(weight)
        self.temperature = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, views):
        return views @ self.weight.T, self.temperature


def batch_views(world_size):
    """(2, N, WIDTH): both views of the global batch."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(world_size * SAMPLES_PER_RANK, WIDTH, dtype=torch.float64, generator=generator)
    return torch.stack([first, first + 0.3 * torch.randn(first.shape, dtype=torch.float64, generator=generator)])


def loss_and_gradients(module, views, **options):
    module.zero_grad()
    loss = nt_xent(*module(views.flatten(0, 1)), **options)
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in module.parameters()]


def steps_with_a_queue(rank, world_size):
    """Losses and gradients of four steps on a rank's share of six samples, and the queue after them.

    Batches have 12 rows and the queue 17, so that entries would be others if ranks appended in another order. Most
    samples are those of earlier batches, in other places.
    """
    own = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    queue, results = NegativeQueue(17, 8).double(), []
    for step in range(4):
        z = cases.trained_like(6, 8, seed=step).unflatten(0, (2, -1))[:, own].flatten(0, 1)
        sample = (torch.arange(6) * (step + 1) % 7)[own]
        compute = partial(nt_xent, queue=queue, sample=sample)
        loss, grad, _ = cases.loss_and_gradients(z, 0.2, None, compute, decoupled=step % 2 == 1)
        queue.append(z, sample)
        if world_size > 1:
            dist.all_reduce(loss)
        results.append((loss / world_size, grad.unflatten(0, (2, -1)) / world_size))
    return results, queue.state_dict()


def compare_with_one_process(rank, world_size):
    own = batch_views(world_size)[:, rank * SAMPLES_PER_RANK : (rank + 1) * SAMPLES_PER_RANK]
    module = DistributedDataParallel(Projector())
    results = {}
    for impl, decoupled in CASES:
        loss, *gradients = loss_and_gradients(module, own, impl=impl, decoupled=decoupled)
        dist.all_reduce(loss)
        results[impl, decoupled] = [loss / world_size, *gradients]

    results["queue"] = steps_with_a_queue(rank, world_size)

    # In a group of one, the loss is that of a single process.
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    results["alone"] = loss_and_gradients(Projector(), own, group=alone)

    outsiders = [r for r in range(world_size) if r != 0]
    not_mine = [dist.new_group(outsiders), dist.new_group([0])][rank != 0]
    with pytest.raises(ValueError) as error:
        nt_xent(torch.randn(4, D), 0.1, group=not_mine)
    results["outsider"] = str(error.value)

    results["different calls"] = []
    z = torch.randn(4, D)
    for differing, options in [
        (z.bfloat16() if rank else z, {"temperature": 0.1}),
        (z, {"temperature": 0.1, "impl": "reference" if rank else "blockwise"}),
        (z, {"temperature": 0.1 + rank}),
        (z, {"temperature": torch.tensor(0.1) if rank else 0.1}),
        (z, {"temperature": 0.1, "decoupled": bool(rank)}),
        (z, {"temperature": 0.1, "queue": NegativeQueue(9 + rank, D), "sample": torch.arange(2)}),
    ]:
        with pytest.raises(ValueError) as error:
            nt_xent(differing, **options)
        results["different calls"].append(str(error.value))

    z = own.flatten(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent(z, 0.2, impl="reference"), z, create_graph=True)
    (results["second derivative"],) = torch.autograd.grad((gradient**3).sum(), z)

    results["shape errors"] = []
    for shape in [(4 if rank else 6, D), (4, D + rank), (5 if rank else 4, D)]:
        with pytest.raises(ValueError) as error:
            nt_xent(torch.randn(shape), 0.1)
        results["shape errors"].append(str(error.value))
    with pytest.raises(ValueError) as error:
        nt_xent(torch.randn(5, D), 0.1)
    results["odd"] = str(error.value)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(world_size, tmp_path):
    views = batch_views(world_size)
    expected = {
        decoupled: loss_and_gradients(Projector(), views, impl="reference", decoupled=decoupled)
        for decoupled in (False, True)
    }
    z = views.flatten(0, 1).requires_grad_()
    # before averaging over ranks, dL/dz of a rank is W times the gradient of the mean over all rows
    (gradient,) = torch.autograd.grad(world_size * nt_xent(z, 0.2, impl="reference"), z, create_graph=True)
    second_derivative = torch.autograd.grad((gradient**3).sum(), z)[0].unflatten(0, (2, -1))
    steps, queue = steps_with_a_queue(0, 1)
    for rank, results in enumerate(run_ranks(world_size, tmp_path, compare_with_one_process)):
        for impl, decoupled in CASES:
            for actual, true in zip(results[impl, decoupled], expected[decoupled], strict=True):
                torch.testing.assert_close(actual, true, rtol=1e-12, atol=1e-12)
        for (loss, grad), (true_loss, true_grad) in zip(results["queue"][0], steps, strict=True):
            torch.testing.assert_close(loss, true_loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grad, true_grad.chunk(world_size, dim=1)[rank], rtol=1e-12, atol=1e-12)
        assert all(torch.equal(results["queue"][1][name], queue[name]) for name in queue)
        own = views[:, rank * SAMPLES_PER_RANK : (rank + 1) * SAMPLES_PER_RANK]
        for actual, true in zip(results["alone"], loss_and_gradients(Projector(), own), strict=True):
            torch.testing.assert_close(actual, true, rtol=1e-12, atol=1e-12)
        assert all("z must have the same shape on every rank" in message for message in results["shape errors"])
        assert ("[[4, 7], " if rank else "[[6, 7], ") in results["shape errors"][0]
        assert "z must hold two views" in results["odd"]
        assert "This process is not in the group" in results["outsider"]
        dtypes, impls, temperatures, kinds, losses, queues = results["different calls"]
        assert "torch.float32 by blockwise" in dtypes and "torch.bfloat16 by blockwise" in dtypes
        assert "by reference" in impls and "at temperature 1.1" in temperatures and "(a tensor)" in kinds
        assert "decoupled torch.float32" in losses and "queue of 9" in queues and "queue of 10" in queues
        mine = slice(rank * SAMPLES_PER_RANK, (rank + 1) * SAMPLES_PER_RANK)
        torch.testing.assert_close(
            results["second derivative"], second_derivative[:, mine].flatten(0, 1), rtol=1e-11, atol=1e-12
        )
