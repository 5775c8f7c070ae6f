"""Paired differences: their mean and its interval, Student's t test, and Holm's correction.

    interval([-0.04, -0.05, -0.03])   # Interval(mean=-0.04, low=-0.0648, high=-0.0152, count=3)
    p_value([-0.04, -0.05, -0.03])    # 0.0202, of no difference
    holm([0.01, 0.04, 0.03])          # [0.03, 0.06, 0.06]

There is no scipy here. Student's distribution for whole degrees of freedom is a finite sum
(Abramowitz and Stegun 26.7.3 and 26.7.4), which is exact.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies with the probability LEVEL."""

    mean: float
    low: float
    high: float
    count: int


def within(t: float, dof: int) -> float:
    """Return P(|T| <= t) for Student's T with so many degrees of freedom."""
    angle = math.atan(t / math.sqrt(dof))
    square = math.cos(angle) ** 2
    is_odd = dof % 2 == 1
    term, total = (math.cos(angle), 0.0) if is_odd else (1.0, 0.0)
    for k in range(2 + is_odd, dof + 1, 2):
        total += term
        term *= square * (k - 1) / k
    if is_odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def quantile(level: float, dof: int) -> float:
    """Return the t for which P(|T| <= t) is the level, by bisection."""
    low, high = 0.0, 1.0
    while within(high, dof) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if within(middle, dof) < level:
            low = middle
        else:
            high = middle
    return high


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least two values with its interval."""
    mean, error = _mean_and_error(values)
    reach = quantile(LEVEL, len(values) - 1) * error
    return Interval(mean, mean - reach, mean + reach, len(values))


def p_value(values: Sequence[float]) -> float:
    """Return the two-sided p value of a mean of zero, for at least two values."""
    mean, error = _mean_and_error(values)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return max(0.0, 1 - within(abs(mean) / error, len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method, in the same order."""
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for place, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, (len(p_values) - place) * p_values[k])
        corrected[k] = min(1.0, largest)
    return corrected


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
