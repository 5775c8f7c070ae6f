"""Which base layers can be merged into: those that compute x W^T + b, with a W of their own."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..injection.adapted import Injection
from ..nn.base_layers import base_weight, is_conv1d
from ..nn.layer import ResLoraLinear


def refuse_other_bases(injection: Injection, op: str, replaced: Collection[str] = ()) -> None:
    """Refuse layers whose output would not follow what is written into their weight.

    Such are weights that are made anew in each forward (parametrizations, weight norm, pruning),
    and layers whose class or hooks compute something else: those are tried on one row.

    Args:
        injection: of the adapted model.
        op: who asks, for the sentence.
        replaced: layers whose base is replaced by a plain one in this merge.
    """
    for layer in injection.layers:
        why = None if layer.name in replaced else _why_not(layer)
        if why:
            raise ValueError(
                f"[{op}] the base of each layer must compute x W^T + b with a weight of its own; "
                f"got one {why} (layer {layer.name}; export_lora leaves the weights alone)"
            )


def _why_not(layer: ResLoraLinear) -> str:
    base = layer.base_layer
    weight = base_weight(base)
    if weight is None or weight.is_meta:
        return ""  # refused where weights are written
    if "weight" not in base._parameters:
        return (
            "whose weight is made in each forward (remove the parametrization, weight norm or "
            "pruning first, as by torch.nn.utils.parametrize.remove_parametrizations)"
        )
    is_known = type(base) is nn.Linear or is_conv1d(base)
    if is_known and not (base._forward_hooks or base._forward_pre_hooks):
        return ""
    return "" if _is_linear(base, weight) else "whose class or hooks compute something else"


def _is_linear(base: nn.Module, weight: Tensor) -> bool:
    """Try one row: a class of its own, or a hook that observes, may well be linear."""
    x = torch.arange(weight.shape[1], device=weight.device).cos().to(weight.dtype)[None]
    bias = getattr(base, "bias", None)
    outputs, inputs = weight.shape
    plain = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    own = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    with torch.no_grad():
        try:
            got = base(x)
        except Exception:  # made for other rows, or for the model's own calls
            return False
        want = functional_call(plain, own, (x,)).float()
        if not isinstance(got, Tensor) or got.shape != want.shape:
            return False
        tolerance = max(1e-3, 8 * torch.finfo(weight.dtype).eps) * float(want.abs().max())
        return torch.allclose(got.float(), want, rtol=0.0, atol=tolerance)
