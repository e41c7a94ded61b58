"""How far a figure can be trusted: over seeds, and over test samples."""

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev


def mean_and_half_width(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Mean over seeds, and half the width of its Student-t interval: t_{level, n - 1} s / sqrt(n).

    s is the standard deviation with n - 1 in its denominator. One value has no interval: None.
    """
    n = len(values)
    if n < 2:
        return values[0], None
    return mean(values), student_t(level, n - 1) * stdev(values) / math.sqrt(n)


def wilson(right: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share of `total` independent samples (Wilson 1927): what another test set of that size could say.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with p = right / total, n = total and z the
    two-sided normal quantile.
    """
    z, p = NormalDist().inv_cdf((1 + level) / 2), right / total
    center = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2)
    low, high = (center - half) / (1 + z * z / total), (center + half) / (1 + z * z / total)
    return (low if right else 0.0), (high if right < total else 1.0)  # at the ends exactly, without rounding


def student_t(level: float, degrees: int) -> float:
    """The t with P(|T| < t) = level, by bisection."""
    low, high = 0.0, 1.0
    while student_t_within(high, degrees) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_within(middle, degrees) < level else (low, middle)
    return high


def student_t_within(t: float, degrees: int) -> float:
    """P(|T| < t) for a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(odd, degrees - 1, 2):  # the exponent of the cosine in this term
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
