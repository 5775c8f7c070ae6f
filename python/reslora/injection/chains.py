"""Chains of layers with their rank and scaling, as the core's rules (matching.h) form them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .._C import Chain, ModuleInfo, find_chains
from ..config import ResLoraConfig, matches
from ..nn.layer import LayerChain, ResLoraLinear


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
    chains, core = [], config.core()
    for key, layers in find_chains(modules, names, core, matches):
        links, paths = Chain(core, layers), [shape.name for shape in layers]
        chain = LayerChain(key, config, links, paths)
        for position, shape in enumerate(layers):
            chain.layers.append(kind(model.get_submodule(shape.name), chain, position, shape))
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
