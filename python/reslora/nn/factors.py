"""A and B of a layer, before they are filled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base_layers import device_of, typical_tensor


def empty_factors(base: nn.Module, inputs: int, outputs: int, r: int) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] for a base layer, not filled: fp64 beside fp64, else fp32."""
    is_double = typical_tensor(base).dtype == torch.float64
    dtype = torch.float64 if is_double else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "device": device_of(base)}
    return torch.empty(r, inputs, **options), torch.empty(outputs, r, **options)
