"""The one place where reslora's dispatcher ops are named.

``adapt`` evaluates adapted layers that read the same x; what to pass for each shortcut is the
wiring of a chain (``include/reslora/chain.h``), its semantics are in ``include/reslora/ops.h``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Member(NamedTuple):
    """One layer of a call of `adapt`, as the op takes it; made by `member`."""

    bases: list[Tensor]
    layout: tuple[int, int, int, int, int]  # kind of base, number of A, B and taps, keep_tap
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    scaling: Sequence[float]
    taps: Sequence[Tensor]


def member(
    weight: Tensor | None,
    bias: Tensor | None,
    base_out: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    taps: Sequence[Tensor] = (),
    keep_tap: bool = False,
) -> Member:
    """Describe a layer to `adapt`.

    Args:
        weight: [out, in] frozen, or None where `base_out` is given.
        bias: [out] frozen, or None.
        base_out: [..., out], the finished output of a black-box base layer.
        A: each [r_k, in]; as many as `B`, or one more whose product is the tap.
        B: each [out, r_k].
        scaling: one factor for each `B`.
        taps: each [..., R], added to what enters `B`.
        keep_tap: return the own product as the tap.
    """
    if base_out is not None:
        if weight is not None or bias is not None:
            raise ValueError("[adapt] pass either weight or base_out; got both")
        bases, kind = [base_out], 2
    elif weight is None:
        raise ValueError("[adapt] pass either weight or base_out; got neither")
    elif bias is None:
        bases, kind = [weight], 0
    else:
        bases, kind = [weight, bias], 1
    return Member(bases, (kind, len(A), len(B), len(taps), int(keep_tap)), A, B, scaling, taps)


def adapt(
    x: Tensor,
    members: Sequence[Member],
    *,
    dropout: float = 0.0,
    bits: Tensor | None = None,
    want_norms: bool = False,
) -> list[Tensor]:
    """Evaluate layers that read x: base products plus low-rank terms and taps.

    Args:
        x: [..., in].
        members: the layers; more than one share the down-projection, its mask and the sum in dx.
        dropout: probability that an element of x is dropped before `A`.
        bits: uint8 [T, ceil(in/8)], the dropout mask; drawn where absent.
        want_norms: return norms.

    Returns:
        For each member y [..., out], s [..., R] (what entered `B`) and the tap [..., r] or an empty
        tensor; then the drawn bits or an empty tensor; then fp32 [2 per member], |x|_F and the norm
        of the own product, or an empty tensor.

    Raises:
        ValueError: where shapes, dtypes or devices do not fit together.
    """
    lists: Iterable[Sequence[Any]] = members[0]
    if len(members) > 1:
        lists = [[item for own in column for item in own] for column in zip(*members, strict=True)]
    return torch.ops.reslora.adapt.default(x, *lists, dropout, bits, want_norms)


def record_norms(norms: Tensor, ring: Tensor, count: Tensor) -> None:
    """Write two norms of `adapt` into the next column of ring [2, N]; count [1] grows by one."""
    torch.ops.reslora.record_norms.default(norms, ring, count)


def record_products(s: Tensor, taps: Sequence[Tensor], products: Tensor, decay: float) -> None:
    """Add the products of what enters B and of the own product to sums [2r, 2r], which decay.

    `s` [..., r] is an output of `adapt`, `taps` are what was added there.
    """
    torch.ops.reslora.record_products.default(s, taps, products, decay)


def kernels_of(x: Tensor) -> str:
    """Say for people which kernels serve x's device and dtype, and why; checks them where due."""
    return str(torch.ops.reslora.kernels_of.default(x))
