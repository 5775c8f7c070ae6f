"""modules_to_save: parts of a model that are trained and saved whole."""

from __future__ import annotations

from torch import Tensor, nn

from .._C import check_head, plain_name
from ..nn.sharding import is_sharded
from .adapted import Injection


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
        plain_name(name)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)
    ]
    return injection.saved_modules + wrapped


def refuse_tied(model: nn.Module, saved: list[str], op: str) -> None:
    """Refuse modules_to_save that share a parameter: who reads the files has them apart."""

    def owner(name: str) -> str | None:
        if ".original_module." in name:  # what PEFT keeps beside the copy that is trained
            return None
        plain = plain_name(name)
        return next((module for module in saved if plain.startswith(f"{module}.")), None)

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


def refuse_unsavable(model: nn.Module, saved: list[str]) -> None:
    """Refuse modules_to_save with a tensor that no file can hold, before anything is trained."""
    for name in saved:
        for key, tensor in saved_module(model, name).state_dict().items():
            if isinstance(tensor, Tensor) and not is_sharded(tensor):
                check_head(f"{name}.{key}", tensor)


def saved_parameters(model: nn.Module, names: list[str]) -> list[nn.Parameter]:
    """Return the parameters of modules_to_save that can be trained."""
    found = [p for name in names for p in saved_module(model, name).parameters()]
    return [parameter for parameter in found if parameter.is_floating_point()]
