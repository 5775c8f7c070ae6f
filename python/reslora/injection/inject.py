"""Adapting a model in place: which modules, which chains, and how to undo it.

Example::

    model = inject(model, ResLoraConfig(target_modules=["q_proj", "v_proj"], res_mode="is"))

Everything is checked and every new layer is made before the first module is replaced; if anything
fails later, the model is put back exactly. A chain holds the adapted layers whose module paths
differ in the layer index alone, in registration order: `model.layers.*.self_attn.q_proj`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from .._C import (
    Matching,
    ModuleInfo,
    check_chains,
    fill_factors,
    find_chains,
    match_saved,
    warning_without_links,
)
from ..config import ResLoraConfig, matches
from ..nn.grouping import Group, find_groups
from ..nn.session import Session
from .adapted import HOLDERS, Injection, find_layers
from .calls import leave_fused_paths, watch_first_step
from .chains import make_chains, root_name
from .heads import refuse_tied, refuse_unsavable, saved_parameters
from .targets import describe, find_targets, modules_of, warn_fused_experts
from .wrappers import refuse_compiled_in_checkpoints


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
    config = _checked(model, config)
    modules = describe(model)
    injection = _adapt(model, config, modules, find_targets(modules, config))
    warn_without_links(injection)
    return model


def inject_saved(model: nn.Module, config: ResLoraConfig, chains: Any, heads: list[str]) -> None:
    """Adapt `model` as `inject` does, to the layers that the file of an adapter is of.

    Args:
        model: as in `inject`.
        config: the file's.
        chains: key and layers of each chain, as the file has them.
        heads: the file's tensors that are no A or B; the modules that hold them train.

    Raises:
        ValueError: as `inject` does, and where the model has not these chains.
    """
    config = _checked(model, config)
    modules = describe(model)
    matching = match_saved(modules, config.core(), chains, heads, matches)
    # Before memory is taken for what the options say.
    check_chains(find_chains(modules, matching.layers, config.core(), matches), chains)
    warn_without_links(_adapt(model, config, modules, matching))


def _checked(model: nn.Module, config: ResLoraConfig) -> ResLoraConfig:
    """Return a copy of the config once it and the model can be used."""
    if not isinstance(config, ResLoraConfig):
        raise ValueError(
            f"[inject] config must be a ResLoraConfig; got {type(config).__name__} (a dict is read "
            "by ResLoraConfig.from_dict)"
        )
    config = copy.deepcopy(config)
    config.validate()
    _check_model(model)
    return config


def _adapt(
    model: nn.Module, config: ResLoraConfig, modules: list[ModuleInfo], matching: Matching
) -> Injection:
    """Replace the layers that were matched; where anything fails, put the model back."""
    warn_fused_experts(model, config, "inject")
    refuse_tied(model, matching.saved, "inject")
    refuse_unsavable(model, matching.saved)
    injection = Injection(config)
    injection.chains = make_chains(model, modules, config, matching.layers)
    injection.saved_modules = matching.saved
    for layer in injection.layers:
        layer.chain.injection = injection
        fill_factors(layer.reslora_A, layer.reslora_B, config.init_lora_weights)
    try:
        _replace(model, injection)
        open_sessions(model, injection)
        _freeze(model, injection)
    except BaseException:
        injection.undo()
        raise
    return injection


def refuse_wrapped(model: nn.Module, op: str) -> None:
    """Refuse a model inside of a wrapper that has looked at its parameters already."""
    if isinstance(model, HOLDERS):
        raise ValueError(
            f"[{op}] a model must be adapted before it is wrapped; got a {type(model).__name__}, "
            "which would not know the adapters: adapt the model that it holds, then wrap it"
        )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"[inject] model must be a torch module; got {type(model).__name__}")
    refuse_wrapped(model, "inject")
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


# ---- Changing the model -----------------------------------------------------------------------


def children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield every place (parent, attribute, child), also those of a child that has several."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None:
                yield parent, attribute, child


def _replace(model: nn.Module, injection: Injection) -> None:
    by_base = {id(layer.base_layer): layer for layer in injection.layers}
    for parent, attribute, child in list(children(model)):
        layer = by_base.get(id(child))
        if layer is not None:
            injection.places.append((parent, attribute, layer))
            setattr(parent, attribute, layer)


def open_sessions(model: nn.Module, injection: Injection) -> None:
    """Let every forward call the layers, pass taps and evaluate layers together."""
    leave_fused_paths(model, injection)
    watch_first_step(injection)
    _allow_compiled_checkpoints()
    modules = modules_of(model)
    sessions: dict[str, Session] = {}
    groups = find_groups(injection.layers)
    grouped = {layer.chain.key for group in groups for layer in group}
    for chain in injection.chains:
        if not (chain.has_taps() or chain.key in grouped):
            continue
        root = root_name(modules, chain.names)
        if root not in sessions:
            sessions[root] = Session(root)
            injection.sessions.append(sessions[root])
            sessions[root].attach(modules[root])
            look = modules[root].register_forward_pre_hook(refuse_compiled_in_checkpoints)
            injection.hooks.append(look)
        chain.session = sessions[root]
    for group in groups:
        session = group[0].chain.session
        if session is not None and all(layer.chain.session is session for layer in group):
            together = Group(group, session)
            for layer in group:
                layer.group = together


def _allow_compiled_checkpoints() -> None:
    """Let torch.compile recompute layers that leave something behind: norms, and taps.

    Without it, dynamo refuses such checkpoints; what is recomputed here leaves nothing again.
    """
    from torch._dynamo import config  # here, since it takes a second

    setattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)  # noqa: B010


def _freeze(model: nn.Module, injection: Injection) -> None:
    own = {id(p) for layer in injection.layers for p in (layer.reslora_A, layer.reslora_B)}
    for parameter in model.parameters():
        if id(parameter) in own:
            continue
        injection.trainable.append((parameter, parameter.requires_grad))
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    for parameter in saved_parameters(model, injection.saved_modules):
        parameter.requires_grad_(True)


def warn_without_links(injection: Injection) -> None:
    """Say so where a shortcut is asked for and no link could be made."""
    warning = warning_without_links([chain.links for chain in injection.chains])
    if warning:
        warnings.warn(warning, stacklevel=3)
