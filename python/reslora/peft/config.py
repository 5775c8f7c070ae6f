"""The options of ResLoRA as a config of PEFT."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftConfig, PeftType
from torch import Tensor

from .._build_info import VERSION
from .._C import (
    CONFIG_NAME,
    PEFT_TYPE,
    WEIGHTS_NAME,
    Stage,
    config_to_json,
    factor_names,
    is_factor,
    plain_name,
    saved_part,
    stage_adapter,
)
from ..config import PATTERNS
from ..config import ResLoraConfig as CoreConfig
from ..files.beside import warn_left_out
from ..files.folders import load_tensors_of
from .folders import meant_by

NAME = "reslora"
CARD = (
    "\n## How to load this adapter\n\nIt is a ResLoRA adapter: PEFT knows the method once "
    "`reslora` is imported.\n\n```python\nimport reslora.peft\nfrom peft import PeftModel\n\n"
    "model = PeftModel.from_pretrained(base_model, folder)\n```\n"
)


@dataclass
class ResLoraConfig(CoreConfig, PeftConfig):
    """The options of `reslora.ResLoraConfig` and those of every PEFT config (`task_type`, ...)."""

    fan_in_fan_out: bool | list[str] = field(
        default=False,
        metadata={
            "help": "Taken from the layers: the chains whose layers hold W^T (transformers' Conv1D)"
        },
    )
    other_places: dict[str, list[str]] | None = field(
        default=None,
        metadata={
            "help": "Taken from the model: further paths of layers that hang at several places"
        },
    )
    tied_weights: dict[str, list[str]] | None = field(
        default=None,
        metadata={
            "help": "Taken from the model: tensors elsewhere that share a layer's weight, or "
            "one of a module in modules_to_save"
        },
    )
    reslora_version: str | None = field(
        default=None, metadata={"help": "Version of reslora, leave empty to auto-fill."}
    )
    reslora_sum: str | None = field(
        default=None, metadata={"help": "Of the weights that a file was saved with."}
    )

    def __post_init__(self) -> None:
        """Check every option."""
        PeftConfig.__post_init__(self)
        self.peft_type = PeftType[PEFT_TYPE]
        self.reslora_version = self.reslora_version or VERSION
        self.validate()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json.

        A PeftModel that is saved calls this after it has written the tensors: they get the header
        that reslora reads, and are put in place with the options.
        """
        self.reslora_sum = None  # of the file that it was read from
        PeftConfig.save_pretrained(self, save_directory, **kwargs)
        folder = Path(save_directory)
        target = meant_by(folder)
        if target is None:
            return
        chains = self.chains  # type: ignore[attr-defined]  # noted where a model was adapted
        tensors = _own_tensors(load_tensors_of(folder / WEIGHTS_NAME), chains)
        beside = getattr(self, "trained_beside", ())  # noted when PEFT asked for the tensors
        warn_left_out([name for name in beside if name not in tensors], "save")
        values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        # PEFT lists what a head may be called; files of ours name what is there.
        heads = [key for key in tensors if not is_factor(key)]
        own = [n for n in self.modules_to_save or () if any(saved_part(h, [n]) for h in heads)]
        values |= {name: getattr(self, name) for name in PATTERNS}  # PEFT sorts what has an order
        text = config_to_json(json.dumps({**values, "modules_to_save": own or None}))
        with Stage(target) as stage:
            stage_adapter(stage, text, chains, tensors, {})
        if (folder / "README.md").is_file():
            card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
            if CARD.strip() not in card.text:
                card.text = card.text.rstrip("\n") + "\n" + CARD
            card.data.tags = sorted({*(card.data.tags or ()), NAME})
            card.save(folder / "README.md")


def _own_tensors(tensors: dict[str, Tensor], chains: Any) -> dict[str, Tensor]:
    """Return what PEFT wrote under the names of the plain model, each A and B once."""
    factors = {key for _, layers in chains for x in layers for key in factor_names(x.name)}
    plain = {plain_name(key): tensor for key, tensor in tensors.items()}
    return {key: x for key, x in plain.items() if key in factors or not is_factor(key)}
