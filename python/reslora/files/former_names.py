"""Names that transformers gave modules before version 5, in adapters that were saved then.

PEFT converts them for its LoRA alone. Of a LLaVA, for example, `language_model.model.layers` became
`model.language_model.layers`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._C import MODEL_PREFIX
from ..injection.targets import modules_of


def present_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors under the names that a model of transformers has now.

    Args:
        model: the model inside of PEFT's wrapper, with the adapter's layers in place.
        tensors: by the names in a file, with PEFT's prefix. A name whose layer is there stays.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # of version 4
        return tensors
    modules = modules_of(model)

    def is_there(name: str) -> bool:
        return name.partition(".reslora_")[0] in modules

    former = [key for key in tensors if ".reslora_" in key and not is_there(_inner(key))]
    if not former or not hasattr(model, "config"):
        return tensors
    mapping: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping or () if isinstance(entry, WeightRenaming)]
    named = dict(tensors)
    for key in former:
        name, _ = rename_source_key(_inner(key), renamings, [])
        if is_there(name):
            named[MODEL_PREFIX + name] = named.pop(key)
    return named


def _inner(key: str) -> str:
    return key.removeprefix(MODEL_PREFIX)
