"""nt_xent in one process: values, gradients, dtypes, derivatives, invalid arguments, imports."""

import math
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import common
import loss.ntxent
import loss.triton
from common import UserError
from loss import LossConfig, nt_xent
from tests.loss.cases import loss_and_gradients, trained_like

ROOT = Path(__file__).parents[2]
IMPLS = ["blockwise", "one pass", "reference"]


def algorithm_1_in_loops(z, tau, decoupled):
    """SimCLR, Algorithm 1, in plain Python. Its views of sample k are rows 2k - 1 and 2k, here k and n + k.

    The decoupled loss sums over k != i, j (arXiv 2110.06848).
    """
    z = z.tolist()
    n = len(z) // 2
    rows = [z[k + view * n] for k in range(n) for view in range(2)]

    def s(i, j):
        dot = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        return dot / (math.hypot(*rows[i]) * math.hypot(*rows[j]))

    def ell(i, j):
        others = set(range(2 * n)) - ({i, j} if decoupled else {i})
        denominator = sum(math.exp(s(i, k) / tau) for k in others)
        return -math.log(math.exp(s(i, j) / tau) / denominator)

    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
@pytest.mark.parametrize("tau", [0.07, 0.5, 1])
@pytest.mark.parametrize("decoupled", [False, True])
def test_equals_algorithm_1_in_loops(impl, tau, decoupled):
    z = trained_like(5, 7)
    expected = pytest.approx(algorithm_1_in_loops(z, tau, decoupled), rel=1e-12, abs=1e-14)
    assert nt_xent(z, tau, impl=impl, decoupled=decoupled).item() == expected


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
@pytest.mark.parametrize("decoupled", [False, True])
def test_gradient_equals_finite_differences(impl, decoupled):
    z = trained_like(3, 5).requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(nt_xent, impl=impl, decoupled=decoupled), (z, temperature))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    z = trained_like(33, 48).to(dtype)
    loss, grad, grad_temperature = loss_and_gradients(z, 0.07, "blockwise")
    expected, expected_grad, expected_grad_temperature = loss_and_gradients(z.float(), 0.07, "blockwise")
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert grad.dtype == dtype and torch.equal(grad, (expected_grad * 1024).to(dtype) / 1024)  # loss scaling
    assert torch.equal(grad_temperature, expected_grad_temperature)


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_vmap_computes_every_batch(impl):
    z = torch.stack([trained_like(4, 8, seed=seed) for seed in range(3)]).requires_grad_()
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
def test_unsupported_derivatives_raise_instead_of_being_zero(name):
    z, tangent = trained_like(4, 8), trained_like(4, 8, seed=1)
    _, grad, _ = loss_and_gradients(z, 0.2, "reference")
    derivative = TRANSFORMS[name](lambda z: nt_xent(z, 0.2, impl="reference"), z, tangent)
    torch.testing.assert_close(derivative, (grad * tangent).sum(), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"neither forward-mode .* nor .* torch\.func"):
        TRANSFORMS[name](lambda z: nt_xent(z, 0.2, impl="blockwise"), z, tangent)
    with pytest.raises(RuntimeError, match="supports neither forward-mode"):
        torch.func.jvp(lambda tau: nt_xent(z, tau), (torch.tensor(0.2),), (torch.tensor(1.0),))


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_compiled_loss_is_nan_for_an_invalid_temperature_tensor(impl):
    """A compiled graph cannot read a tensor on the host."""
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
    impl=st.sampled_from(["blockwise", "reference"]),
)
def test_order_of_samples_and_length_of_rows_do_not_matter(n, d, tau, seed, impl):
    z = trained_like(n, d, seed=seed)
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
def test_invalid_arguments_raise_value_error(z, temperature, impl, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(z, temperature, impl=impl)


@pytest.mark.parametrize("temperature", ["0.1", None, [0.1], 0.1j])
def test_invalid_types_raise_type_error(temperature):
    with pytest.raises(TypeError, match="temperature must be a number or a 0-dim tensor; got"):
        nt_xent(torch.randn(4, 3), temperature)
    with pytest.raises(TypeError, match="z must be a tensor; got list"):
        nt_xent([[1.0, 2.0], [3.0, 4.0]], 0.1)
    with pytest.raises(ValueError, match="precision must be None, tf32 or ieee; got 'fp32'"):
        nt_xent(torch.randn(4, 3), 0.1, precision="fp32")


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_config_names_the_option_of_an_invalid_temperature(temperature):
    with pytest.raises(UserError, match=r"^--loss\.temperature is .*; it must be at"):
        LossConfig(temperature=temperature)


# An installed package has the same folder under another name; both may be imported by one process.
IMPORT_SCRIPT = """
import sys, torch
import loss, streamclr.loss
assert not {"triton", "torch._dynamo"} & sys.modules.keys(), "imported before use"
first, second = (package.nt_xent(torch.ones(4, 2), 0.1) for package in (loss, streamclr.loss))
assert torch.equal(first, second)
from loss.cpu import blockwise
from streamclr.loss.cpu import blockwise as installed
assert blockwise.loss_gradient._qualname == "loss::nt_xent_gradient"
assert installed.loss_gradient._qualname == "streamclr::nt_xent_gradient"
if "triton" in sys.argv:
    import loss.triton.ops, streamclr.loss.triton.ops
"""


def test_import_is_light_and_registers_operators_once_per_package(tmp_path):
    package = tmp_path / "streamclr"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "common.py").symlink_to(ROOT / "common.py")
    (package / "loss").symlink_to(ROOT / "loss")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{IMPORT_SCRIPT}"]
    command += ["triton"] if find_spec("triton") else []
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def hopper(monkeypatch):
    """A process that believes cuda:0 to be an H100, and has not looked for a C compiler yet."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CC", raising=False)
    common.has_c_compiler.cache_clear()
    loss.ntxent._warn_of_missing_compiler.cache_clear()
    yield torch.device("cuda:0")
    common.has_c_compiler.cache_clear()
    loss.ntxent._warn_of_missing_compiler.cache_clear()


def test_auto_falls_back_from_triton_without_a_c_compiler_and_warns_once(hopper, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match=r"slower impl='blockwise'.*install gcc or clang") as warned:
        assert [loss.ntxent._choose_impl(hopper, torch.bfloat16) for _ in range(2)] == ["blockwise"] * 2
    assert len(warned) == 1
    assert re.search("needs a C compiler.*install gcc", loss.triton.unsupported_reason(hopper, torch.bfloat16))


@pytest.mark.parametrize("variable", ["PATH", "CC"])
def test_auto_is_triton_with_a_c_compiler(hopper, monkeypatch, tmp_path, variable):
    compiler = tmp_path / "gcc"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if variable == "PATH" else "")
    if variable == "CC":
        monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(common, "Path", lambda *parts: compiler)  # stands for Python.h
    assert loss.ntxent._choose_impl(hopper, torch.bfloat16) == "triton"
    assert loss.ntxent._choose_impl(hopper, torch.float64) == "blockwise"  # silently: Triton has no float64


def test_auto_needs_the_header_files_of_python(hopper, monkeypatch, tmp_path):
    monkeypatch.setattr(common.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    with pytest.warns(UserWarning, match="header files"):
        assert loss.ntxent._choose_impl(hopper, torch.bfloat16) == "blockwise"
