"""Which chains have their taps moved to the layers that the taps read: decided by measuring.

The search is the C++ library's (`choose_moves` in include/reslora/calibration.h); how far a merged
model is from the adapted one is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._C import ChainView, Fit, MergePlan, choose_moves
from .._C import move_taps as core_move_taps
from ..injection.adapted import Calibrated, Injection
from ..nn.layer import LayerChain
from .batches import NotComparableError
from .distance import distances
from .planning import views_with
from .stand_ins import planned_pair, standing_in


def move_taps(
    model: nn.Module, injection: Injection, batches: list[Any]
) -> tuple[list[str], float, float]:
    """Replace the fits of chains whose moved form is nearer to the model on `batches`.

    Nothing is moved where the model's output is none that can be compared.

    Returns:
        The keys of those chains, and the distance before and after.

    Cost: a forward of every batch for each chain that is linked, and 5 more.
    """
    plain = injection.calibrated
    assert plain is not None

    def stand_in(plan: MergePlan) -> Any:
        return standing_in(list(zip(injection.layers, plan.layers, strict=True)), planned_pair)

    def measure(count: int, plan_of: Callable[[int], MergePlan]) -> list[float]:
        totals, rows = [0.0] * count, 0
        for batch in batches:
            candidates = (stand_in(plan_of(k)) for k in range(count))
            try:
                found, seen, _ = distances(model, candidates, batch, "calibrate")
            except NotComparableError:
                return []
            totals = [total + float(one) for total, one in zip(totals, found, strict=True)]
            rows += seen
        return [total / max(rows, 1) for total in totals]

    with torch.no_grad():
        chosen = choose_moves(views_with(injection, plain), measure)
    if chosen.chains:
        fits = dict(plain.fits)
        for i in chosen.chains:
            own = zip(injection.chains[i].names, chosen.fits[i], strict=True)
            fits |= {name: fit for name, fit in own if fit is not None}
        injection.calibrated = Calibrated(fits, plain.adapter_sum, plain.sums, plain.fits)
    return [injection.chains[i].key for i in chosen.chains], chosen.before, chosen.after


def moved_fits(chain: LayerChain, view: ChainView) -> dict[str, Fit]:
    """Return the fits of a chain with half of what its taps bring moved."""
    return dict(zip(chain.names, core_move_taps(view), strict=True))
