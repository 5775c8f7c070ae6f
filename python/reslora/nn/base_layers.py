"""The linear layers that can be adapted, and their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' Conv1D, a linear layer with weight [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.split(".")[0] == "transformers"


def base_weight(base: nn.Module) -> Tensor | None:
    """Return W [out, in] of a base layer as a view, None where it is no plain floating tensor."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) not in (nn.Parameter, Tensor):
        return None
    if weight.dim() != 2 or not weight.is_floating_point():
        return None
    return weight.t() if is_conv1d(base) else weight


# Subclasses of nn.Linear whose output is no x W^T + b: routers that return more than scores, layers
# of groups, layers in two parts.
NOT_LINEAR = {
    "Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear", "IdeficsDecoupledLinear",
}  # fmt: skip


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a dense linear layer, by its class."""
    if type(module).__name__ in NOT_LINEAR:
        return False
    return isinstance(module, nn.Linear) or is_conv1d(module)


def typical_tensor(base: nn.Module) -> Tensor:
    """Return a parameter whose device, and precision if floating, the adapter takes."""
    parameters = list(base.parameters())
    floating = [parameter for parameter in parameters if parameter.is_floating_point()]
    return next(iter([*floating, *parameters]), torch.empty(0))


def device_of(base: nn.Module) -> torch.device:
    """Return where a layer runs: where its weights lie, or accelerate's hook brings them."""
    device = typical_tensor(base).device
    hook = getattr(base, "_hf_hook", None)
    for own in getattr(hook, "hooks", (hook,)):
        place = getattr(own, "execution_device", None)
        if device.type == "meta" and place is not None:
            return torch.device(place)
    return device


# By class: the children whose weight its code reads without a call.
BYPASSED = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "HunyuanDiTAttentionPool": ("q_proj", "k_proj", "v_proj", "c_proj"),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "LongcatFlashTopkRouter": ("classifier",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "TDNNLayer": ("kernel",),
    "MambaMixer": ("x_proj",),
    "FalconMambaMixer": ("x_proj",),
}


def is_bypassed(parent: nn.Module | None, name: str) -> bool:
    """Tell whether a child's weight is read without a call, or by kernels that some machines have.

    Attention of torch does so, every kind of Mamba in training, and the classes named above.
    """
    kind = type(parent).__name__
    if isinstance(parent, nn.MultiheadAttention) or name in BYPASSED.get(kind, ()):
        return True
    is_mamba = "Mamba" in kind or (hasattr(parent, "A_log") and hasattr(parent, "D"))
    return is_mamba and name in ("dt_proj", "out_proj")


def features_of(module: Any) -> tuple[int, int] | None:
    """Return (in, out) of a layer that can be adapted, else None."""
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    if type(module).__name__ in NOT_LINEAR:
        return None
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int) and inputs > 0 and outputs > 0:
        return inputs, outputs
    return None
