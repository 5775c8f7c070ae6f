"""Which chains have their taps moved to the layers that the taps read: decided by measuring.

Where layers add to one stream (o_proj, down_proj), half of a tap's term fits better at the layer
whose input it reads (`move_taps` in include/reslora/regression.h); elsewhere it does harm. What a
chain feeds is not to be seen from its layers, so each is tried on a few batches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .._C import ChainView, Fit
from .._C import move_taps as core_move_taps
from ..injection.adapted import Calibrated, Injection
from ..nn.layer import LayerChain
from .distance import distance
from .planning import chain_views, make_plan
from .stand_ins import plain_lora, standing_in

SHARE = 0.5


def move_taps(
    model: nn.Module, injection: Injection, batches: list[Any]
) -> tuple[list[str], float, float]:
    """Replace the fits of chains whose moved form is nearer to the model on `batches`.

    Nothing is moved where the model's output is none that can be compared.

    Returns:
        The keys of those chains, and the distance before and after.

    Cost: 2 forwards of every batch for each chain that is linked, and 4 more.
    """
    plain = injection.calibrated
    assert plain is not None

    def measured(fits: dict[str, Fit]) -> float:
        injection.calibrated = Calibrated(fits, plain.adapter_sum, plain.sums)
        plan = make_plan(injection, "lsq", "calibrate", use_affine=False)
        planned = list(zip(injection.layers, plan.layers, strict=True))
        total, rows = 0.0, 0
        for batch in batches:
            stand_in = standing_in(planned, lambda layer, p: plain_lora(layer, p.A, p.B, 1.0))
            one, count, _ = distance(model, stand_in, batch, "calibrate")
            total, rows = total + float(one), rows + count
        return total / max(rows, 1)

    best, moved, start, least = plain.fits, {}, 0.0, 0.0
    views = chain_views(injection)
    try:
        with torch.no_grad():
            first = measured(plain.fits)
            for chain, view in zip(injection.chains, views, strict=True):
                if chain.merges_exactly or not math.isfinite(first):
                    continue
                fits = moved_fits(chain, view)
                if measured(plain.fits | fits) < first:
                    moved[chain.key] = fits
            together = dict(plain.fits)
            for fits in moved.values():
                together |= fits
            if moved and (last := measured(together)) < first:
                best, start, least = together, first, last
    except ValueError:  # outputs that cannot be compared
        best = plain.fits
    finally:
        injection.calibrated = Calibrated(best, plain.adapter_sum, plain.sums)
    if best is plain.fits:
        return [], 0.0, 0.0
    injection.calibrated.plain = plain.fits
    return list(moved), start, least


def moved_fits(chain: LayerChain, view: ChainView) -> dict[str, Fit]:
    """Return the fits of a chain with half of what its taps bring moved."""
    return dict(zip(chain.names, core_move_taps(view, SHARE), strict=True))
