"""The one place where reslora's dispatcher ops are named.

``adapt`` evaluates one adapted layer; what to pass for each shortcut is the wiring of a chain
(``include/reslora/chain.h``), its semantics are in ``include/reslora/ops.h``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adapt(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_out: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    taps: Sequence[Tensor] = (),
    *,
    dropout: float = 0.0,
    bits: Tensor | None = None,
    keep_tap: bool = False,
    norms: Tensor | None = None,
    norm_count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluate one adapted layer: the base product plus the low-rank terms and taps.

    Args:
        x: [..., in], the layer's input.
        weight: [out, in] frozen, or None where `base_out` is given.
        bias: [out] frozen, or None.
        base_out: [..., out], the finished output of a black-box base layer.
        A: each [r_k, in]; as many as `B`, or one more whose product is the tap.
        B: each [out, r_k].
        scaling: one factor for each `B`.
        taps: each [..., R], added to what enters `B`.
        dropout: probability that an element of x is dropped before `A`.
        bits: uint8 [T, ceil(in/8)], the dropout mask; drawn where absent.
        keep_tap: return the own product as the tap.
        norms: fp32 [2, N], ring of norms that is written.
        norm_count: int64 [1], how many entries were ever written; changed.

    Returns:
        y [..., out]; s [..., R], what entered `B`; the tap [..., r] or an empty tensor; the drawn
        bits or an empty tensor.
    """
    frozen, options = (weight, bias, base_out), (dropout, bits, keep_tap, norms is not None)
    y, s, tap, drawn, measured = torch.ops.reslora.adapt.default(
        x, *frozen, A, B, scaling, taps, *options
    )
    if norms is not None and norm_count is not None:
        torch.ops.reslora.record_norms.default(measured, norms, norm_count)
    return y, s, tap, drawn
