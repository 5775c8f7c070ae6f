"""What stands in a model under several names: layers at several places, and tied weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .._C import plain_name
from ..nn.layer import ResLoraLinear
from .adapted import Injection


def other_places(model: nn.Module, injection: Injection) -> dict[str, list[str]]:
    """Return the further paths of the layers that hang at several places, by layer."""
    held: dict[int, list[tuple[str, ResLoraLinear]]] = {}
    for parent, attribute, layer in injection.places:
        held.setdefault(id(parent), []).append((attribute, layer))
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, layer in held.get(id(module), ()):
            name = plain_name(f"{path}.{attribute}" if path else attribute)
            if name != layer.name:
                found.setdefault(layer.name, []).append(name)
    return found


def tied_weights(model: nn.Module, injection: Injection) -> dict[str, list[str]]:
    """Return the parameters of other modules that are a layer's weight too, by layer."""
    owners = {
        id(getattr(layer.base_layer, "weight", None)): (layer.name, layer.base_layer)
        for layer in injection.layers
    }
    found: dict[str, list[str]] = {}
    for owner, own, name, module in _parameters(model, owners):
        if module is not own:
            found.setdefault(owner, []).append(name)
    return found


def tied_copies(model: nn.Module) -> dict[str, list[str]]:
    """Return where else originals stand of which PEFT trains a copy, by `modules_to_save`.

    PEFT wraps a module at one place; at the others the original stays. An embedding and a head of
    one tensor are left out: merges on files know this pair by what the files hold.
    """
    owners: dict[int, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        original = getattr(module, "original_module", None)
        if isinstance(original, nn.Module) and hasattr(module, "modules_to_save"):
            owners |= {id(x): (plain_name(path), original) for x in original.parameters()}
    found: dict[str, list[str]] = {}
    for owner, own, name, module in _parameters(model, owners):
        is_pair = isinstance(own, nn.Embedding) != isinstance(module, nn.Embedding)
        if not is_pair and not name.startswith(f"{owner}."):
            found.setdefault(owner, []).append(name)
    return found


def _parameters(
    model: nn.Module, owners: dict[int, tuple[str, nn.Module]]
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Yield every name of the parameters that `owners` has by id, with its owner and its module."""
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if id(parameter) in owners:
                yield *owners[id(parameter)], plain_name(f"{path}.{key}" if path else key), module
