"""The Triton kernels in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/loss/interpreted.py`.

The error against float64 may be twice that of plain dense torch in the same dtype. Small tiles make several programs,
tiles and splits of a small batch; the products of interpreted fp32 tiles are exact fp32 whatever `precision` says.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter

from loss import nt_xent
from loss.triton import launch as triton_launch
from loss.triton import ops as triton_loss
from loss.triton import tiles as triton_tiles
from loss.triton.tiles import Tile
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at each log of 0 that is meant

_create_dot = interpreter.InterpreterBuilder.create_dot


def _create_dot_of_bf16(self, a, b, d, *options):
    # Triton 3.8's interpreter keeps bf16 as its 16 bits and multiplies those as integers.
    def as_fp32(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return _create_dot(self, as_fp32(a), as_fp32(b), d, *options)


interpreter.InterpreterBuilder.create_dot = _create_dot_of_bf16
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
triton_nt_xent = partial(nt_xent, impl="triton")


def trained_like(m, d, dtype=torch.float32):
    """(m, d) with positive cosines above 0.9 and rows of unequal length."""
    generator = torch.Generator().manual_seed(m + d)
    first = torch.randn(m // 2, d, generator=generator)
    z = torch.cat([first, first + 0.25 * torch.randn(m // 2, d, generator=generator)])
    z = (z * torch.empty(m, 1).uniform_(0.3, 30, generator=generator)).to(dtype)
    assert F.cosine_similarity(*z.double().chunk(2)).mean() > 0.9
    return z


def dense(z, temperature):
    """What one writes with plain torch: the accuracy to match."""
    z = F.normalize(z, dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


def loss_and_gradients(function, z, tau):
    z = z.detach().clone().requires_grad_()
    temperature = torch.tensor(tau, dtype=torch.promote_types(z.dtype, torch.float32), requires_grad=True)
    loss = function(z, temperature)
    (loss * 1024).backward()  # as a gradient scaler does, or fp16 gradients vanish
    return loss.detach(), z.grad / 1024, temperature.grad / 1024


def errors(z, tau, function=triton_nt_xent):
    tau = torch.tensor(tau).item()  # rounded first, so that its rounding is no part of the error
    truth = loss_and_gradients(partial(nt_xent, impl="reference"), z.double(), tau)
    ours = loss_and_gradients(function, z, tau)
    return {
        name: (true.norm().item(), (actual.double() - true).norm().item())
        for name, true, actual in zip(("loss", "dL/dz", "dL/dtau"), truth, ours, strict=True)
    }


def check_against_dense(z, tau):
    ours, naive = errors(z, tau), errors(z, tau, dense)
    ulp = torch.finfo(torch.float32).eps
    # A scalar's rounding error can be nought by luck, and a gradient is at best the float64 one rounded to z's dtype.
    rounding = torch.finfo(z.dtype).eps / 2 * ours["dL/dz"][0] + 8 * torch.finfo(torch.float32).tiny
    slack = {"loss": ulp / tau, "dL/dz": rounding, "dL/dtau": ulp / tau**2}
    for name, (_, error) in ours.items():
        assert error <= 2 * naive[name][1] + 2 * slack[name], f"{name}: {error:.2e}, dense {naive[name][1]:.2e}"


@pytest.fixture
def tile(monkeypatch):
    def use(*sizes, programs=16):
        monkeypatch.setattr(triton_tiles, "INTERPRETER_TILE", Tile(*sizes, 1, 1, programs))

    return use


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "d", "tau"), [(2, 24, 0.1), (6, 37, 0.01), (6, 37, 1.0), (130, 48, 0.05), (66, 128, 0.01), (34, 200, 0.02)]
)
def test_error_is_that_of_dense_torch(tile, dtype, m, d, tau):
    tile(32, 32, 256, 256)
    check_against_dense(trained_like(m, d, dtype), tau)


@pytest.mark.parametrize("tau", [0.01, 0.0133, 0.0135, 0.5])
def test_both_sides_of_the_online_switch(tile, tau):
    tile(32, 32, 64, 64)
    z = trained_like(66, 48)
    z[5] = -z[4]  # cosine -1, the other end of the range
    # Normalizing two rows and adding up their product rounds a cosine near 1 by some 2^-24 each, not alike in forward
    # and backward: numpy, which stands in for the tensor cores, multiplies tiles of other shapes in another order.
    for true_norm, error in errors(z, tau).values():
        assert error <= (5e-7 + 4 * 2**-24 / tau) * true_norm


def test_a_larger_batch(tile):
    tile(128, 64, 64, 64)
    check_against_dense(trained_like(258, 64, torch.bfloat16), 0.07)


@pytest.mark.parametrize("sizes", [(16, 32, 16, 16), (32, 16, 16, 32), (16, 16, 64, 64)])
@pytest.mark.parametrize("programs", [1, 64])  # no split of the columns, and as many as there are tiles
def test_every_tile_and_split_agrees(tile, sizes, programs):
    tile(*sizes, programs=programs)
    for z in (trained_like(44, 40), trained_like(64, 64)):  # ragged everywhere, and EVEN
        check_against_dense(z, 0.1)
    _, splits = triton_tiles.choose("negatives", z.device, z.dtype, "ieee", 32, 64, 64)
    assert splits == 1 if programs == 1 else splits > 1


@pytest.mark.parametrize("tau", [0.005, 0.1])
def test_zero_rows_are_finite_and_get_no_gradient(tau):
    for dtype in DTYPES:
        z = trained_like(12, 24, dtype)
        z[[2, 7]] = 0
        loss, grad, grad_temperature = loss_and_gradients(triton_nt_xent, z, tau)
        assert loss.isfinite() and grad.isfinite().all() and grad_temperature.isfinite()
        assert not grad[[2, 7]].any() and grad.any()


@pytest.mark.parametrize("tau", [0.005, 0.1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [1, 6])
def test_nan_and_inf_make_the_loss_nan(tau, bad, n):
    for dtype in DTYPES:
        z = trained_like(2 * n, 24, dtype)
        z[n, 3] = bad
        loss, grad, _ = loss_and_gradients(triton_nt_xent, z, tau)
        assert loss.isnan() and grad.isnan().any()


def test_rows_of_any_length_give_the_same_loss():
    z = trained_like(12, 24)
    expected = nt_xent(z, 0.1, impl="triton")
    for dtype, lengths in (
        (torch.float32, (1e-15, 1e15)),
        (torch.bfloat16, (1e-15, 1e15)),
        (torch.float16, (1e-3, 100)),
    ):
        for length in lengths:
            scaled = (z * length / 30).to(dtype)
            torch.testing.assert_close(nt_xent(scaled, 0.1, impl="triton"), expected, rtol=0.05, atol=0)
    assert nt_xent(torch.full((4, 8), 1e30), 0.1, impl="triton").isnan()  # too long to square


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_short_to_square_count_as_zero_rows(dtype):
    z = trained_like(12, 24, dtype)
    z[[2, 7]] *= 1e-22
    zeroed = z.index_fill(0, torch.tensor([2, 7]), 0)
    assert z[[2, 7]].all()
    actual, expected = (loss_and_gradients(triton_nt_xent, rows, 0.1) for rows in (z, zeroed))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_a_temperature_on_the_device_is_never_read_by_the_host(monkeypatch, tau):
    z = trained_like(34, 24)
    expected = loss_and_gradients(triton_nt_xent, z, tau)
    monkeypatch.setattr(triton_launch, "_on_host", lambda temperature: False)
    for ours, true in zip(loss_and_gradients(triton_nt_xent, z, tau), expected, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=0)
    assert nt_xent(z, torch.tensor(0.1), impl="triton") == nt_xent(z, 0.1, impl="triton")
    for tau_out_of_range in (0.0, -1.0):
        z_all, temperature = z.requires_grad_(), torch.tensor(tau_out_of_range)
        assert triton_loss.nt_xent_triton(z_all, temperature).isnan()


def test_two_runs_are_bit_identical(tile):
    tile(32, 32, 64, 64)
    z = trained_like(130, 48, torch.bfloat16)
    first, second = (loss_and_gradients(triton_nt_xent, z, 0.1) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_double_backward_is_refused():
    z = trained_like(6, 24).requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(nt_xent(z, 0.1, impl="triton"), z, create_graph=True)


def test_refuses_float64():
    with pytest.raises(ValueError, match="float64"):
        nt_xent(trained_like(6, 24).double(), 0.1, impl="triton")


def test_ops_pass_opcheck():
    z, tau = trained_like(6, 24), torch.tensor(0.1)
    own = (z[:4].contiguous(), tau, "ieee")
    partial_sums, positives = triton_loss.own_negatives(*own)
    torch.library.opcheck(triton_loss.own_negatives, own)
    torch.library.opcheck(triton_loss.own_losses, own)
    torch.library.opcheck(triton_loss.all_losses, (torch.cat([z[:4], z[:4]]), tau, partial_sums, positives, "ieee"))
    losses, lse, q, g = triton_loss.own_losses(z, tau, "ieee")
    inputs = (z.clone().requires_grad_(), tau.clone().requires_grad_(), z, losses, lse, q, g, "ieee")
    torch.library.opcheck(triton_loss.mean_loss, inputs)
    torch.library.opcheck(triton_loss.gradient, (torch.tensor(1.0), tau, z, lse, q, g, "ieee"))


def test_stands_in_one_graph_of_torch_compile():
    z = trained_like(12, 24)

    def step(z, temperature):
        return nt_xent(2 * z, temperature, impl="triton")

    expected = loss_and_gradients(step, z, 0.1)
    actual = loss_and_gradients(torch.compile(step, backend="aot_eager", fullgraph=True), z, 0.1)
    for ours, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, true)


RANK_CASES = [(torch.float32, 0.1), (torch.float16, 0.1), (torch.float32, 0.01)]


def losses_of_rank(rank, world_size, views):
    results = []
    for dtype, tau in RANK_CASES:
        own = views[:, rank::world_size].flatten(0, 1).to(dtype)
        loss, grad, grad_temperature = loss_and_gradients(triton_nt_xent, own, tau)
        for shared in (loss, grad_temperature):
            dist.all_reduce(shared)
        results.append((loss / world_size, grad.unflatten(0, (2, -1)) / world_size, grad_temperature / world_size))
    return results


def test_two_ranks_equal_one_process(tmp_path):
    views = trained_like(44, 24).unflatten(0, (2, -1))  # (2, N, D)
    ranks = run_ranks(2, tmp_path, losses_of_rank, views)
    for (dtype, tau), first, second in zip(RANK_CASES, *ranks, strict=True):
        loss, grad, grad_temperature = loss_and_gradients(triton_nt_xent, views.flatten(0, 1).to(dtype), tau)
        gathered = torch.stack([first[1], second[1]], dim=2).flatten(1, 2).flatten(0, 1)
        assert (gathered - grad).norm() <= max(2 * torch.finfo(dtype).eps, 1e-5) * grad.norm()
        for rank in (first, second):
            torch.testing.assert_close(rank[0], loss, rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(rank[2], grad_temperature, rtol=1e-5, atol=1e-6)
