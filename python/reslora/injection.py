"""Adapting a model in place: which modules, which chains, and how to undo it.

Example::

    model = inject(model, ResLoraConfig(target_modules=["q_proj", "v_proj"], res_mode="is"))

Everything is checked and every new layer is made before the first module is replaced; if anything
fails later, the model is put back exactly. A chain holds the adapted layers whose module paths
differ in the layer index alone, in registration order: `model.layers.*.self_attn.q_proj`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import _C
from .config import ResLoraConfig
from .layer import LayerChain, ResLoraLinear, is_conv1d
from .session import Session
from .utils import find_layers

if TYPE_CHECKING:
    from .merging import Applied

ALL_LINEAR = "all-linear"


class Injection:
    """All that `inject` did to a model; its layers share it. Knows how to undo it."""

    def __init__(self, config: ResLoraConfig) -> None:
        self.config = config
        self.chains: list[LayerChain] = []
        self.sessions: list[Session] = []
        self.saved_modules: list[str] = []
        self.places: list[tuple[nn.Module, str, ResLoraLinear]] = []
        self.trainable: list[tuple[nn.Parameter, bool]] = []
        self.applied: Applied | None = None

    @property
    def layers(self) -> list[ResLoraLinear]:
        """All adapted layers, chain by chain."""
        return [layer for chain in self.chains for layer in chain.layers]

    def undo(self) -> None:
        """Put the base layers back, remove the hooks, restore which parameters train."""
        for parent, attribute, layer in reversed(self.places):
            setattr(parent, attribute, layer.base_layer)
        for session in self.sessions:
            session.detach()
        for parameter, flag in self.trainable:
            parameter.requires_grad_(flag)
        self.places, self.sessions, self.trainable = [], [], []


def inject(model: nn.Module, config: ResLoraConfig) -> nn.Module:
    """Adapt `model` in place with ResLoRA and return it.

    Everything is frozen but the adapters and `modules_to_save`. Step 0 equals the base model
    unless `init_lora_weights=False`.

    Args:
        model: any module; its nn.Linear and transformers Conv1D layers, and black boxes with
            in_features and out_features (quantised layers), can be adapted.
        config: which layers, and how.

    Raises:
        ValueError: for a bad config, a model that is adapted already, a pattern that matches
            nothing, a module that cannot be adapted. The model is then unchanged.
    """
    config = copy.deepcopy(config)
    config.validate()
    _check_model(model)
    targets = find_targets(model, config)
    saved = _find_saved(model, config)
    injection = Injection(config)
    injection.chains = _make_chains(model, config, targets)
    injection.saved_modules = saved
    for layer in injection.layers:
        layer.chain.injection = injection
        layer.init_adapter(config.init_lora_weights)
    try:
        _replace(model, injection)
        _open_sessions(model, injection)
        _freeze(model, injection)
    except BaseException:
        injection.undo()
        raise
    _warn_without_links(injection)
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"[inject] model must be a torch module; got {type(model).__name__}")
    if find_layers(model):
        raise ValueError(
            "[inject] model must be plain; got one that is adapted already (unload it first)"
        )
    for name, module in model.named_modules():
        if any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__):
            raise ValueError(
                f"[inject] model must not hold adapters of PEFT; got {type(module).__name__} at "
                f"{name} (merge or unload them first)"
            )


# ---- Targets ----------------------------------------------------------------------------------


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


def _layer_index(key: str) -> int | None:
    """Return the first number of a module path."""
    return next((int(part) for part in key.split(".") if part.isdigit()), None)


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
        raise ValueError(
            "[inject] target_modules must be given; got None (candidates: "
            f"{_candidates(model)}; or 'all-linear')"
        )
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
        if "experts" in key.split(".") or _parent_is_attention(modules, key):
            left_out.append(key)
        else:
            found[key] = module
    if left_out:
        warnings.warn(
            f"[inject] 'all-linear' leaves out {len(left_out)} layers of experts or "
            f"nn.MultiheadAttention: {', '.join(left_out[:3])}, ...",
            stacklevel=4,
        )
    return found


def _parent_is_attention(modules: dict[str, nn.Module], key: str) -> bool:
    """nn.MultiheadAttention reads its projections' weights without calling them."""
    return isinstance(modules.get(key.rpartition(".")[0]), nn.MultiheadAttention)


def _filtered(found: dict[str, nn.Module], config: ResLoraConfig) -> dict[str, nn.Module]:
    excluded = config.exclude_modules
    if excluded and not any(_matches(excluded, key) for key in found):
        warnings.warn(f"[inject] exclude_modules {excluded!r} excluded nothing", stacklevel=4)
    kept = {k: m for k, m in found.items() if not (excluded and _matches(excluded, k))}
    kept = {k: m for k, m in kept.items() if not _is_under(config.modules_to_save, k)}
    wanted = config.layers_to_transform
    if wanted is None:
        return kept
    wanted = {wanted} if isinstance(wanted, int) else set(wanted)
    missing = sorted(wanted - {_layer_index(key) for key in kept})
    if missing:
        raise ValueError(
            f"[inject] layers_to_transform must name layers that have targets; got {missing}"
        )
    return {key: m for key, m in kept.items() if _layer_index(key) in wanted}


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a layer that can be adapted, else None."""
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(module, nn.Bilinear) or not all(isinstance(n, int) and n > 0 for n in sizes):
        return None
    return sizes


def _check_supported(modules: dict[str, nn.Module], found: dict[str, nn.Module]) -> None:
    bad = [
        f"{key} ({type(module).__name__})"
        for key, module in found.items()
        if _features(module) is None or _parent_is_attention(modules, key)
    ]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            "[inject] targets must be linear layers that are called; got "
            f"{', '.join(bad[:5])}{more} (name them in exclude_modules)"
        )


def _pattern_value(pattern: dict[str, Any], key: str, default: Any) -> Any:
    """Return the value of the first key of a pattern that matches, as PEFT does."""
    for expression, value in pattern.items():
        if re.match(rf"(.*\.)?({expression})$", key):
            return value
    return default


def _check_rank_patterns(config: ResLoraConfig, found: dict[str, nn.Module]) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        for expression in getattr(config, name):
            if not any(re.match(rf"(.*\.)?({expression})$", key) for key in found):
                raise ValueError(
                    f"[inject] {name} must match adapted layers; got {expression!r}, which matches "
                    f"none of {', '.join(list(found)[:3])}, ..."
                )


def _find_saved(model: nn.Module, config: ResLoraConfig) -> list[str]:
    """Return the paths of modules_to_save."""
    found = []
    for name in config.modules_to_save or ():
        keys = [key for key, _ in model.named_modules() if matches_names([name], key)]
        if not keys:
            raise ValueError(f"[inject] modules_to_save must match modules; got {name!r}")
        found += keys
    return list(dict.fromkeys(found))


# ---- Chains -----------------------------------------------------------------------------------


def chain_key(modules: dict[str, nn.Module], name: str) -> str:
    """Return a module path with its layer indices replaced by `*`.

    An index counts as a layer index where the children of its container are all of one class, so
    that T5's `block.3.layer.1` becomes `block.*.layer.1`. Without any, the first number is one.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit() and "experts" not in parts[:i]]
    starred = [i for i in numbers if _is_uniform(modules.get(".".join(parts[:i])))]
    for i in starred or numbers[:1]:
        parts[i] = "*"
    return ".".join(parts)


def _is_uniform(container: nn.Module | None) -> bool:
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        return False
    return len({type(child) for child in container}) == 1


def _make_chains(
    model: nn.Module, config: ResLoraConfig, targets: dict[str, nn.Module]
) -> list[LayerChain]:
    modules = dict(model.named_modules())
    groups: dict[str, list[str]] = {}
    for name in targets:
        groups.setdefault(chain_key(modules, name), []).append(name)
    chains = []
    for key, names in groups.items():
        shapes = [(*_features(targets[name]), _rank(config, name)) for name in names]
        scales = [_scaling(config, name) for name in names]
        links = _C.Chain(
            config.core(),
            [(n, *shape, s) for n, shape, s in zip(names, shapes, scales, strict=True)],
        )
        chain = LayerChain(key, config, links, names)
        for position, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            chain.layers.append(ResLoraLinear(targets[name], chain, position, shape))
        chains.append(chain)
    return chains


def _rank(config: ResLoraConfig, name: str) -> int:
    return _pattern_value(config.rank_pattern, name, config.r)


def _scaling(config: ResLoraConfig, name: str) -> float:
    alpha = _pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return _C.scaling_of(float(alpha), _rank(config, name), config.use_rslora)


def _root_name(modules: dict[str, nn.Module], names: list[str]) -> str:
    """Return the path of the nearest common ancestor of the layers that is called."""
    paths = [name.split(".")[:-1] for name in names]
    common = paths[0]
    for path in paths[1:]:
        same = [a == b for a, b in zip(common, path, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    while common and type(modules[".".join(common)]).forward is nn.Module.forward:
        common = common[:-1]
    return ".".join(common)


# ---- Changing the model -----------------------------------------------------------------------


def _parents(model: nn.Module, wanted: set[int]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield every place (parent, attribute) where a wanted module hangs, also shared ones."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and id(child) in wanted:
                yield parent, attribute, child


def _replace(model: nn.Module, injection: Injection) -> None:
    by_base = {id(layer.base_layer): layer for layer in injection.layers}
    for parent, attribute, child in list(_parents(model, set(by_base))):
        layer = by_base[id(child)]
        injection.places.append((parent, attribute, layer))
        setattr(parent, attribute, layer)


def _open_sessions(model: nn.Module, injection: Injection) -> None:
    modules = dict(model.named_modules())
    sessions: dict[str, Session] = {}
    for chain in injection.chains:
        if not chain.has_taps():
            continue
        root = _root_name(modules, chain.names)
        if root not in sessions:
            sessions[root] = Session(root)
            injection.sessions.append(sessions[root])
            sessions[root].attach(modules[root])
        chain.session = sessions[root]


def _freeze(model: nn.Module, injection: Injection) -> None:
    own = {id(p) for layer in injection.layers for p in (layer.reslora_A, layer.reslora_B)}
    for parameter in model.parameters():
        if id(parameter) in own:
            continue
        injection.trainable.append((parameter, parameter.requires_grad))
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    modules = dict(model.named_modules())
    for name in injection.saved_modules:
        for parameter in modules[name].parameters():
            if torch.is_floating_point(parameter):
                parameter.requires_grad_(True)


def _warn_without_links(injection: Injection) -> None:
    config = injection.config
    if config.res_mode == "none" or config.pre_num == 0:
        return
    linked = any(c.links.is_linked(n) for c in injection.chains for n in range(len(c.names)))
    if not linked:
        warnings.warn(
            f"[inject] no two adapted layers are linked: res_mode={config.res_mode!r} works like "
            "plain LoRA here (print_links(model) shows the chains)",
            stacklevel=3,
        )
