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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from . import _C
from .config import ResLoraConfig
from .grouping import Group, find_groups
from .layer import LayerChain, ResLoraLinear, fill_factors
from .session import Session
from .targets import features_of, find_saved, find_targets, pattern_value
from .utils import find_layers

if TYPE_CHECKING:
    from .merging import Applied
    from .planning import Calibrated


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
        self.calibrated: Calibrated | None = None

    @property
    def layers(self) -> list[ResLoraLinear]:
        """All adapted layers, chain by chain."""
        return [layer for chain in self.chains for layer in chain.layers]

    @property
    def merges_exactly(self) -> bool:
        """Tell whether every chain does."""
        return all(chain.merges_exactly for chain in self.chains)

    @property
    def chain_records(self) -> list[tuple[str, Any]]:
        """The chains as files name them."""
        return [(chain.key, chain.links.layers) for chain in self.chains]

    def note_chains(self) -> None:
        """Let the config know the chains as files name them: PEFT gives it alone to be saved."""
        self.config.chains = self.chain_records  # type: ignore[attr-defined]

    def close_passes(self) -> None:
        """Remove the hooks that the chains needed."""
        for session in self.sessions:
            session.detach()
        self.sessions = []

    def undo(self) -> None:
        """Put the base layers back, remove the hooks, restore which parameters train."""
        for parent, attribute, layer in reversed(self.places):
            setattr(parent, attribute, layer.base_layer)
        self.close_passes()
        for parameter, flag in self.trainable:
            parameter.requires_grad_(flag)
        self.places, self.trainable = [], []


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
    if not isinstance(config, ResLoraConfig):
        raise ValueError(
            f"[inject] config must be a ResLoraConfig; got {type(config).__name__} (a dict is read "
            "by ResLoraConfig.from_dict)"
        )
    config = copy.deepcopy(config)
    config.validate()
    _check_model(model)
    targets = find_targets(model, config)
    saved = find_saved(model, config)
    refuse_tied(model, saved, "inject")
    injection = Injection(config)
    injection.chains = make_chains(model, config, targets)
    injection.saved_modules = saved
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
    warn_without_links(injection)
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


# ---- Chains -----------------------------------------------------------------------------------


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
        links = _C.Chain(
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


def open_sessions(model: nn.Module, injection: Injection) -> None:
    """Let taps pass, and layers be evaluated together, in every forward of the model."""
    _allow_compiled_checkpoints()
    modules = dict(model.named_modules())
    sessions: dict[str, Session] = {}
    groups = find_groups(injection.layers)
    grouped = {layer.chain.key for group in groups for layer in group}
    for chain in injection.chains:
        if not (chain.has_taps() or chain.key in grouped):
            continue
        root = _root_name(modules, chain.names)
        if root not in sessions:
            sessions[root] = Session(root)
            injection.sessions.append(sessions[root])
            sessions[root].attach(modules[root])
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
    for parameter in _saved_parameters(model, injection.saved_modules):
        parameter.requires_grad_(True)


def saved_module(model: nn.Module, name: str) -> nn.Module:
    """Return a module of modules_to_save; of those that PEFT wraps, the trained copy in use."""
    module = model.get_submodule(name)
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    return copies[module.active_adapters[0]]  # type: ignore[index]


def saved_names(model: nn.Module, injection: Injection) -> list[str]:
    """Return the paths of the modules that are trained and saved whole, also those PEFT wraps."""
    wrapped = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)
    ]
    return injection.saved_modules + wrapped


def refuse_tied(model: nn.Module, saved: list[str], op: str) -> None:
    """Refuse modules_to_save that share a parameter: who reads the files has them apart."""

    def owner(name: str) -> str | None:
        if ".original_module." in name:  # what PEFT keeps beside the copy that is trained
            return None
        return next((module for module in saved if name.startswith(f"{module}.")), None)

    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if owner(other) != owner(name):
            own, shared = (name, other) if owner(name) else (other, name)
            module = own.rpartition(".")[0]
            raise ValueError(
                f"[{op}] modules_to_save must hold parameters of their own; got {own}, which is "
                f"{shared} too (untie it before: model.{own} = torch.nn.Parameter("
                f"model.{own}.detach().clone()), model.config.tie_word_embeddings = False; "
                f"reslora.peft trains a copy of {module})"
            )


def _saved_parameters(model: nn.Module, names: list[str]) -> list[nn.Parameter]:
    found = [p for name in names for p in saved_module(model, name).parameters()]
    return [parameter for parameter in found if parameter.is_floating_point()]


def warn_without_links(injection: Injection) -> None:
    """Say so where a shortcut is asked for and no link could be made."""
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
