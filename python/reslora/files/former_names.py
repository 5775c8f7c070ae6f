"""Names that transformers gave modules before version 5, in adapters that were saved then.

PEFT converts them for its LoRA alone. Of a LLaVA, for example, `language_model.model.layers` became
`model.language_model.layers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..injection.targets import modules_of


def present_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return what a model of transformers calls now what it lacks by the names of a file.

    Args:
        model: the model inside of any wrapper; it may be adapted.
        names: of modules, or of tensors in them. One that is there is left out, as is one of which
            no present name is known.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # of version 4
        return {}
    modules = modules_of(model)

    def is_there(name: str) -> bool:
        layer = name.partition(".reslora_")[0].partition(".lora_")[0]
        return layer in modules or name.rpartition(".")[0] in modules

    former = [name for name in names if not is_there(name)]
    if not former or not hasattr(model, "config"):
        return {}
    mapping: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping or () if isinstance(entry, WeightRenaming)]
    renamed = {name: rename_source_key(name, renamings, [])[0] for name in former}
    return {name: now for name, now in renamed.items() if is_there(now)}
