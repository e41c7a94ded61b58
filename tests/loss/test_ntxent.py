"""nt_xent as a user calls it: values, gradients, dtypes, refusals. One process."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

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


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_too_long_to_square_make_the_loss_nan(impl):
    assert nt_xent(torch.full((4, 8), 1e30), 0.1, impl=impl).isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [1e-44, 1e-25, 1e-22, 1e-20, 1e-18])
def test_rows_too_short_to_square_count_as_zero_rows(impl, length):
    """Their rounded squares would give u another length than 1, and the loss a wrong or infinite value."""
    z = trained_like(6, 8).float()
    z[[2, 7]] *= length / 30
    zeroed = z.index_fill(0, torch.tensor([2, 7]), 0)
    for actual, expected in zip(loss_and_gradients(z, 0.1, impl), loss_and_gradients(zeroed, 0.1, impl), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [1e-16, 1e-10, 1e10, 1e17])
def test_the_length_of_all_other_rows_does_not_matter(impl, length):
    z = trained_like(6, 8).float()
    z /= z.norm(dim=1, keepdim=True)
    true_loss, true_grad, true_grad_temperature = loss_and_gradients((z * length).double(), 0.1, "reference")
    loss, grad, grad_temperature = loss_and_gradients(z * length, 0.1, impl)
    ulp = 2**-23 / 0.1  # of s
    assert (loss - true_loss).abs() <= 2 * ulp and (grad - true_grad).norm() <= 8 * ulp * true_grad.norm()
    assert (grad_temperature - true_grad_temperature).abs() <= 8 * ulp / 0.1


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


@pytest.mark.parametrize("impl", IMPLS)
def test_the_default_device_does_not_matter(impl):
    z = trained_like(4, 8)
    expected = nt_xent(z, 0.25, impl=impl)
    with torch.device("meta"):
        assert torch.equal(nt_xent(z, 0.25, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
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
    z = layout(trained_like(6, 8))
    assert not z.is_contiguous()
    for actual, true in zip(
        loss_and_gradients(z, 0.1, impl), loss_and_gradients(z.contiguous(), 0.1, impl), strict=True
    ):
        torch.testing.assert_close(actual, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_batched_by_vmap(impl):
    z = torch.stack([trained_like(4, 8, seed) for seed in range(3)]).requires_grad_()
    each = torch.stack([nt_xent(one, 0.2, impl="reference") for one in z])
    together = torch.vmap(lambda one: nt_xent(one, 0.2, impl=impl))(z)
    torch.testing.assert_close(together, each, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(losses.sum(), z)[0] for losses in (together, each)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


TRANSFORMS = {
    "jvp": lambda f, z, tangent: torch.func.jvp(f, (z,), (tangent,))[1],
    "linearize": lambda f, z, tangent: torch.func.linearize(f, z)[1](tangent),
    "jacfwd": lambda f, z, tangent: (torch.func.jacfwd(f)(z) * tangent).sum(),
    "grad": lambda f, z, tangent: (torch.func.grad(f)(z) * tangent).sum(),
    "jacrev": lambda f, z, tangent: (torch.func.jacrev(f)(z) * tangent).sum(),
    "jvp of vmap": lambda f, z, tangent: torch.func.jvp(torch.vmap(f), (z[None],), (tangent[None],))[1][0],
    "vmap of jvp": lambda f, z, tangent: torch.vmap(lambda z, t: torch.func.jvp(f, (z,), (t,))[1])(
        z[None], tangent[None]
    )[0],
    "dual": lambda f, z, tangent: _dual(f, z, tangent),
}


def _dual(f, z, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, tangent))).tangent


@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_without_a_formula_are_refused_not_zero(name):
    z, tangent = trained_like(4, 8), trained_like(4, 8, seed=1)
    _, grad, _ = loss_and_gradients(z, 0.2, "reference")
    derivative = TRANSFORMS[name](lambda z: nt_xent(z, 0.2, impl="reference"), z, tangent)
    torch.testing.assert_close(derivative, (grad * tangent).sum(), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"neither forward-mode .* nor .* torch\.func"):
        TRANSFORMS[name](lambda z: nt_xent(z, 0.2, impl="blockwise"), z, tangent)
    with pytest.raises(RuntimeError, match="supports neither forward-mode"):
        torch.func.jvp(lambda tau: nt_xent(z, tau), (torch.tensor(0.2),), (torch.tensor(1.0),))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_a_temperature_out_of_range_is_never_taken(impl):
    """A compiled graph cannot look at a tensor: it makes the loss NaN."""
    torch.compiler.reset()
    compiled = torch.compile(partial(nt_xent, impl=impl), backend="aot_eager")
    z = trained_like(4, 8)
    torch.testing.assert_close(compiled(z, torch.tensor(0.1)), nt_xent(z, torch.tensor(0.1)))
    for tau in (-0.1, 0.0, math.nan, math.inf):
        assert compiled(z, torch.tensor(tau)).isnan()
    with pytest.raises(ValueError, match=r"temperature must be positive and finite; got -0\.1"):
        compiled(z, -0.1)


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
        (torch.randn(4), 0.1, "auto", r"z must be a dense \(2n, D\) .*; got shape \(4,\)"),
        (torch.randn(2, 2, 3), 0.1, "auto", r"z must be .* shape \(2, 2, 3\)"),
        (torch.ones(4, 3, dtype=torch.int64), 0.1, "auto", r"z must be a dense .* \(4, 3\) of torch.int64"),
        (torch.ones(4, 3, dtype=torch.complex64), 0.1, "reference", r"z must be a dense .* of torch.complex64"),
        (torch.ones(4, 3).to(torch.float8_e4m3fn), 0.1, "auto", r"z must be a dense .* of torch.float8_e4m3fn"),
        (torch.ones(4, 3).to_sparse(), 0.1, "auto", r"z must be a dense .* of torch.float32, torch.sparse_coo"),
        (torch.randn(5, 3), 0.1, "auto", r"z must hold two views .* \(5, 3\)"),
        (torch.randn(0, 3), 0.1, "auto", r"z must hold two views .* \(0, 3\)"),
        (torch.randn(4, 0), 0.1, "auto", r"z must hold two views .* \(4, 0\)"),
        (torch.randn(4, 3), 0, "auto", r"temperature must be positive and finite; got 0"),
        (torch.randn(4, 3), -0.1, "reference", r"temperature must be positive and finite; got -0.1"),
        (torch.randn(4, 3), math.nan, "auto", r"temperature must be positive and finite; got nan"),
        (torch.randn(4, 3), math.inf, "auto", r"temperature must be positive and finite; got inf"),
        (torch.randn(4, 3), torch.tensor(-1.0), "auto", r"temperature must be positive and finite; got -1"),
        (torch.randn(4, 3), torch.tensor(math.inf), "auto", r"temperature must be positive and finite; got inf"),
        (torch.randn(4, 3), torch.tensor([0.1]), "auto", r"temperature must be .* 0-dim; got shape \(1,\)"),
        (torch.randn(4, 3), torch.tensor(0.1j), "auto", r"temperature must be float64, .*; got torch.complex64"),
        (torch.randn(4, 3), torch.tensor(0.1, device="meta"), "auto", r"on the CPU or on z's device cpu; got meta"),
        (torch.randn(4, 3), 0.1, "fast", r"impl must be one of auto, .*; got 'fast'"),
        (torch.randn(4, 3), 0.1, "triton", r"impl='triton' is not available for z on cpu"),
    ],
)
def test_refuses(z, temperature, impl, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(z, temperature, impl=impl)


@pytest.mark.parametrize("temperature", ["0.1", None, [0.1], 0.1j])
def test_refuses_what_is_no_number(temperature):
    with pytest.raises(TypeError, match="temperature must be a number or a 0-dim tensor; got"):
        nt_xent(torch.randn(4, 3), temperature)
    with pytest.raises(TypeError, match="z must be a tensor; got list"):
        nt_xent([[1.0, 2.0], [3.0, 4.0]], 0.1)
