"""The tuning of a learning rate, as a rule on what was measured so far.

Rates lie on a lattice, base * 2^(n/2). The rule walks by factors of 2 from a start until the best
of them has both neighbours, then looks sqrt(2) to both sides of the best of all; it goes on while
the best is at an edge.

    next_indices({}, start=0)                             # [0, 2, -2]: the start and both sides
    next_indices({-2: 3.7, 0: 3.5, 2: 3.6}, start=0)      # [1, -1]
    next_indices({-2: 3.7, -1: 3.6, 0: 3.5, 1: 3.55, 2: 3.6}, start=0)  # []: 0 is the best
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def rate_at(index: int, base: float) -> float:
    """Return the rate at a place of the lattice, to six digits, so that files can be compared."""
    return float(f"{base * 2 ** (index / 2):.6g}")


def index_of(rate: float, base: float) -> int:
    """Return the place of a rate on the lattice.

    Raises:
        ValueError: where the rate lies beside the lattice.
    """
    index = round(2 * math.log2(rate / base))
    if rate_at(index, base) != rate:
        raise ValueError(f"rate must be {base:g} * 2^(n/2) for a whole n; got {rate:g}")
    return index


def best_index(scores: Mapping[int, float]) -> int:
    """Return the place of the lowest score, the lower rate where two are equal; NaN is infinite."""
    return min(scores, key=lambda n: (math.inf if math.isnan(scores[n]) else scores[n], n))


def next_indices(scores: Mapping[int, float], start: int) -> list[int]:
    """Return the places to measure next; none where the tuning has ended.

    Args:
        scores: the validation loss at each place measured so far, infinite where a run diverged.
        start: where to begin; steps by factors of 2 keep to its parity.
    """
    coarse = {n: score for n, score in scores.items() if (n - start) % 2 == 0}
    # In this order, whichever of several places is measured first: the same places in the end.
    near_start = _lacking(scores, start, start + 2, start - 2)
    if near_start:
        return near_start
    centre, best = best_index(coarse), best_index(scores)
    return (
        _lacking(scores, centre + 2, centre - 2)
        or _lacking(scores, centre + 1, centre - 1)
        or _lacking(scores, best + 1, best - 1)
    )


def _lacking(scores: Mapping[int, float], *places: int) -> list[int]:
    return [n for n in places if n not in scores]
