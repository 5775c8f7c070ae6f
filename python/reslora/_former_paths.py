"""Where classes were before: what `torch.save` wrote of an adapted model then still loads.

A pickle names each class by the module that defined it. The modules that are gone are put back
with the classes that a pickle can name; these are looked up when it asks for one of them, since
those of PEFT import PEFT.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

NOW = {
    "calibration": {"Calibration": "merging.calibration"},
    "grouping": {"Group": "nn.grouping"},
    "injection": {"Injection": "injection.adapted"},
    "layer": {"LayerChain": "nn.layer", "ResLoraLinear": "nn.layer", "Wiring": "nn.passes"},
    "merging": {"Applied": "injection.adapted"},
    "peft_layer": {"Adapter": "peft.layer", "PeftLinear": "peft.layer"},
    "planning": {"Calibrated": "injection.adapted"},
    "refinement": {"Refinement": "merging.refinement"},
    "reporting": {"LayerReport": "merging.report", "MergeReport": "merging.report"},
    "session": {"Session": "nn.session"},
    "starting": {"Start": "files.starting"},
}


def keep() -> None:
    """Let every class of `NOW` be found where it was; two of the modules are folders today."""
    for name, classes in NOW.items():
        path = f"{__package__}.{name}"
        module = sys.modules.setdefault(path, ModuleType(path, __doc__))
        vars(module)["__getattr__"] = _finder(path, classes)


def _finder(path: str, classes: dict[str, str]) -> Any:
    def find(name: str) -> Any:
        if name not in classes:
            raise AttributeError(f"module {path!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__package__}.{classes[name]}"), name)

    return find
