"""The loss forward on the triangle in Triton's interpreter: run by test_interpreter.py with TRITON_INTERPRET=1."""

import math

import pytest
import torch

from bench.loss_launches import launches
from loss import nt_xent
from loss.triton import ops
from loss.triton.lse_forward import lse_forward
from loss.triton.lse_triangle import lse_triangle, triangle_places
from loss.triton.rows import scale_rows
from loss.triton.tiles import Chip
from tests.loss.cases import trained_like
from tests.loss.triton.interpreted import shuffle_programs, tile  # noqa: F401, a fixture

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's: log of 0 is intended


def integer_sums(z, tau, places=None):
    """Sums (2n,) over the negatives, times 2^places."""
    n, temperature = len(z) // 2, torch.tensor(tau)
    y, g, _, sums = scale_rows(z, temperature, n, "ieee", "lse_triangle")
    places = triangle_places(z, temperature, n, "ieee") if places is None else places
    lse_triangle(y, g, sums, places, n, "ieee")
    return sums, places


def log_sum_errors(z, tau):
    """Largest error of a row's log-sum, in base 2 against float64: on the triangle, and what it may be.

    That is the error on the square, the bound of `triangle_places`, and roundings of the sum itself.
    """
    n = len(z) // 2
    sums, places = integer_sums(z, tau)
    y, g, _, _ = scale_rows(z, torch.tensor(tau), n, "ieee", "lse_forward")
    square = lse_forward(y, g, torch.tensor(tau), n, "ieee", own=True)
    unit = torch.nn.functional.normalize(z.double(), dim=1)
    t = unit @ unit.T / torch.tensor(tau).double() / math.log(2)
    rows = torch.arange(2 * n)
    t[rows, rows] = t[rows, rows.roll(n)] = -math.inf
    truth = t.exp2().sum(1).log2()
    triangle = sums.double().log2() - places
    on_square = (square.double().exp2().sum(0).log2() - truth).abs().max()
    limit = on_square + 2**-24 / (tau * math.log(2)) + 4 * torch.finfo(torch.float32).eps
    return (triangle - truth).abs().max(), limit


# one split of the columns, and several
@pytest.mark.parametrize(("sizes", "programs"), [((16, 16, 16, 16), 1), ((64, 16, 16, 16), 12)])
def test_every_pair_of_negatives_counts_once(tile, sizes, programs):  # noqa: F811
    tile(*sizes, programs=programs)
    for n in (1, 33, 64):
        sums, _ = integer_sums(torch.zeros(2 * n, 16), 0.1, places=20)  # zero rows: 2^t = 1 for every pair
        assert sums.tolist() == [(2 * n - 2) << 20] * (2 * n)


@pytest.mark.parametrize(
    ("n", "d", "dtype", "tau"),
    [
        (65, 48, torch.float32, 0.08),
        (64, 64, torch.bfloat16, 0.1),
        (33, 200, torch.float32, 1),
    ],
)
def test_log_sums_are_those_of_the_square(tile, n, d, dtype, tau):  # noqa: F811
    tile(32, 16, 64, 64, programs=2)
    z = trained_like(n, d, dtype)
    z[3] = -z[2]  # cosine -1, the lower end of the range
    error, limit = log_sum_errors(z, tau)
    assert error <= limit


def lowest_temperature(z):
    taus = [tau / 10000 for tau in range(500, 1500)]
    return next(tau for tau in taus if triangle_places(z, torch.tensor(tau), len(z) // 2, "ieee") is not None)


def test_smallest_and_largest_sums_at_the_lowest_temperature(tile):  # noqa: F811
    """A row opposite to all others, whose sums are as large as they can be."""
    tile(32, 32, 16, 16, programs=1)
    z = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).repeat(130, 1)
    z[0] *= -1
    tau = lowest_temperature(z)
    assert 0.07 < tau < 0.08
    sums, _ = integer_sums(z, tau)
    assert sums.min() > 0 and sums.max() > 2**61
    error, limit = log_sum_errors(z, tau)
    assert error <= limit


def test_the_order_of_programs_does_not_change_a_bit(tile, monkeypatch):  # noqa: F811
    tile(32, 16, 16, 16, programs=12)
    z = trained_like(40, 16, torch.float32)
    expected, _ = integer_sums(z, 0.1)
    ran = shuffle_programs(monkeypatch, seed=0)
    assert torch.equal(integer_sums(z, 0.1)[0], expected)
    assert ran != sorted(ran)


def test_where_the_triangle_is_used(tile, monkeypatch):  # noqa: F811
    tile(32, 16, 16, 16, programs=16)
    z = torch.empty(130, 16)
    places = {
        tau: triangle_places(z, torch.tensor(tau), 65, "ieee") for tau in (0.005, 0.07, 0.08, 0.1, 1000, math.nan)
    }
    assert [tau for tau, found in places.items() if found is not None] == [0.08, 0.1, 1000]
    assert triangle_places(z, torch.tensor(0.1), 32, "ieee") is None  # 2 x 4 tiles: 16 programs take them at once
    tile(16, 32, 16, 16, programs=1)
    assert triangle_places(z, torch.tensor(0.1), 65, "ieee") is None
    tile(32, 16, 16, 16, programs=16)
    with monkeypatch.context() as patch:
        patch.setattr("loss.triton.lse_triangle.chip", lambda device: Chip("sm_90", 132, tensor_memory=True))
        assert triangle_places(z, torch.tensor(0.1), 65, "ieee") is None
    monkeypatch.setattr("loss.triton.temperature.is_on_host", lambda temperature: False)
    assert triangle_places(z, torch.tensor(0.1), 65, "ieee") is None


def test_the_triangle_needs_no_further_launch(tile):  # noqa: F811
    tile(16, 16, 16, 16, programs=1)
    names = launches(trained_like(8, 16, torch.bfloat16), torch.tensor(0.1))
    assert "lse_triangle_kernel" in names and "lse_forward_kernel" not in names
    assert len(names) == 6, names


def test_a_row_without_direction_makes_the_loss_nan(tile):  # noqa: F811
    """No integer is NaN: the row's positive carries it."""
    tile(16, 16, 16, 16, programs=1)
    z = trained_like(8, 16, torch.float32)
    z[5, 3] = math.nan
    assert triangle_places(z, torch.tensor(0.1), 8, "ieee") and nt_xent(z, 0.1, impl="triton").isnan()


def test_operator_passes_opcheck(tile):  # noqa: F811
    tile(16, 16, 16, 16, programs=1)
    torch.library.opcheck(ops.own_log_sums, (trained_like(8, 24, torch.float32), torch.tensor(0.1), "ieee"))
