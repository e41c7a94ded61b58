"""The blockwise path: error against float64 truth no worse than dense torch's, memory, determinism, torch.compile."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from loss import nt_xent
from loss.cpu import blockwise


def trained_like(m, d, dtype=torch.float32):
    """(m, d) whose positive cosines exceed 0.9, as after training."""
    generator = torch.Generator().manual_seed(m + d)
    first = torch.randn(m // 2, d, generator=generator)
    z = torch.cat([first, first + 0.25 * torch.randn(m // 2, d, generator=generator)]).to(dtype)
    assert F.cosine_similarity(*z.double().chunk(2)).mean() > 0.9
    return z


def dense(z, temperature):
    """What one writes with plain torch: the accuracy to match."""
    z = F.normalize(z, dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


def loss_and_gradients(function, z, tau):
    z = z.detach().clone().requires_grad_()
    temperature = torch.tensor(tau, dtype=z.dtype, requires_grad=True)
    loss = function(z, temperature)
    loss.backward()
    return loss.detach(), z.grad, temperature.grad


@pytest.mark.parametrize("tau", [0.01, 0.02, 0.1, 1.0])
@pytest.mark.parametrize(("m", "d"), [(2, 24), (6, 37), (130, 48), (130, 200), (1026, 128)])
def test_fp32_error_is_that_of_dense_torch(m, d, tau):
    z = trained_like(m, d)
    # The temperature itself is rounded first, so that its rounding is no part of the error.
    tau = torch.tensor(tau).item()
    truth = loss_and_gradients(lambda *a: nt_xent(*a, impl="reference"), z.double(), tau)
    actual = loss_and_gradients(lambda *a: nt_xent(*a, impl="blockwise"), z, tau)
    naive = loss_and_gradients(dense, z, tau)
    ulp = torch.finfo(torch.float32).eps
    # A scalar's rounding error can be nought by luck, a matrix's norm cannot: hence the slack, in ulps of s = 1 / tau.
    for name, true, ours, theirs, slack in zip(
        ("loss", "dL/dz", "dL/dtau"), truth, actual, naive, (ulp / tau, 0, ulp / tau**2), strict=True
    ):
        error, naive_error = (ours - true).norm().item(), (theirs - true).norm().item()
        assert error <= 2 * naive_error + 2 * slack, f"{name}: {error:.2e}, dense {naive_error:.2e}"


@pytest.mark.parametrize("blocks", [(4, 8), (8, 4), (6, 6), (7, 3), (64, 64)])
@pytest.mark.parametrize("tau", [0.001, 0.1])
@pytest.mark.parametrize("m", [2, 6, 30, 34])
def test_every_block_shape_gives_the_float64_truth(monkeypatch, blocks, tau, m):
    monkeypatch.setattr(blockwise, "BAND_ROWS", blocks[0])
    monkeypatch.setattr(blockwise, "BLOCK_COLUMNS", blocks[1])
    z = trained_like(m, 10, torch.float64)
    truth = loss_and_gradients(lambda *a: nt_xent(*a, impl="reference"), z, tau)
    actual = loss_and_gradients(lambda *a: nt_xent(*a, impl="blockwise"), z, tau)
    for ours, true in zip(actual, truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-13 / tau**2)


@pytest.mark.parametrize("tau", [0.005, 0.01, 0.0133, 0.0135, 0.0137, 0.03])
def test_fp32_stays_finite_and_right_on_both_sides_of_the_switch(tau):
    z = trained_like(258, 32)
    z[5] = -z[4]  # cosine -1, the other end of the range
    loss, grad, grad_temperature = loss_and_gradients(lambda *a: nt_xent(*a, impl="blockwise"), z, tau)
    true_loss, true_grad, _ = loss_and_gradients(lambda *a: nt_xent(*a, impl="reference"), z.double(), tau)
    assert grad_temperature.isfinite()
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-4, atol=1e-5)
    assert (grad - true_grad).norm() <= 1e-4 * true_grad.norm()


def test_two_runs_are_bit_identical():
    z = trained_like(1030, 48)
    first, second = (loss_and_gradients(nt_xent, z, 0.1) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_auto_is_blockwise_on_the_cpu():
    z = trained_like(34, 10)
    assert torch.equal(nt_xent(z, 0.1), nt_xent(z, 0.1, impl="blockwise"))


def test_double_backward_is_refused():
    z = trained_like(6, 10).requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(nt_xent(z, 0.1), z, create_graph=True)


def test_ops_pass_opcheck():
    z, tau = trained_like(6, 10), torch.tensor(0.1)
    negatives = blockwise.negatives_logsumexp(z, tau, 6)
    torch.library.opcheck(blockwise.negatives_logsumexp, (z, tau, 6))
    torch.library.opcheck(
        blockwise.loss_from_negatives, (z.clone().requires_grad_(), tau.clone().requires_grad_(), z, negatives)
    )
    torch.library.opcheck(blockwise.loss_gradient, (torch.tensor(1.0), tau, z, negatives, 6))


def test_stands_in_one_graph_of_torch_compile():
    z = trained_like(34, 10)

    def step(z, temperature):
        return nt_xent(2 * z, temperature)

    expected = loss_and_gradients(step, z, 0.1)
    actual = loss_and_gradients(torch.compile(step, backend="aot_eager", fullgraph=True), z, 0.1)
    for ours, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, true)


# The peak over a process's life counts everything torch holds, in C++ too, but never falls: one process per M. Threads'
# GEMM workspaces and torch's own code come in with the small warm-up.
PEAK_SCRIPT = """
import sys, torch
from bench.harness import peak_resident_mb
from loss import nt_xent
m = int(sys.argv[1])
z = torch.randn(m, 64, requires_grad=True)
nt_xent(z[:1024], 0.1).backward()
before = peak_resident_mb()
nt_xent(z, 0.1).backward()
print(peak_resident_mb() - before)
"""


def test_memory_grows_with_m_not_with_its_square():
    m = 8192  # one M x M in fp32 is 256 MB, one M x D is 2 MB
    root = Path(blockwise.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(m)], capture_output=True, text=True, check=True, cwd=root
    )
    assert 1 < float(run.stdout) < 32
