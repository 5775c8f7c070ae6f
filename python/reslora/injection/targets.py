"""Which modules a config means. The rules are the core's (matching.h); here a model is described.

Example::

    matching = find_targets(describe(model), config)
    matching.layers  # ["model.layers.0.self_attn.q_proj", ...]
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .._C import (
    Matching,
    ModuleInfo,
    default_targets,
    is_or_ends_with,
    match_layers,
    plain_name,
)
from ..config import ResLoraConfig, matches
from ..nn.base_layers import features_of, is_bypassed, is_linear

# What layers are called whose rows are of the other stream where attention crosses over.
KEYS_AND_VALUES = {
    "key", "value", "k", "v", "k_proj", "v_proj", "key_proj", "value_proj", "to_k", "to_v",
}  # fmt: skip
# What experts are called where each is a module of its own, as in transformers 4.
EXPERT_NAMES = {"w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by its path in the plain model; wrappers of torch are left out."""
    return {plain_name(path): module for path, module in model.named_modules()}


def describe(model: nn.Module) -> list[ModuleInfo]:
    """Return what the rules ask of the model and each of its modules, in registration order."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    modules = modules_of(model)
    shifting, kinds = _shifting_blocks(modules), _kinds_of_attention(modules)
    infos = []
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        base: Any = getattr(module, "base_layer", module)  # a layer that is adapted is what it was
        infos.append(
            ModuleInfo(
                path,
                type(module).__name__,
                *(features_of(module) or (0, 0)),
                is_linear=is_linear(base),
                is_head=module is head,
                is_bypassed=bool(path) and is_bypassed(modules.get(parent), name),
                is_uniform=_is_uniform(path, modules),
                rows=_rows(path, shifting) or _stream(path, kinds),
            )
        )
    return infos


def _is_uniform(path: str, modules: dict[str, nn.Module]) -> bool:
    container = modules[path]
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        return False
    prefix = f"{path}." if path else ""
    children = [modules.get(prefix + name, child) for name, child in container._modules.items()]
    return len({type(getattr(child, "base_layer", child)) for child in children}) == 1


def _shifting_blocks(modules: dict[str, nn.Module]) -> set[str]:
    """Return the paths, each up to its last number, of blocks whose windows are shifted in turn."""
    shifting = set()
    for path, module in modules.items():
        if hasattr(module, "shift_size"):
            parts = path.split(".")
            while parts and not parts[-1].isdigit():
                parts.pop()
            shifting.add(".".join(parts))
    return shifting - {""}


def _rows(path: str, shifting: set[str]) -> str:
    """Return which windows a layer sees: "even" or "odd", "" outside of attention that shifts them.

    Every other block of Swin shifts its windows, so a row of its attention is another patch than in
    the block before. The block's number tells which: a forward may change `shift_size` itself.
    """
    parts = path.split(".") if shifting else []
    for end, number in enumerate(parts, start=1):
        if ".".join(parts[:end]) in shifting:
            is_within = any("attn" in part or "attention" in part for part in parts[end:])
            return ("odd" if int(number) % 2 else "even") if is_within else ""
    return ""


def _kinds_of_attention(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Return "self" or "cross" by the path of a layer whose parent lists the kinds of its layers.

    So do models that match two images (SuperGlue, LoFTR): one class of layers serves both kinds.
    """
    found: dict[str, str] = {}
    for path, module in modules.items():
        for name, children in module._modules.items():
            if not isinstance(children, nn.ModuleList):
                continue
            for kinds in vars(module).values():
                if not isinstance(kinds, list | tuple) or len(kinds) != len(children):
                    continue
                if {"self", "cross"} == {k for k in kinds if isinstance(k, str)}:
                    prefix = f"{path}.{name}" if path else name
                    own = zip(children._modules, kinds, strict=True)
                    found |= {f"{prefix}.{number}": kind for number, kind in own}
    return found


def _stream(path: str, kinds: dict[str, str]) -> str:
    """Return of which stream keys and values are: the layer's own ("self") or the other one.

    Queries, and what comes after the attention, are always of the layer's own.
    """
    parts = path.split(".") if kinds else []
    if not parts or parts[-1] not in KEYS_AND_VALUES:
        return ""
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((kinds[prefix] for prefix in prefixes if prefix in kinds), "")


def find_targets(modules: list[ModuleInfo], config: ResLoraConfig) -> Matching:
    """Return which modules of a model, as described, are adapted or trained and saved whole.

    Raises:
        ValueError: for a pattern that matches nothing and for modules that cannot be adapted.
    """
    matching = match_layers(modules, config.core(), matches)
    for warning in matching.warnings:
        warnings.warn(warning, stacklevel=3)
    config.target_modules = matching.targets
    return matching


def targets_by_default(model: nn.Module) -> list[str]:
    """Return what a model calls its queries and values; ValueError where that is not known."""
    return default_targets(describe(model))


def warn_fused_experts(model: nn.Module, config: ResLoraConfig, op: str) -> None:
    """Say so where targets mean experts whose weights are one parameter, which are left out."""
    found = [
        path
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == "experts"
        and any(
            parameter.dim() == 3 and _means(config.target_modules, f"{path}.{name}")
            for name, parameter in module.named_parameters(recurse=False)
        )
    ]
    if found:
        warnings.warn(
            f"[{op}] experts in one parameter are no linear layers and are not adapted; got "
            f"{len(found)}: {', '.join(found[:3])}, ... (they see other tokens in each layer, so "
            "that a shortcut has nothing to link)",
            stacklevel=3,
        )


def _means(targets: Any, path: str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or matches(targets, path)
    names = targets or ()
    return any(name in EXPERT_NAMES or is_or_ends_with(path, name) for name in names)
