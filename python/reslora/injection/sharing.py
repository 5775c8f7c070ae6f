"""What stands in a model under several names: layers at several places, and tied weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

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
    """Return the tensors of other modules that share a layer's weight, by layer."""
    weights = [(layer, getattr(layer.base_layer, "weight", None)) for layer in injection.layers]
    owners = [
        (weight, layer.name, layer.base_layer)
        for layer, weight in weights
        if isinstance(weight, Tensor)
    ]
    found: dict[str, list[str]] = {}
    for owner, own, name, module in _sharing(model, owners):
        if module is not own:
            found.setdefault(owner, []).append(name)
    return found


def tied_copies(model: nn.Module, adapter_name: str) -> dict[str, list[str]]:
    """Return where else originals stand of which an adapter trains a copy, by `modules_to_save`.

    PEFT wraps a module at one place; at the others the original stays. An embedding and a head of
    one tensor are left out: merges on files know this pair by what the files hold.
    """
    owners: list[tuple[Tensor, str, nn.Module]] = []
    for path, module in model.named_modules():
        original = getattr(module, "original_module", None)
        if isinstance(original, nn.Module) and adapter_name in getattr(
            module, "modules_to_save", ()
        ):
            owners += [(x, plain_name(path), original) for x in original.parameters()]
    found: dict[str, list[str]] = {}
    for owner, own, name, module in _sharing(model, owners):
        is_pair = isinstance(own, nn.Embedding) != isinstance(module, nn.Embedding)
        if not is_pair and not name.startswith(f"{owner}."):
            found.setdefault(owner, []).append(name)
    return found


def _sharing(
    model: nn.Module, owners: list[tuple[Tensor, str, nn.Module]]
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Yield the owner of each tensor and every name of what shares its memory, with its module."""
    known: dict[int, list[tuple[int, int, str, nn.Module]]] = {}
    for tensor, owner, own in owners:
        storage, begin, end = _span(tensor)
        known.setdefault(storage, []).append((begin, end, owner, own))
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or key == "_flat_param":  # FSDP's, of which all others are parts
                continue
            storage, begin, end = _span(tensor)
            for first, last, owner, own in known.get(storage, ()):
                if begin < last and first < end:
                    yield owner, own, f"{plain_name(path)}.{key}".lstrip("."), module


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """Return a tensor's storage, and where in it the tensor lies: from byte to byte."""
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # no memory of its own, such as a sparse tensor
        return id(tensor), 0, 1
    size = tensor.element_size()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = size * int(tensor.storage_offset())
    return storage, begin, begin + (size * (int(last) + 1) if tensor.numel() else 0)
