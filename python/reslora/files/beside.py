"""What trains beside an adapter, unfrozen by hand: in none of its files, which is said."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from .._C import plain_name


def trained_beside(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model trains but its adapters, by the names of files."""
    return {
        plain_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "reslora_" not in name
    }


def warn_not_saved(model: nn.Module, saved: Iterable[Tensor], op: str) -> None:
    """Say so where something trains that is not among the tensors saved."""
    known = {id(tensor) for tensor in saved}
    warn_left_out([k for k, own in trained_beside(model).items() if id(own) not in known], op)


def warn_left_out(names: list[str], op: str) -> None:
    """Say so where parameters of these names train and are not in the files that `op` writes."""
    if names:
        warnings.warn(
            f"[{op}] what trains beside the adapter is not in its files; got {len(names)} "
            f"parameters such as {names[0]} (name their modules in modules_to_save, or save them "
            "apart)",
            stacklevel=4,
        )
