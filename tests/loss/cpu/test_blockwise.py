"""Blockwise implementation: accuracy against float64, memory, custom operators."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loss import nt_xent
from loss.cpu import blockwise
from tests.loss.cases import check_accuracy, loss_and_gradients, trained_like


@pytest.fixture(autouse=True)
def not_in_one_pass(monkeypatch):
    monkeypatch.setattr("loss.cpu.one_pass.MAX_ROWS", 0)


@pytest.mark.parametrize("tau", [0.01, 0.02, 0.1, 1.0])
@pytest.mark.parametrize(("n", "d"), [(1, 24), (3, 37), (65, 48), (65, 200), (513, 128)])
def test_float32_error_is_that_of_dense_torch(n, d, tau):
    check_accuracy(trained_like(n, d, torch.float32), tau, "blockwise")


@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize(("n", "d"), [(3, 37), (65, 48), (513, 128)])
def test_decoupled_error_is_that_of_dense_torch(n, d, tau):
    check_accuracy(trained_like(n, d, torch.float32), tau, "blockwise", decoupled=True)


@pytest.mark.parametrize("blocks", [(4, 8), (8, 4), (6, 6), (7, 3), (64, 64)])
@pytest.mark.parametrize("tau", [0.001, 0.1])
@pytest.mark.parametrize("n", [1, 3, 15, 17])
def test_every_block_shape_gives_the_same_result(monkeypatch, blocks, tau, n):
    monkeypatch.setattr(blockwise, "BAND_ROWS", blocks[0])
    monkeypatch.setattr(blockwise, "BLOCK_COLUMNS", blocks[1])
    z = trained_like(n, 10)
    truth = loss_and_gradients(z, tau, "reference")
    actual = loss_and_gradients(z, tau, "blockwise")
    for ours, true in zip(actual, truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-13 / tau**2)


@pytest.mark.parametrize("blocks", [(4, 8), (6, 6), (7, 3), (64, 64)])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("world_size", "n"), [(2, 3), (2, 17), (3, 15)])
def test_every_block_shape_gives_the_same_result_on_several_ranks(monkeypatch, blocks, decoupled, world_size, n):
    monkeypatch.setattr(blockwise, "BAND_ROWS", blocks[0])
    monkeypatch.setattr(blockwise, "BLOCK_COLUMNS", blocks[1])
    z, tau = trained_like(world_size * n, 10), torch.tensor(0.1, dtype=torch.float64)
    ranks = z.unflatten(0, (2, world_size, n)).transpose(0, 1).flatten(1, 2)  # (W, 2n, D)
    gathered = [ranks.roll(-rank, 0).flatten(0, 1) for rank in range(world_size)]
    negatives = torch.stack([blockwise.negatives_logsumexp(z_all, tau, 2 * n) for z_all in gathered])  # (W, 2n)

    losses, gradients = [], []
    for rank, z_all in enumerate(gathered):
        own, learned = ranks[rank].clone().requires_grad_(), tau.clone().requires_grad_()
        results = {2: z_all, 1: negatives.roll(-rank, 0).flatten()}
        loss = blockwise.nt_xent_blockwise(own, learned, lambda x, results=results: results[x.ndim], decoupled, None)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, (own, learned)))

    true_loss, true_grad, true_grad_tau = loss_and_gradients(z, 0.1, "reference", decoupled=decoupled)
    of_z = torch.stack([grad for grad, _ in gradients]).unflatten(1, (2, n)).transpose(0, 1).flatten(0, 2)
    torch.testing.assert_close(sum(losses) / world_size, true_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(of_z / world_size, true_grad, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(sum(grad for _, grad in gradients) / world_size, true_grad_tau, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("tau", [0.005, 0.01, 0.0133, 0.0135, 0.0137, 0.03])
def test_float32_is_accurate_on_both_sides_of_the_switch_to_log_sums(tau):
    z = trained_like(129, 32, torch.float32)
    z[5] = -z[4]  # cosine -1, the lower end of the range
    loss, grad, grad_temperature = loss_and_gradients(z, tau, "blockwise")
    true_loss, true_grad, _ = loss_and_gradients(z.double(), tau, "reference")
    assert grad_temperature.isfinite()
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-4, atol=1e-5)
    assert (grad - true_grad).norm() <= 1e-4 * true_grad.norm()


def test_auto_is_blockwise_on_the_cpu():
    z = trained_like(17, 10)
    assert torch.equal(nt_xent(z, 0.1), nt_xent(z, 0.1, impl="blockwise"))


def test_operators_pass_opcheck():
    z, tau = trained_like(3, 10, torch.float32), torch.tensor(0.1)
    negatives = blockwise.negatives_logsumexp(z, tau, 6)
    torch.library.opcheck(blockwise.negatives_logsumexp, (z, tau, 6))
    torch.library.opcheck(
        blockwise.loss_from_negatives,
        (z.clone().requires_grad_(), tau.clone().requires_grad_(), z, negatives, True),
    )
    torch.library.opcheck(blockwise.loss_gradient, (torch.tensor(1.0), tau, z, negatives, 6, True))


# The peak of a process counts all memory that torch holds, also in C++, but never decreases: hence a separate process.
# The small warm-up loads torch's code and allocates the GEMM workspaces of its threads.
PEAK_SCRIPT = """
import sys, torch
import torch._dynamo  # which the first call of an operator imports: 160 MB
from engine.environment import peak_resident_mb
from loss import nt_xent
m = int(sys.argv[1])
z = torch.randn(m, 64, requires_grad=True)
nt_xent(z[:1024], 0.1).backward()
before = peak_resident_mb()
nt_xent(z, 0.1).backward()
print(peak_resident_mb() - before)
"""


def test_memory_is_linear_in_m():
    m = 8192  # an M x M float32 matrix is 256 MB, an M x D one is 2 MB
    root = Path(blockwise.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(m)], capture_output=True, text=True, check=True, cwd=root
    )
    assert 1 < float(run.stdout) < 32
