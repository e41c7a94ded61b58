"""NT-Xent, LARS and the learning rate against values derived by hand from the formulas of SimCLR's official code.

The formulas are those of github.com/google-research/simclr (objective.py, lars_optimizer.py, model_util.py; the same
in its tf2 folder). The inputs are chosen so that every result consists of fractions, square roots and logarithms. Each
derivation is written out and its literals are the result; where pencil and paper are not enough, the arithmetic is
repeated in `decimal` with 50 digits, without any of the code under test.
"""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import nn

from engine.optim import OptimConfig, create_optimizer, parameter_groups
from engine.schedule import create_schedule, peak_learning_rate, warmup_cosine
from loss import nt_xent
from presets import imagenet

PI = Decimal("3.14159265358979323846264338327950288419716939937511")
# Compared values take fewer than fifty float64 operations on numbers around 1, each exact to half an ulp.
ROUNDING = 50 * 2**-53


@pytest.fixture(autouse=True)
def fifty_digits():
    with localcontext(prec=50):
        yield


# ---- NT-Xent
#
# Two images, A and B; their views a, b (first) and a', b' (second) lie in the plane at
#
#     a 0°    b 120°    a' 60°    b' 240°
#
# so that all cosines are those of 60°, 120° or 180°:
#
#     a.a' = 1/2    a.b = -1/2    a.b' = -1/2    a'.b = 1/2    a'.b' = -1    b.b' = -1/2
#
# With tau = 1 / ln 4, exp(cos / tau) = 4^cos is 2 for 1/2, 1/2 for -1/2 and 1/4 for -1. The row losses,
# -log(positive / (sum over all others)):
#
#     a :  positive a' 2     negatives b 1/2, b' 1/2     -ln(2 / 3)            = ln(3/2)
#     a':  positive a  2     negatives b 2,   b' 1/4     -ln(2 / (17/4))       = ln(17/8)
#     b :  positive b' 1/2   negatives a 1/2, a' 2       -ln((1/2) / 3)        = ln 6
#     b':  positive b  1/2   negatives a 1/2, a' 1/4     -ln((1/2) / (5/4))    = ln(5/2)
#
# and their mean is ln(3/2 * 17/8 * 6 * 5/2) / 4 = ln(765/16) / 4.
LOSS = 0.9668217778966887

# The official loss is the mean over the first views plus the mean over the second, (ln(3/2) + ln 6) / 2 +
# (ln(17/8) + ln(5/2)) / 2 = ln(765/16) / 2: twice ours, which is the paper's mean over all 2N rows (Algorithm 1).
OFFICIAL_LOSS = 1.9336435557933773

# Rotating one vector by dt changes its cosines with the others. W_ij = d(row loss i)/d(s_ij), with s = cos / tau, is
# the softmax of row i, minus 1 at its positive:
#
#     a :  a' 2/3 - 1 = -1/3        b 1/6     b' 1/6
#     a':  a  8/17 - 1 = -9/17      b 8/17    b' 1/17
#     b :  b' 1/6 - 1 = -5/6        a 1/6     a' 2/3
#     b':  b  2/5 - 1 = -3/5        a 2/5     a' 1/5
#
# The cosine of a pair depends on both its ends: G_ij = W_ij + W_ji
#
#     aa' -44/51    ab 1/3    ab' 17/30    a'b 58/51    a'b' 22/85    bb' -43/30
#
# and d cos(t_i - t_j)/dt_i = -sin(t_i - t_j) is sqrt(3)/2 times +1, -1 or 0:
#
#     a :  a' +1   b  +1   b' -1       -44/51 + 1/3 - 17/30       =  -559/510
#     a':  a  -1   b  +1   b'  0        44/51 + 58/51             =     2
#     b :  a  -1   a' -1   b' +1        -1/3 - 58/51 - 43/30      = -1481/510
#     b':  a  +1   a'  0   b  -1        17/30 + 43/30             =     2
#
# (their sum is 0: rotating all of them changes nothing). dL/dt_i is this times sqrt(3)/2 * ln 4 / 4 = sqrt(3) ln 2 / 4.
ROTATIONS = [-0.32897866118813507, -0.8715874726648086, 0.6002830669264718, 0.6002830669264718]  # a, b, a', b'

# dL/dtau = -1/(4 tau^2) sum over pairs of G cos, with 1 / tau^2 = (ln 4)^2:
#     sum = (-44/51 - 1/3 - 17/30 + 58/51 + 43/30) / 2 - 22/85 = 206/510 - 132/510 = 37/255
SLOPE_IN_TAU = -0.06971279025479786


def four_views():
    """z (4, 2): a, b, a', b', of unequal lengths; unit tangents (4, 2), along which they rotate; lengths (4, 1)."""
    half_root_3 = math.sqrt(3) / 2
    units = torch.tensor([[1, 0], [-0.5, half_root_3], [0.5, half_root_3], [-0.5, -half_root_3]], dtype=torch.float64)
    lengths = torch.tensor([[2.0], [0.5], [1.0], [4.0]], dtype=torch.float64)
    tangents = torch.stack([-units[:, 1], units[:, 0]], dim=1)
    return units * lengths, tangents, lengths


def test_literals_of_nt_xent_equal_their_closed_forms():
    assert float((Decimal(765) / 16).ln() / 4) == LOSS
    assert float((Decimal(765) / 16).ln() / 2) == OFFICIAL_LOSS
    unit = Decimal(3).sqrt() * Decimal(2).ln() / 4
    rotations = [unit * Decimal(-559) / 510, unit * Decimal(-1481) / 510, unit * 2, unit * 2]
    assert [float(rotation) for rotation in rotations] == ROTATIONS
    assert float(-(Decimal(4).ln() ** 2) * 37 / (4 * 255)) == SLOPE_IN_TAU


@pytest.mark.parametrize(("impl", "rows_at_once"), [("reference", 4), ("blockwise", 4), ("blockwise", 1), ("auto", 4)])
def test_nt_xent(impl, rows_at_once, monkeypatch):
    monkeypatch.setattr("loss.cpu.blockwise.BAND_ROWS", rows_at_once)
    monkeypatch.setattr("loss.cpu.blockwise.BLOCK_COLUMNS", rows_at_once)
    if impl == "blockwise":  # "auto" is in one pass
        monkeypatch.setattr("loss.cpu.one_pass.MAX_ROWS", 0)
    z, tangents, lengths = four_views()
    z.requires_grad_()
    tau = torch.tensor(1 / math.log(4), dtype=torch.float64, requires_grad=True)
    loss = nt_xent(z, tau, impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(LOSS, rel=ROUNDING)
    assert 2 * loss.item() == pytest.approx(OFFICIAL_LOSS, rel=ROUNDING)
    # a vector of length r rotates by dt when it moves r dt along its tangent; its length does not change the loss
    expected = torch.tensor(ROTATIONS, dtype=torch.float64)[:, None] * tangents / lengths
    torch.testing.assert_close(z.grad, expected, rtol=ROUNDING, atol=ROUNDING)
    assert tau.grad.item() == pytest.approx(SLOPE_IN_TAU, rel=ROUNDING)


# ---- LARS
#
# A linear layer 2 -> 1: its weight w decays and adapts, its bias b does neither. Officially, with lr inside momentum:
#
#     g <- g + decay w      r = 0.001 |w| / |g|      m <- 0.9 m + lr r g      w <- w - m
#
# Learning rates in the hundreds move the weight far enough to reach norms that are exact decimals.
#
# lr 750   w (3, 4), |w| 5               g (-4, 3), |g| 5          r 0.001       lr r g = (-3, 2.25)
#          m = (-3, 2.25)                                          w = (6, 1.75)
# lr 1000  |w| = 1.25 * |(4.8, 1.4)| = 1.25 * 5 = 6.25
#                                        g (0, 2), |g| 2           r 0.003125    lr r g = (0, 6.25)
#          m = (-2.7, 2.025) + (0, 6.25) = (-2.7, 8.275)           w = (8.7, -6.525)
# lr 100   |w| = 2.175 * |(4, -3)| = 10.875
#                                        g (0.4, 0.3), |g| 0.5     r 0.02175     lr r g = (0.87, 0.6525)
#          m = (-2.43, 7.4475) + (0.87, 0.6525) = (-1.56, 8.1)     w = (10.26, -14.625)
# lr 200   |w| = 0.045 * |(228, -325)| = 0.045 * 397 = 17.865
#                                        g (6, -8), |g| 10         r 0.0017865   lr r g = (2.1438, -2.8584)
#          m = (-1.404, 7.29) + (2.1438, -2.8584)                  w = (9.5202, -19.0566)
#            = (0.7398, 4.4316)
#
# These g include decay. With decay 1e-4, a gradient reduced by 1e-4 w therefore takes the same path.
RATES = ["750", "1000", "100", "200"]
GRADIENTS = {
    "0": [("-4", "3"), ("0", "2"), ("0.4", "0.3"), ("6", "-8")],
    "1e-4": [("-4.0003", "2.9996"), ("-0.0006", "1.999825"), ("0.39913", "0.3006525"), ("5.998974", "-7.9985375")],
}
WEIGHTS = [(6, 1.75), (8.7, -6.525), (10.26, -14.625), (9.5202, -19.0566)]
MOMENTA = [(-3, 2.25), (-2.7, 8.275), (-1.56, 8.1), (0.7398, 4.4316)]
# The bias starts at 1 and has m <- 0.9 m + lr g only:
#     m = 0.75                         b = 0.25
#     m = 0.675 - 2 = -1.325           b = 1.575
#     m = -1.1925 + 1 = -0.1925        b = 1.7675
#     m = -0.17325 + 0                 b = 1.94075
BIAS_GRADIENTS = [0.001, -0.002, 0.01, 0.0]
BIASES = [0.25, 1.575, 1.7675, 1.94075]

# Three common mistakes in LARS leave the path, the first two with decay 0:
#     no ratio where there is no decay: w = (3, 4) - 750 (-4, 3) = (3003, -2246) after the first step
#     rate outside the momentum, m <- 0.9 m + r g and w <- w - lr m: the first step is the same, because m is 0;
#         then m = 0.9 (-0.004, 0.003) + (0, 0.00625) = (-0.0036, 0.00895) and w = (6, 1.75) - 1000 m = (9.6, -7.2)
#     ratio before decay, with decay: in the second step |g| is that of (-0.0006, 1.999825), 1.99982509 instead of 2
MISTAKES = [("no ratio without decay", "0"), ("rate outside the momentum", "0"), ("ratio before decay", "1e-4")]


def lars_in_decimals(decay: str, mistake: str = "") -> list[list[Decimal]]:
    """The weight after every step with 50 digits, optionally with one of the mistakes."""
    w, m, path = [Decimal(3), Decimal(4)], [Decimal(0), Decimal(0)], []
    for lr, raw in zip(RATES, GRADIENTS[decay], strict=True):
        lr, raw = Decimal(lr), [Decimal(x) for x in raw]
        g = [x + Decimal(decay) * y for x, y in zip(raw, w, strict=True)]
        r = Decimal("0.001") * norm(w) / norm(raw if mistake == "ratio before decay" else g)
        if mistake == "no ratio without decay":
            r = 1
        inside, outside = (1, lr) if mistake == "rate outside the momentum" else (lr, 1)
        m = [Decimal("0.9") * x + inside * r * y for x, y in zip(m, g, strict=True)]
        w = [x - outside * y for x, y in zip(w, m, strict=True)]
        path.append(w)
    return path


def norm(pair: list[Decimal]) -> Decimal:
    return (pair[0] ** 2 + pair[1] ** 2).sqrt()


def distance(path: list[list[Decimal]]) -> float:
    """Largest relative difference to the golden weights."""
    pairs = [
        (x, Decimal(str(y))) for w, golden in zip(path, WEIGHTS, strict=True) for x, y in zip(w, golden, strict=True)
    ]
    return float(max(abs(x / y - 1) for x, y in pairs))


@pytest.mark.parametrize("decay", GRADIENTS)
def test_literals_of_lars_follow_the_formulas(decay):
    assert distance(lars_in_decimals(decay)) == 0


@pytest.mark.parametrize(("mistake", "decay"), MISTAKES)
def test_common_mistakes_leave_the_path_of_lars(mistake, decay):
    path = lars_in_decimals(decay, mistake)
    assert distance(path) > 1e6 * ROUNDING
    if mistake == "no ratio without decay":
        assert path[0] == [3003, -2246]
    if mistake == "rate outside the momentum":
        assert path[:2] == [[Decimal(6), Decimal("1.75")], [Decimal("9.6"), Decimal("-7.2")]]


@pytest.mark.parametrize("decay", GRADIENTS)
def test_lars(decay):
    layer = nn.Linear(2, 1, dtype=torch.float64)
    layer.weight.data = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    layer.bias.data = torch.tensor([1.0], dtype=torch.float64)
    optimizer = create_optimizer(OptimConfig("lars"), parameter_groups([layer], float(decay)), lr=0.0)
    for step, lr in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        layer.weight.grad = torch.tensor([[float(x) for x in GRADIENTS[decay][step]]], dtype=torch.float64)
        layer.bias.grad = torch.tensor([BIAS_GRADIENTS[step]], dtype=torch.float64)
        optimizer.step()
        momentum = optimizer.state[layer.weight]["momentum_buffer"]
        assert layer.weight[0].tolist() == pytest.approx(WEIGHTS[step], rel=ROUNDING)
        assert momentum[0].tolist() == pytest.approx(MOMENTA[step], rel=ROUNDING)
        assert layer.bias.item() == pytest.approx(BIASES[step], rel=ROUNDING)


# ---- the learning rate
#
# Official settings for ImageNet: 1,281,167 images, batch 4096, 100 epochs, 10 of them warm-up, 0.3 * 4096 / 256 = 4.8.
# The official code counts over the whole run, through the ends of epochs:
#
#     warm-up steps   10 * 1281167 // 4096      =  3127     (4096 * 3127 = 12,808,192, rest 3,478)
#     all steps       100 * 1281167 // 4096 + 1 = 31279     (4096 * 31278 = 128,114,688, rest 2,012)
#
# then 4.8 s / 3127 before step 3127, and from it 2.4 (1 + cos(180° (s - 3127) / 28152)). At a third, a half and two
# thirds of these 28152 = 3 * 9384 steps the angle is 60°, 90°, 120°, the cosine 1/2, 0, -1/2. In the last step it is
# 180° - 180°/28152, and 1 + cos = 2 sin^2(90°/28152). The first step has rate 0 in both implementations.
#
# Ours differs only in the number of steps: every epoch drops the images that do not fill a batch (1281167 =
# 312 * 4096 + 3215) and shuffles again, so there are 312 * 100 = 31200 steps, 312 * 10 = 3120 of them warm-up: 0.25 %
# fewer. Warm-up takes at most a tenth of the run, which does not shorten it at 100 epochs.
OFFICIAL = {
    0: 0.0,
    1563: 2.399232491205628,  # half the warm-up: 4.8 * 1563 / 3127
    3127: 4.8,
    12511: 3.6,
    17203: 2.4,
    21895: 1.2,
    31278: 1.4943849438644432e-08,
    31279: 0.0,
}
OURS = {0: 0.0, 1560: 2.4, 3120: 4.8, 12480: 3.6, 17160: 2.4, 21840: 1.2, 31199: 1.5020582814051448e-08, 31200: 0.0}
# 1 + cos cancels towards the end, which leaves the rounding of the cosine and of its argument, times 2.4
RATE_ROUNDING = 4.8 * 4 * 2**-53


def last_rate(cosine_steps: int) -> float:
    """4.8 sin^2(x) at x = pi / (2 cosine_steps), by the series x^2 - x^4 / 3; the next term is 4e-19 of it."""
    x = PI / (2 * cosine_steps)
    return float(Decimal("4.8") * (x**2 - x**4 / 3))


def test_literals_of_the_learning_rate():
    assert (10 * 1_281_167 // 4096, 100 * 1_281_167 // 4096 + 1) == (3127, 31279)
    assert (1_281_167 // 4096 * 10, 1_281_167 // 4096 * 100) == (3120, 31200)
    assert float(Decimal("4.8") * 1563 / 3127) == OFFICIAL[1563]
    assert last_rate(31279 - 3127) == OFFICIAL[31278]
    assert last_rate(31200 - 3120) == OURS[31199]


@pytest.mark.parametrize(("step", "rate"), OFFICIAL.items())
def test_learning_rate_at_the_official_steps(step, rate):
    peak = peak_learning_rate(0.3, 4096, "linear")
    assert warmup_cosine(step, 3127, 31279, peak) == pytest.approx(rate, rel=0, abs=RATE_ROUNDING)


@pytest.mark.parametrize(("step", "rate"), OURS.items())
def test_learning_rate_of_the_imagenet_preset(step, rate):
    schedule = create_schedule(imagenet().optim, 4096, epochs=100, steps_per_epoch=1_281_167 // 4096)
    assert schedule(step) == pytest.approx(rate, rel=0, abs=RATE_ROUNDING)


@pytest.mark.parametrize(
    ("base", "batch_size", "scaling", "peak"),
    [
        (0.3, 4096, "linear", 4.8),  # 0.3 * 16
        (0.3, 256, "linear", 0.3),
        (0.05, 4096, "linear", 0.8),  # fine-tuning, 0.05 * 16
        (0.075, 4096, "sqrt", 4.8),  # 0.075 * 64
        (0.075, 1024, "sqrt", 2.4),  # 0.075 * 32
        (0.075, 2048, "sqrt", 3.394112549695428),  # 0.075 * 32 sqrt(2) = 2.4 sqrt(2)
        (0.005, 1024, "sqrt", 0.16),  # fine-tuning of the second paper, 0.005 * 32
    ],
)
def test_scaling_with_the_batch(base, batch_size, scaling, peak):
    assert peak_learning_rate(base, batch_size, scaling) == pytest.approx(peak, rel=4 * 2**-53)
