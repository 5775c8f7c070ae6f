"""Dense copies of quantised linear layers, for merging.

A quantised weight cannot take a sum: it is dequantised, the adapter is added to what comes out,
and the layer stays dense. What is merged into are therefore the *dequantised* weights, which differ
from those of the original files by the quantisation error; an adapter that was trained on the
quantised model fits them. To merge into the original files instead, use `merge_folder` (the command
`reslora merge`).

Known are weights with a `dequantize` method (torchao) and the 4-bit and 8-bit layers of
bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .injection import Injection
from .layer import base_weight


def dense_layers(injection: Injection, op: str) -> dict[str, nn.Linear]:
    """Return a dense twin of every layer whose base holds no plain weight, by name.

    Raises:
        ValueError: for a base that cannot be dequantised.
    """
    found = {}
    for layer in injection.layers:
        if base_weight(layer.base_layer) is not None:
            continue
        with torch.no_grad():
            weight = dequantized(layer.base_layer)
        if weight is None or list(weight.shape) != [layer.out_features, layer.in_features]:
            raise ValueError(
                f"[{op}] dequantize knows torchao and bitsandbytes; got "
                f"{type(layer.base_layer).__name__} (layer {layer.name})"
            )
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.bias = getattr(layer.base_layer, "bias", None)  # type: ignore[assignment]
        dense.train(layer.base_layer.training)
        found[layer.name] = dense
    return found


def dequantized(base: nn.Module) -> Tensor | None:
    """Return the weight [out, in] of a quantised layer as a plain tensor, None if unknown."""
    weight: Any = getattr(base, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).contiguous()
    if hasattr(weight, "SCB") and weight.dtype == torch.int8:
        scale = weight.SCB if weight.SCB is not None else getattr(base, "state").SCB  # noqa: B009
        return (weight.data.float() * scale.float()[:, None] / 127).to(torch.float16)
    if not isinstance(weight, Tensor) or type(weight) in (Tensor, nn.Parameter):
        return None
    inner: Any = weight.data if isinstance(weight, nn.Parameter) else weight
    if not hasattr(inner, "dequantize"):
        return None
    plain = inner.dequantize()
    is_plain = type(plain) is Tensor and plain.is_floating_point()
    return plain.detach().clone() if is_plain else None
