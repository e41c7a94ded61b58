"""Triton kernels in Triton's interpreter, on the CPU: run by test_interpreter.py with TRITON_INTERPRET=1.

Small tiles give several programs, tiles and splits on a small batch. The interpreter multiplies float32 tiles in full
float32 for every `precision`.
"""

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import triton.language as tl
from triton.runtime import interpreter

from bench.loss_launches import launches
from loss import NegativeQueue, nt_xent
from loss.triton import ops, tiles
from loss.triton.tiles import Tile
from tests.loss.cases import check_accuracy, errors, loss_and_gradients, trained_like
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's: log of 0 is intended

_create_dot = interpreter.InterpreterBuilder.create_dot


def _create_dot_with_bfloat16(self, a, b, d, *options):
    # The interpreter of Triton 3.8 stores bfloat16 as 16-bit integers and multiplies those.
    def as_float32(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return _create_dot(self, as_float32(a), as_float32(b), d, *options)


interpreter.InterpreterBuilder.create_dot = _create_dot_with_bfloat16
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def tile(monkeypatch):
    def use(*sizes, programs=16):
        monkeypatch.setattr(tiles, "INTERPRETER_TILE", Tile(*sizes, 1, 1, programs, programs))

    return use


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "tau"), [(1, 24, 0.1), (3, 37, 0.01), (3, 37, 1.0), (35, 48, 0.05), (33, 128, 0.01), (17, 200, 0.02)]
)
def test_error_is_that_of_dense_torch(tile, dtype, n, d, tau):
    tile(32, 32, 256, 256)
    check_accuracy(trained_like(n, d, dtype, seed=2 * n + d), tau, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "tau"), [(5, 37, 0.1), (17, 48, 0.01)])
def test_decoupled_equals_float64_to_rounding(tile, dtype, n, d, tau):
    tile(32, 32, 256, 256)
    found = errors(trained_like(n, d, dtype), tau, "triton", decoupled=True)
    similarity = 8 * 2**-23 / tau  # error of s, in float32
    # weights and dL/dz are rounded to the dtype, by half an ulp each; the loss is not
    for name, allowed in (("loss", 0), ("dL/dz", torch.finfo(dtype).eps), ("dL/dtau", torch.finfo(dtype).eps)):
        norm, error = found[name]
        assert error <= (similarity + allowed) * norm, name


@pytest.mark.parametrize("tau", [0.01, 0.0133, 0.0135, 0.5])
def test_accuracy_on_both_sides_of_the_online_switch(tile, tau):
    tile(32, 32, 64, 64)
    z = trained_like(33, 48, torch.float32)
    z[5] = -z[4]  # cosine -1, the lower end of the range
    # Normalizing two rows and summing their product rounds a cosine near 1 by about 2^-24 each, differently in forward
    # and backward: NumPy, in place of the tensor cores, multiplies tiles of other shapes in another order.
    for true_norm, error in errors(z, tau, "triton").values():
        assert error <= (5e-7 + 4 * 2**-24 / tau) * true_norm


def queue_like(z, sample):
    """A queue of entries like the rows of z, some of the same samples, some not filled."""
    queue = NegativeQueue(len(z) + 20, z.shape[1])
    queue.append(z.float() + torch.randn(z.shape, generator=torch.Generator().manual_seed(1)), sample.flip(0))
    return queue


@pytest.mark.parametrize(
    ("dtype", "tau", "decoupled"),
    [
        (torch.float32, 0.01, True),
        (torch.float32, 0.5, False),
        (torch.bfloat16, 0.05, False),
        (torch.float16, 0.1, True),
    ],
)
def test_a_queue_adds_negatives(tile, dtype, tau, decoupled):
    """At the first temperature the sums of the batch are log-sums, at the second those of the triangle, in integers."""
    tile(16, 16, 64, 64, programs=1)
    z, sample = trained_like(17, 24, dtype), torch.arange(17) // 2
    queue, tau = queue_like(z, sample), torch.tensor(tau).item()
    results = []
    for x, impl in ((z.double(), "reference"), (z, "triton")):
        compute = partial(nt_xent, impl=impl, queue=queue, sample=sample)
        results.append(loss_and_gradients(x, tau, None, compute, decoupled))
    ulp, rounding = 2**-23 / tau, 2 * torch.finfo(dtype).eps * (dtype.itemsize == 2)
    # dL/dtau is a difference of terms up to 1 / tau^2
    bounds = (4 * ulp, 0), (0, 8 * ulp + rounding), (ulp / tau**2, 8 * ulp + rounding)
    for true, ours, (absolute, relative) in zip(*results, bounds, strict=True):
        assert (ours - true).norm() <= absolute + relative * true.norm()


def test_a_larger_batch(tile):
    tile(128, 64, 64, 64)
    check_accuracy(trained_like(129, 64, torch.bfloat16), 0.07, "triton")


@pytest.mark.parametrize("sizes", [(16, 32, 16, 16), (32, 16, 16, 32), (16, 16, 64, 64)])
@pytest.mark.parametrize("programs", [1, 64])  # one split of the columns, and one per tile
def test_every_tile_and_split_agrees(tile, sizes, programs):
    tile(*sizes, programs=programs)
    for z in (trained_like(22, 40, torch.float32), trained_like(32, 64, torch.float32)):  # partial tiles, and EVEN
        check_accuracy(z, 0.1, "triton")
    _, splits = tiles.choose_tile("lse_forward", z, "ieee", 32, 64)
    assert splits == 1 if programs == 1 else splits > 1


@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_the_host_never_reads_a_temperature_on_the_device(monkeypatch, tau):
    z = trained_like(17, 24, torch.float32)
    expected = loss_and_gradients(z, tau, "triton")
    monkeypatch.setattr("loss.triton.temperature.is_on_host", lambda temperature: False)
    monkeypatch.setattr("loss.triton.rows.is_on_host", lambda temperature: False)
    for ours, true in zip(loss_and_gradients(z, tau, "triton"), expected, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=0)
    for invalid in (0.0, -1.0):
        assert ops.nt_xent_triton(z.requires_grad_(), torch.tensor(invalid)).isnan()


def shuffle_programs(monkeypatch, seed):
    """Make the interpreter run the programs of every launch in a random order; returns the indices it runs."""
    builder, random = interpreter.interpreter_builder, np.random.default_rng(seed)
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    waiting, ran = [], []

    def shuffle_grid(*grid):
        set_grid_dim(*grid)
        waiting[:] = random.permutation(list(np.ndindex(*grid))).tolist()

    def run_next(*_):
        ran.append(tuple(waiting.pop()))
        set_grid_idx(*ran[-1])

    monkeypatch.setattr(builder, "set_grid_dim", shuffle_grid)
    monkeypatch.setattr(builder, "set_grid_idx", run_next)
    return ran


@pytest.mark.parametrize(("dtype", "n", "d", "tau"), [(torch.bfloat16, 17, 24, 0.1), (torch.float16, 32, 32, 0.01)])
def test_the_order_of_programs_does_not_change_a_bit(tile, monkeypatch, dtype, n, d, tau):
    tile(16, 16, 16, 16, programs=64)  # several splits of the columns, and of D in the gradient
    z = trained_like(n, d, dtype)
    expected = loss_and_gradients(z, tau, "triton")
    ran = shuffle_programs(monkeypatch, seed=0)
    assert all(map(torch.equal, loss_and_gradients(z, tau, "triton"), expected))
    assert ran != sorted(ran)


@pytest.mark.parametrize(("dtype", "learnable", "extra"), [(torch.bfloat16, False, 0), (torch.float16, True, 2)])
def test_a_pass_launches_five_kernels_and_one_mean(dtype, learnable, extra):
    names = launches(trained_like(4, 16, dtype), torch.tensor(0.1, requires_grad=learnable))
    assert len(names) == 6 + extra, names  # the copy of float16 rows for the backward pass, the sum of dL/dtau


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        nt_xent(trained_like(3, 24), 0.1, impl="triton")


def test_operators_pass_opcheck():
    z, tau = trained_like(3, 24, torch.float32), torch.tensor(0.1)
    own = (z[:4].contiguous(), tau, "ieee")
    log_sums = ops.own_log_sums(*own)
    torch.library.opcheck(ops.own_log_sums, own)
    torch.library.opcheck(ops.own_losses, (*own, True))
    z_all = torch.cat([z[:4], z[:4]])
    torch.library.opcheck(ops.all_losses, (z_all, tau, *log_sums, "ieee", True))
    terms = ops.RowTerms(*ops.own_losses(z, tau, "ieee", True))
    saved = (z, terms.a, terms.b, terms.q, terms.g, "ieee")
    differentiable = (z.clone().requires_grad_(), tau.clone().requires_grad_())
    torch.library.opcheck(ops.mean_loss, (*differentiable, terms.losses, *saved))
    torch.library.opcheck(ops.loss_gradient, (torch.tensor(1.0), tau, *saved))


RANK_CASES = [
    (torch.float32, 0.1, False),
    (torch.float16, 0.1, False),
    (torch.float32, 0.01, True),
]  # the last one with a queue


def losses_of_rank(rank, world_size, views, queue):
    results = []
    tiles.INTERPRETER_TILE = Tile(16, 16, 64, 64, 1, 1, 1, 1)  # the own columns on the triangle, except at tau 0.01
    for dtype, tau, decoupled in RANK_CASES:
        own, sample = views[:, rank::world_size].flatten(0, 1).to(dtype), torch.arange(22)[rank::world_size]
        compute = partial(nt_xent, impl="triton", queue=queue, sample=sample) if tau == 0.01 else None
        loss, grad, grad_temperature = loss_and_gradients(own, tau, "triton", compute, decoupled)
        for shared in (loss, grad_temperature):
            dist.all_reduce(shared)
        results.append((loss / world_size, grad.unflatten(0, (2, -1)) / world_size, grad_temperature / world_size))
    return results


def test_two_ranks_equal_one_process(tmp_path):
    views = trained_like(22, 24, torch.float32).unflatten(0, (2, -1))  # (2, N, D)
    queue = queue_like(views.flatten(0, 1), torch.arange(22))
    ranks = run_ranks(2, tmp_path, losses_of_rank, views, queue)
    for (dtype, tau, decoupled), first, second in zip(RANK_CASES, *ranks, strict=True):
        z = views.flatten(0, 1).to(dtype)
        compute = partial(nt_xent, impl="triton", queue=queue, sample=torch.arange(22)) if tau == 0.01 else None
        loss, grad, grad_temperature = loss_and_gradients(z, tau, "triton", compute, decoupled)
        gathered = torch.stack([first[1], second[1]], dim=2).flatten(1, 2).flatten(0, 1)
        assert (gathered - grad).norm() <= max(2 * torch.finfo(dtype).eps, 1e-5) * grad.norm()
        for rank in (first, second):
            torch.testing.assert_close(rank[0], loss, rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(rank[2], grad_temperature, rtol=1e-5, atol=1e-6)
