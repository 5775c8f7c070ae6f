"""Tensors of which each process holds a part (torch's DTensor, as FSDP2 makes them)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor without shards. Every rank collects a sharded one: a collective call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def writes(tensors: dict[str, Tensor]) -> bool:
    """Tell whether this process writes the tensors: of sharded ones the first rank does."""
    return not any(is_sharded(tensor) for tensor in tensors.values()) or dist.get_rank() == 0
