"""Behavior that all implementations share; test_interpreter.py runs this file for Triton in a separate process."""

import math
import os

import pytest
import torch

from loss import nt_xent
from tests.loss.cases import loss_and_gradients, trained_like

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLS = ["triton"] if INTERPRETED else ["blockwise", "one pass", "reference"]
WIDEST = torch.float32 if INTERPRETED else torch.float64
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter: log of 0 is intended
    pytest.mark.parametrize("impl", IMPLS, indirect=True),
]


def test_a_single_sample_has_no_negatives_and_zero_loss(impl):
    loss, grad, grad_temperature = loss_and_gradients(trained_like(1, 8, WIDEST), 0.1, impl)
    assert loss == 0 and grad_temperature == 0 and not grad.any()
    with pytest.raises(ValueError, match="decoupled=True needs negatives, but z holds a single sample"):
        nt_xent(trained_like(1, 8, WIDEST), 0.1, impl=impl, decoupled=True)


@pytest.mark.parametrize(("tau", "decoupled"), [(0.005, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_are_finite_and_get_no_gradient(impl, dtype, tau, decoupled):
    z = trained_like(6, 24, dtype)
    z[[2, 7]] = 0
    loss, grad, grad_temperature = loss_and_gradients(z, tau, impl, decoupled=decoupled)
    assert loss.isfinite() and grad.isfinite().all() and grad_temperature.isfinite()
    assert not grad[[2, 7]].any() and grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("n", "tau", "decoupled"),
    [(1, 0.005, False), (1, 0.1, False), (6, 0.005, False), (6, 0.1, False), (6, 0.1, True)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_make_the_loss_nan(impl, dtype, n, tau, decoupled, bad):
    z = trained_like(n, 24, dtype)
    z[n, 3] = bad
    loss, grad, _ = loss_and_gradients(z, tau, impl, decoupled=decoupled)
    assert loss.isnan() and grad.isnan().any()


def test_rows_too_long_to_square_make_the_loss_nan(impl):
    assert nt_xent(torch.full((4, 8), 1e30), 0.1, impl=impl).isnan()


@pytest.mark.parametrize("length", [1e-44, 1e-25, 1e-22, 1e-20, 1e-18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_short_to_square_count_as_zero_rows(impl, dtype, length):
    """Their rounded squares would give u a norm other than 1, and the loss a wrong or infinite value."""
    z = trained_like(6, 24, dtype)
    z[[2, 7]] *= length / 30
    zeroed = z.index_fill(0, torch.tensor([2, 7]), 0)
    for actual, expected in zip(loss_and_gradients(z, 0.1, impl), loss_and_gradients(zeroed, 0.1, impl), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("length", [1e-16, 1e-10, 1e10, 1e17])
def test_the_length_of_longer_rows_does_not_matter(impl, length):
    z = trained_like(6, 8, torch.float32)
    z /= z.norm(dim=1, keepdim=True)
    true_loss, true_grad, true_grad_temperature = loss_and_gradients((z * length).double(), 0.1, "reference")
    loss, grad, grad_temperature = loss_and_gradients(z * length, 0.1, impl)
    ulp = 2**-23 / 0.1  # of s
    assert (loss - true_loss).abs() <= 2 * ulp and (grad - true_grad).norm() <= 8 * ulp * true_grad.norm()
    assert (grad_temperature - true_grad_temperature).abs() <= 8 * ulp / 0.1


@pytest.mark.parametrize(
    ("dtype", "length"),
    [(torch.bfloat16, 1e-15), (torch.bfloat16, 1e15), (torch.float16, 1e-3), (torch.float16, 100)],
)
def test_the_length_of_16_bit_rows_does_not_matter(impl, dtype, length):
    z = trained_like(6, 24, torch.float32)
    expected = nt_xent(z, 0.1, impl=impl)
    torch.testing.assert_close(nt_xent((z * length / 30).to(dtype), 0.1, impl=impl), expected, rtol=0.05, atol=0)


def test_autocast_changes_nothing(impl):
    z = trained_like(9 if INTERPRETED else 33, 48, torch.float32)
    expected = loss_and_gradients(z, 0.07, impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z, 0.07, impl=impl)
        backward_inside = loss_and_gradients(z, 0.07, impl) if impl != "reference" else expected
    assert torch.equal(loss, expected[0]) and all(map(torch.equal, backward_inside, expected))


def test_number_and_tensor_temperatures_agree(impl):
    z = trained_like(4, 8, WIDEST)
    assert torch.equal(nt_xent(z, 0.25, impl=impl), nt_xent(z, torch.tensor(0.25), impl=impl))


def test_the_default_device_does_not_matter(impl):
    z = trained_like(4, 8, WIDEST)
    expected = nt_xent(z, 0.25, impl=impl)
    with torch.device("meta"):
        assert torch.equal(nt_xent(z, 0.25, impl=impl), expected)


@pytest.mark.parametrize(
    "layout",
    [
        lambda z: z.t().contiguous().t(),
        lambda z: torch.stack([z, z], dim=2)[..., 0],
        lambda z: z[:1].expand_as(z),
        lambda z: z[:, :1].expand_as(z),
    ],
    ids=["transposed", "strided", "rows expanded", "columns expanded"],
)
def test_strides_do_not_matter(impl, layout):
    z = layout(trained_like(6, 8, WIDEST))
    assert not z.is_contiguous()
    for actual, true in zip(
        loss_and_gradients(z, 0.1, impl), loss_and_gradients(z.contiguous(), 0.1, impl), strict=True
    ):
        torch.testing.assert_close(actual, true, rtol=1e-12, atol=1e-12)


def test_two_runs_are_bit_identical(impl):
    z = trained_like(25 if INTERPRETED else 515, 48, torch.bfloat16 if INTERPRETED else torch.float32)
    first, second = (loss_and_gradients(z, 0.1, impl) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("decoupled", [False, True])
def test_compiles_into_a_single_graph(impl, decoupled):
    z = trained_like(17, 10, torch.float32)

    def step(z, temperature, decoupled):
        return nt_xent(2 * z, temperature, impl=impl, decoupled=decoupled)

    expected = loss_and_gradients(z, 0.1, impl, step, decoupled)
    actual = loss_and_gradients(z, 0.1, impl, torch.compile(step, backend="aot_eager", fullgraph=True), decoupled)
    for ours, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, true)


def test_double_backward_is_refused_except_by_the_reference(impl):
    z = trained_like(3, 24, WIDEST).requires_grad_()
    if impl == "reference":
        torch.autograd.grad(nt_xent(z, 0.1, impl=impl), z, create_graph=True)
        return
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(nt_xent(z, 0.1, impl=impl), z, create_graph=True)
