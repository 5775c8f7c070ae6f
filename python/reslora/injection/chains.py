"""Chains of layers with their rank and scaling, as the core's rules (matching.h) form them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .._C import Chain, ModuleInfo, find_chains, matches_pattern
from .._C import scaling_of as core_scaling_of
from ..config import ResLoraConfig
from ..nn.layer import LayerChain, ResLoraLinear
from .targets import matches, options_of


def pattern_value(pattern: dict[str, Any], key: str, default: Any) -> Any:
    """Return the value of the first key of a pattern that matches, as PEFT does."""
    found = (value for name, value in pattern.items() if matches_pattern(key, name, matches))
    return next(found, default)


def rank_of(config: ResLoraConfig, name: str) -> int:
    """Return the rank of a layer."""
    return pattern_value(config.rank_pattern, name, config.r)


def scaling_of(config: ResLoraConfig, name: str) -> float:
    """Return the scaling of a layer."""
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return core_scaling_of(float(alpha), rank_of(config, name), config.use_rslora)


def make_chains(
    model: nn.Module,
    modules: list[ModuleInfo],
    config: ResLoraConfig,
    names: list[str],
    kind: Callable[..., ResLoraLinear] = ResLoraLinear,
) -> list[LayerChain]:
    """Return the chains of the layers named; `kind(target, chain, position, shape)` makes one.

    `modules` is what `describe` says of the model.
    """
    chains = []
    for key, layers in find_chains(modules, names, options_of(config), matches):
        chain = LayerChain(key, config, Chain(config.core(), layers), [name for name, *_ in layers])
        for position, (name, *shape, _) in enumerate(layers):
            chain.layers.append(kind(model.get_submodule(name), chain, position, tuple(shape)))
        chains.append(chain)
    return chains


def root_name(modules: dict[str, nn.Module], names: list[str]) -> str:
    """Return the path of the nearest common ancestor of the layers that is called."""
    paths = [name.split(".")[:-1] for name in names]
    common = paths[0]
    for path in paths[1:]:
        same = [a == b for a, b in zip(common, path, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    while common and type(modules[".".join(common)]).forward is nn.Module.forward:
        common = common[:-1]
    return ".".join(common)
