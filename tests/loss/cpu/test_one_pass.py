"""Loss and gradient of small batches in one pass: accuracy against float64, bands, repeated backward passes."""

import pytest
import torch

from loss import nt_xent
from loss.cpu import one_pass
from tests.loss.cases import check_accuracy, loss_and_gradients, trained_like


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])  # the first is too low for exponentials in float32
@pytest.mark.parametrize(("n", "d"), [(3, 37), (65, 48), (400, 64)])
def test_float32_error_is_that_of_dense_torch(n, d, tau, decoupled):
    check_accuracy(trained_like(n, d, torch.float32), tau, "blockwise", decoupled)


@pytest.mark.parametrize("block", [(1, 4), (4, 8), (8, 4), (7, 3), (64, 64)])
@pytest.mark.parametrize("n", [1, 3, 15, 17])
def test_every_block_shape_gives_the_same_result(monkeypatch, block, n):
    monkeypatch.setattr(one_pass, "BAND_ROWS", block[0])
    monkeypatch.setattr(one_pass, "BLOCK_COLUMNS", block[1])
    z = trained_like(n, 10)
    truth = loss_and_gradients(z, 0.1, "reference")
    for ours, true in zip(loss_and_gradients(z, 0.1, "blockwise"), truth, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-11)


def test_the_gradient_is_scaled_by_every_backward_pass():
    """It is computed in the forward pass, and must survive the first backward pass."""
    z = trained_like(5, 8).requires_grad_()
    loss = nt_xent(z, 0.1)
    (once,) = torch.autograd.grad(loss, z, retain_graph=True)
    (tripled,) = torch.autograd.grad(3 * loss, z)
    torch.testing.assert_close(tripled, 3 * once, rtol=1e-15, atol=0)


@pytest.mark.parametrize("differentiated", ["z", "temperature", "both"])
def test_eager_mode_equals_the_operator_without_calling_it(monkeypatch, differentiated):
    z = trained_like(5, 8).requires_grad_(differentiated != "temperature")
    temperature = torch.tensor(0.1, requires_grad=differentiated != "z")
    inputs = [x for x in (z, temperature) if x.requires_grad]
    expected = torch.autograd.grad(one_pass.loss_and_gradient(z, temperature, False, True)[0], inputs)
    monkeypatch.setattr(one_pass, "loss_and_gradient", None)
    actual = torch.autograd.grad(nt_xent(z, temperature), inputs)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("tau", [0.001, 0.1])
def test_without_gradients_only_the_loss_is_computed(tau):
    z = trained_like(5, 8, torch.float32)
    with torch.no_grad():
        loss, *gradients = one_pass.loss_and_gradient(z, torch.tensor(tau), False, False)
        assert torch.equal(nt_xent(z, tau), loss)
    assert [x.numel() for x in gradients] == [0, 0]
    assert torch.equal(nt_xent(z, tau), loss)


@pytest.mark.parametrize(("tau", "with_gradient"), [(0.01, False), (0.1, True)])
def test_operator_passes_opcheck(tau, with_gradient):
    z = trained_like(3, 10, torch.bfloat16).requires_grad_(with_gradient)
    temperature = torch.tensor(tau, requires_grad=with_gradient)
    torch.library.opcheck(one_pass.loss_and_gradient, (z, temperature, True, with_gradient))


def test_only_small_batches_on_a_single_rank_are_in_one_pass(monkeypatch):
    calls = []
    monkeypatch.setattr(one_pass, "nt_xent_one_pass", lambda z, *_: calls.append(len(z)))
    for rows in (2, one_pass.MAX_ROWS, one_pass.MAX_ROWS + 2):
        nt_xent(torch.ones(rows, 1), 0.1)
    assert calls == [2, one_pass.MAX_ROWS]
