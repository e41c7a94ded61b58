"""nt_xent as a user calls it: values, gradients, dtypes, refusals. One process."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loss import nt_xent

IMPLS = ["blockwise", "reference"]


def trained_like(n, d, seed=0):
    """(2n, d) float64 with positive cosines above 0.9 and rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n, d, generator=generator, dtype=torch.float64)
    views = torch.cat([first, first + 0.25 * torch.randn(n, d, generator=generator, dtype=torch.float64)])
    return views * torch.empty(2 * n, 1, dtype=torch.float64).uniform_(0.3, 30, generator=generator)


def loss_and_gradients(z, tau, impl, learn_temperature=True):
    z = z.detach().clone().requires_grad_()
    temperature = torch.tensor(tau, dtype=torch.promote_types(z.dtype, torch.float32), requires_grad=learn_temperature)
    loss = nt_xent(z, temperature, impl=impl)
    loss.backward()
    return loss.detach(), z.grad, temperature.grad


def algorithm_1_in_loops(z, tau):
    """SimCLR, Algorithm 1, in Python numbers. There the views of sample k are rows 2k - 1 and 2k, here k and n + k."""
    z = z.tolist()
    n = len(z) // 2
    rows = [z[k + view * n] for k in range(n) for view in range(2)]

    def s(i, j):
        dot = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        return dot / (math.hypot(*rows[i]) * math.hypot(*rows[j]))

    def ell(i, j):
        denominator = sum(math.exp(s(i, k) / tau) for k in range(2 * n) if k != i)
        return -math.log(math.exp(s(i, j) / tau) / denominator)

    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tau", [0.07, 0.5, 1])
def test_equals_algorithm_1_in_loops(impl, tau):
    z = trained_like(5, 7)
    assert nt_xent(z, tau, impl=impl).item() == pytest.approx(algorithm_1_in_loops(z, tau), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_equals_finite_differences(impl):
    z = trained_like(3, 5).requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: nt_xent(*inputs, impl=impl), (z, temperature))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_sample_has_no_negatives_and_loses_nothing(impl):
    loss, grad, grad_temperature = loss_and_gradients(trained_like(1, 8), 0.1, impl)
    assert loss == 0 and grad_temperature == 0 and not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tau", [0.005, 0.1])
def test_zero_rows_are_finite_and_get_no_gradient(impl, tau):
    z = trained_like(6, 8)
    z[[2, 7]] = 0
    loss, grad, grad_temperature = loss_and_gradients(z, tau, impl)
    assert loss.isfinite() and grad.isfinite().all() and grad_temperature.isfinite()
    assert not grad[[2, 7]].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tau", [0.005, 0.1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [1, 6])
def test_nan_and_inf_make_the_loss_nan(impl, tau, bad, n):
    z = trained_like(n, 8).float()
    z[n, 3] = bad
    assert nt_xent(z, tau, impl=impl).isnan()


def test_rows_too_long_to_square_make_the_loss_nan():
    assert nt_xent(torch.full((4, 8), 1e30), 0.1).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype):
    z = trained_like(33, 48).to(dtype)
    loss, grad, grad_temperature = loss_and_gradients(z, 0.07, "blockwise")
    expected, expected_grad, expected_grad_temperature = loss_and_gradients(z.float(), 0.07, "blockwise")
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert grad.dtype == dtype and torch.equal(grad, expected_grad.to(dtype))
    assert torch.equal(grad_temperature, expected_grad_temperature)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    z = trained_like(33, 48).float().requires_grad_()
    expected, expected_grad, _ = loss_and_gradients(z, 0.07, impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z, 0.07, impl=impl)
    loss.backward()
    assert torch.equal(loss, expected) and torch.equal(z.grad, expected_grad)


def test_backward_inside_autocast_stays_fp32():
    z = trained_like(33, 48).float()
    expected = loss_and_gradients(z, 0.07, "blockwise")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss_and_gradients(z, 0.07, "blockwise")
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_number_and_tensor_temperatures_agree(impl):
    z = trained_like(4, 8)
    assert torch.equal(nt_xent(z, 0.25, impl=impl), nt_xent(z, torch.tensor(0.25), impl=impl))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 20),
    tau=st.floats(0.005, 2),
    seed=st.integers(0, 2**31),
    impl=st.sampled_from(IMPLS),
)
def test_order_of_samples_and_length_of_rows_do_not_matter(n, d, tau, seed, impl):
    z = trained_like(n, d, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    rows = torch.cat([order, order + n])
    scale = torch.empty(2 * n, 1, dtype=z.dtype).uniform_(-3, 3, generator=generator).exp()
    loss, grad, grad_temperature = loss_and_gradients(z, tau, impl)
    moved_loss, moved_grad, moved_grad_temperature = loss_and_gradients((z * scale)[rows], tau, impl)
    close = {"rtol": 1e-9, "atol": 1e-11 / tau}
    torch.testing.assert_close(moved_loss, loss, **close)
    torch.testing.assert_close(moved_grad, (grad / scale)[rows], **close)
    torch.testing.assert_close(moved_grad_temperature, grad_temperature, rtol=1e-9, atol=1e-11 / tau**2)


@pytest.mark.parametrize(
    ("z", "temperature", "impl", "message"),
    [
        (torch.randn(4), 0.1, "auto", r"z must be a floating \(2n, D\); got shape \(4,\)"),
        (torch.randn(2, 2, 3), 0.1, "auto", r"z must be .* shape \(2, 2, 3\)"),
        (torch.ones(4, 3, dtype=torch.int64), 0.1, "auto", r"z must be a floating .* \(4, 3\) of torch.int64"),
        (torch.randn(5, 3), 0.1, "auto", r"z must hold two views .* \(5, 3\)"),
        (torch.randn(0, 3), 0.1, "auto", r"z must hold two views .* \(0, 3\)"),
        (torch.randn(4, 3), 0, "auto", r"temperature must be positive; got 0"),
        (torch.randn(4, 3), -0.1, "reference", r"temperature must be positive; got -0.1"),
        (torch.randn(4, 3), math.nan, "auto", r"temperature must be positive; got nan"),
        (torch.randn(4, 3), torch.tensor(-1.0), "auto", r"temperature must be positive; got -1"),
        (torch.randn(4, 3), torch.tensor([0.1]), "auto", r"temperature must be .* 0-dim; got shape \(1,\)"),
        (torch.randn(4, 3), 0.1, "fast", r"impl must be one of auto, .*; got 'fast'"),
        (torch.randn(4, 3), 0.1, "triton", r"impl='triton' is not available for z on cpu"),
    ],
)
def test_refuses(z, temperature, impl, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(z, temperature, impl=impl)
