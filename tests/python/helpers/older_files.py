"""Folders of adapters as older versions of reslora or transformers wrote them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from reslora import _C


def rename_saved(folder: Path, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Give chains, tensors and statistics of a saved adapter other names; return the tensors."""
    path = folder / "adapter_model.safetensors"
    read = _C.load_adapter(path)
    statistics = _C.statistics_beside(folder, read)
    chains = [
        (
            rename(key),
            [
                _C.LayerShape(rename(s.name), s.in_features, s.out_features, s.r, s.scaling)
                for s in layers
            ],
        )
        for key, layers in read.chains
    ]
    tensors = {rename(key): tensor for key, tensor in read.tensors.items()}
    _C.save_adapter(path, read.config_json, chains, tensors)
    factors = {key: tensor for key, tensor in tensors.items() if _C.is_factor(key)}
    _C.save_statistics(
        folder / "adapter_statistics.safetensors",
        _C.tensors_sum(factors),
        {rename(name): own for name, own in statistics.items()},
    )
    return tensors
