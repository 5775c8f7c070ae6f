"""Which modules a config means: PEFT's rules for names, and what can be adapted at all.

Example::

    find_targets(model, config)  # {"model.layers.0.self_attn.q_proj": Linear(...), ...}

A list matches names and suffixes of whole parts, a string is a regular expression for the whole
name, "all-linear" means every linear layer but output heads. A pattern that matches nothing is an
error that names candidates.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from torch import nn

from ..config import ALL_LINEAR, ResLoraConfig
from ..nn.base_layers import features_of, is_bypassed, is_conv1d

# What a model of transformers or diffusers calls its queries and values (or all in one): the
# targets where a config names none, as in the paper. The first that a model has are taken.
DEFAULT_TARGETS = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, Phi, OPT, BART, Whisper, CLIP, ViT
    ("query", "value"),  # BERT, RoBERTa, and ViT of older versions
    ("query_proj", "value_proj"),  # DeBERTa
    ("q", "v"),  # T5
    ("q_lin", "v_lin"),  # DistilBERT
    ("c_attn",),  # GPT-2
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("qkv_proj",),  # Phi-3
    ("Wqkv",),  # ModernBERT
    ("to_q", "to_v"),  # diffusers
)


def matches_names(names: Sequence[str], key: str) -> bool:
    """Tell whether a module path is one of `names` or ends with ".name", as PEFT does."""
    return any(key == name or key.endswith(f".{name}") for name in names)


def _matches(pattern: str | Sequence[str], key: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, key) is not None
    return matches_names(pattern, key)


def _is_under(names: Sequence[str] | None, key: str) -> bool:
    """Tell whether `key` is, or lies inside, a module that one of `names` matches."""
    parts = key.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(matches_names(names or (), prefix) for prefix in prefixes)


def _layer_index(key: str, before: Sequence[str] | None) -> int | None:
    """Return the number of a module path that counts as its layer's."""
    parts = key.split(".")
    for previous, part in zip(["", *parts], parts, strict=False):
        if part.isdigit() and (not before or previous in before):
            return int(part)
    return None


def _candidates(model: nn.Module) -> str:
    """Name some layers that could be meant, for an error."""
    found = [name for name, m in model.named_modules() if name and _is_linear(m)]
    kinds = dict.fromkeys(name.rsplit(".", 1)[-1] for name in found)
    return ", ".join(list(kinds)[:12]) or "no linear layer at all"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def find_targets(model: nn.Module, config: ResLoraConfig) -> dict[str, nn.Module]:
    """Return the modules to adapt by path, in registration order.

    Raises:
        ValueError: for a pattern that matches nothing and for modules that cannot be adapted.
    """
    if config.target_modules is None:
        config.target_modules = default_targets(model)
    modules = {name: m for name, m in model.named_modules() if name}
    is_all = str(config.target_modules).lower() == ALL_LINEAR
    if is_all:
        found = _all_linear(model, modules)
    else:
        _check_patterns(model, modules, config.target_modules)
        found = {k: m for k, m in modules.items() if _matches(config.target_modules, k)}
    found = _filtered(found, config)
    if not found:
        raise ValueError(
            f"[inject] target_modules must match a layer; got {config.target_modules!r}, which "
            f"matches none that is not excluded (candidates: {_candidates(model)})"
        )
    _check_supported(modules, found)
    _check_rank_patterns(config, found)
    return found


def default_targets(model: nn.Module) -> list[str]:
    """Return what a model calls its queries and values; ValueError where that is not known."""
    names = {
        key.removesuffix(".base_layer").rsplit(".", 1)[-1]  # of a layer that is adapted already
        for key, module in model.named_modules()
        if _is_linear(module)
    }
    known = [targets for targets in DEFAULT_TARGETS if names.issuperset(targets)]
    if not hasattr(model, "config") or not known:
        raise ValueError(
            "[inject] target_modules must be given; got None (candidates: "
            f"{_candidates(model)}; or 'all-linear')"
        )
    return list(known[0])


def _check_patterns(
    model: nn.Module, modules: dict[str, nn.Module], targets: str | Sequence[str]
) -> None:
    for pattern in [targets] if isinstance(targets, str) else [[name] for name in targets]:
        if not any(_matches(pattern, key) for key in modules):
            shown = pattern if isinstance(pattern, str) else pattern[0]
            raise ValueError(
                f"[inject] target_modules must match module names; got {shown!r}, which matches "
                f"nothing (candidates: {_candidates(model)})"
            )


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the linear layers that "all-linear" means: no head, no expert, no attention output."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    found, left_out = {}, []
    for key, module in modules.items():
        if not _is_linear(module) or module is head or key.rsplit(".", 1)[-1] == "lm_head":
            continue
        if "experts" in key.split(".") or _is_unused(modules, key):
            left_out.append(key)
        else:
            found[key] = module
    if left_out:
        warnings.warn(
            f"[inject] 'all-linear' leaves out {len(left_out)} layers of experts, or that are not "
            f"called: {', '.join(left_out[:3])}, ...",
            stacklevel=4,
        )
    return found


def _is_unused(modules: dict[str, nn.Module], key: str) -> bool:
    parent, _, name = key.rpartition(".")
    return is_bypassed(modules.get(parent), name)


def _filtered(found: dict[str, nn.Module], config: ResLoraConfig) -> dict[str, nn.Module]:
    excluded = config.exclude_modules
    if excluded and not any(_matches(excluded, key) for key in found):
        warnings.warn(f"[inject] exclude_modules {excluded!r} excluded nothing", stacklevel=4)
    kept = {k: m for k, m in found.items() if not (excluded and _matches(excluded, k))}
    kept = {k: m for k, m in kept.items() if not _is_under(config.modules_to_save, k)}
    layers = config.layers_to_transform
    if layers is None:
        return kept
    wanted = {layers} if isinstance(layers, int) else set(layers)
    indices = {key: _layer_index(key, config.layers_pattern) for key in kept}
    missing = sorted(wanted - set(indices.values()))
    if missing:
        raise ValueError(
            f"[inject] layers_to_transform must name layers that have targets; got {missing}"
        )
    return {key: m for key, m in kept.items() if indices[key] in wanted}


def _check_supported(modules: dict[str, nn.Module], found: dict[str, nn.Module]) -> None:
    bad = [
        f"{key} ({type(module).__name__})"
        for key, module in found.items()
        if features_of(module) is None or _is_unused(modules, key)
    ]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            "[inject] targets must be linear layers that are called; got "
            f"{', '.join(bad[:5])}{more} (name them in exclude_modules)"
        )


def _check_rank_patterns(config: ResLoraConfig, found: dict[str, nn.Module]) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        for expression in getattr(config, name):
            if not any(re.match(rf"(.*\.)?({expression})$", key) for key in found):
                raise ValueError(
                    f"[inject] {name} must match adapted layers; got {expression!r}, which matches "
                    f"none of {', '.join(list(found)[:3])}, ..."
                )
