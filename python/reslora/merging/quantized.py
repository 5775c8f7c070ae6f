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

from ..injection.adapted import Injection
from ..nn.base_layers import base_weight


def dense_layers(model: nn.Module, injection: Injection, op: str) -> dict[str, nn.Linear]:
    """Return a dense twin of every layer whose base holds no plain weight, by name.

    Twins have the dtype that the model computes in. Raises ValueError for a base that cannot be
    dequantised.
    """
    dtype = _compute_dtype(model, injection)
    found = {}
    for layer in injection.layers:
        if base_weight(layer.base_layer) is not None:
            continue
        with torch.no_grad():
            weight = _dequantized(layer.base_layer, layer.in_features, dtype)
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


def note_dense(model: nn.Module) -> None:
    """Tell the config of transformers what is dense now: else a saved model cannot be loaded."""
    options: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if hasattr(options, "llm_int8_skip_modules"):  # bitsandbytes; torchao stores types of tensors
        options.llm_int8_skip_modules = [
            name for name, module in model.named_modules() if type(module) is nn.Linear
        ]


def _compute_dtype(model: nn.Module, injection: Injection) -> torch.dtype:
    """Return the dtype of the model's own plain floating parameters."""
    own = {id(p) for layer in injection.layers for p in (layer.reslora_A, layer.reslora_B)}
    for parameter in model.parameters():
        is_plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
        if is_plain and parameter.is_floating_point() and id(parameter) not in own:
            return parameter.dtype
    return torch.get_default_dtype()


def _dequantized(base: nn.Module, in_features: int, dtype: torch.dtype) -> Tensor | None:
    """Return the weight [out, in] of a quantised layer as a plain tensor, None if unknown."""
    weight: Any = getattr(base, "weight", None)
    if type(base).__module__.split(".")[0] == "bitsandbytes":
        return _probed(base, in_features, dtype)
    if not isinstance(weight, Tensor) or type(weight) in (Tensor, nn.Parameter):
        return None
    inner: Any = weight.data if isinstance(weight, nn.Parameter) else weight
    if not hasattr(inner, "dequantize"):
        return None
    plain = inner.dequantize()
    is_plain = type(plain) is Tensor and plain.is_floating_point()
    return plain.detach().to(dtype, copy=True) if is_plain else None


def _probed(base: nn.Module, in_features: int, dtype: torch.dtype) -> Tensor:
    """Return W as the layer itself applies it, from what it makes of the unit vectors.

    bitsandbytes repacks its weights for the device that they run on, and only its own forward knows
    how to read them then.
    """
    weight: Any = base.weight
    bias: Any = getattr(base, "bias", None)
    columns = base(torch.eye(in_features, dtype=dtype, device=weight.device))
    columns = columns if bias is None else columns - bias.to(columns.dtype)
    return columns.t().to(dtype).contiguous()
