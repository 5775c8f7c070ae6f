"""benchmarks/paper/paired.py: Student's distribution, intervals of paired differences, Holm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from paper_modules import imported


@pytest.fixture(scope="module")
def paired() -> Iterator[Any]:
    with imported("paired") as modules:
        yield modules.paired


@pytest.mark.parametrize(
    ("level", "dof", "expected"),  # of any table of Student's distribution, two-sided
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 9, 2.262),
        (0.95, 30, 2.042),
        (0.95, 120, 1.980),
        (0.99, 4, 4.604),
        (0.999, 5, 6.869),
        (0.80, 7, 1.415),
    ],
)
def test_quantiles_are_those_of_the_tables(paired, level, dof, expected) -> None:
    assert paired.quantile(level, dof) == pytest.approx(expected, abs=6e-4)
    assert paired.within(paired.quantile(level, dof), dof) == pytest.approx(level, abs=1e-12)


def test_one_degree_of_freedom_is_cauchy_and_many_are_normal(paired) -> None:
    for t in (0.0, 0.5, 1.0, 3.0, 20.0):
        assert paired.within(t, 1) == pytest.approx(2 / math.pi * math.atan(t))
        assert paired.within(t, 100_000) == pytest.approx(math.erf(t / math.sqrt(2)), abs=1e-5)


def test_an_interval_and_a_p_value_say_the_same(paired) -> None:
    """Where an interval ends at zero, p is 0.05."""
    values = [-0.04, -0.05, -0.03, -0.01]
    one = paired.interval(values)
    assert (one.mean, one.count) == (pytest.approx(-0.0325), 4)
    reach = 3.182446 * math.sqrt(sum((v + 0.0325) ** 2 for v in values) / 3) / 2
    assert (one.low, one.high) == (pytest.approx(-0.0325 - reach), pytest.approx(-0.0325 + reach))
    for end in (one.low, one.high):
        assert paired.p_value([value - end for value in values]) == pytest.approx(0.05)
    assert paired.p_value([0.1, -0.1]) == 1.0
    assert paired.p_value([0.0, 0.0]) == 1.0
    assert paired.p_value([0.5, 0.5]) == 0.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # a smaller one behind never lowers a larger
        ([0.04, 0.01, 0.03, 0.005], [0.06, 0.03, 0.06, 0.02]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.01, 1.0, 1.0, 1.0], [0.04, 1.0, 1.0, 1.0]),
        ([], []),
    ],
)
def test_holm_corrects_for_the_number_of_methods(paired, given, expected) -> None:
    assert paired.holm(given) == pytest.approx(expected)
