"""Which layers form a chain, with which rank and scaling."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from .._C import Chain
from .._C import scaling_of as core_scaling_of
from ..config import ResLoraConfig
from ..nn.base_layers import features_of
from ..nn.layer import LayerChain, ResLoraLinear


def pattern_value(pattern: dict[str, Any], key: str, default: Any) -> Any:
    """Return the value of the first key of a pattern that matches, as PEFT does."""
    for expression, value in pattern.items():
        if re.match(rf"(.*\.)?({expression})$", key):
            return value
    return default


LEVELS = ("down_blocks", "up_blocks")  # of a UNet


def chain_key(modules: dict[str, nn.Module], name: str) -> str:
    """Return a module path with its layer indices replaced by `*`.

    An index counts as a layer index where the children of its container are all of one class, so
    that T5's `block.3.layer.1` becomes `block.*.layer.1`. Without any, the first number is one.
    Experts see other tokens, and the levels of a UNet have other resolutions: their indices stay.
    """
    parts = name.split(".")
    numbers = [
        i
        for i, part in enumerate(parts)
        if part.isdigit() and "experts" not in parts[:i] and parts[i - 1] not in LEVELS
    ]
    starred = [i for i in numbers if _is_uniform(modules.get(".".join(parts[:i])))]
    for i in starred or numbers[:1]:
        parts[i] = "*"
    return ".".join(parts)


def _is_uniform(container: nn.Module | None) -> bool:
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        return False
    # A child that is adapted already counts as what it was.
    return len({type(getattr(child, "base_layer", child)) for child in container}) == 1


def make_chains(
    model: nn.Module,
    config: ResLoraConfig,
    targets: dict[str, nn.Module],
    kind: Callable[..., ResLoraLinear] = ResLoraLinear,
) -> list[LayerChain]:
    """Return the chains of the targets; `kind(target, chain, position, shape)` makes a layer."""
    modules = dict(model.named_modules())
    groups: dict[str, list[str]] = {}
    for name in targets:
        groups.setdefault(chain_key(modules, name), []).append(name)
    chains = []
    for key, names in groups.items():
        shapes = [shape_of(config, name, targets[name]) for name in names]
        scales = [scaling_of(config, name) for name in names]
        links = Chain(
            config.core(),
            [(n, *shape, s) for n, shape, s in zip(names, shapes, scales, strict=True)],
        )
        chain = LayerChain(key, config, links, names)
        for position, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            chain.layers.append(kind(targets[name], chain, position, shape))
        chains.append(chain)
    return chains


def shape_of(config: ResLoraConfig, name: str, module: nn.Module) -> tuple[int, int, int]:
    """Return (in_features, out_features, r) of a target."""
    features = features_of(module)
    assert features is not None  # find_targets refuses other modules
    return (*features, _rank(config, name))


def _rank(config: ResLoraConfig, name: str) -> int:
    return pattern_value(config.rank_pattern, name, config.r)


def scaling_of(config: ResLoraConfig, name: str) -> float:
    """Return the scaling of a layer."""
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return core_scaling_of(float(alpha), _rank(config, name), config.use_rslora)


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
