"""Models that get_peft_model adapted, with random adapters."""

from __future__ import annotations

from typing import Any

import torch
from models import randomize, tiny_llama
from peft import PeftModel, get_peft_model
from torch import nn

from reslora.injection.adapted import find_layers
from reslora.peft import ResLoraConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]


def options(**changes: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "res_mode": "ms"} | changes


def wrapped(
    base: nn.Module | None = None, adapter_name: str = "default", **changes: Any
) -> PeftModel:
    """A PEFT model with random adapters."""
    torch.manual_seed(1)
    base = tiny_llama() if base is None else base
    model = get_peft_model(base, ResLoraConfig(**options(**changes)), adapter_name=adapter_name)
    return randomize(model, 0.2).eval()


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def as_file_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """A and B by their names in the base model."""
    pairs = {}
    for layer in find_layers(model):
        pairs[f"{layer.name}.A"], pairs[f"{layer.name}.B"] = layer.reslora_A, layer.reslora_B
    return pairs
