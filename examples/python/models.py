"""Loading of base models, tokenizers and merged models, with errors in one sentence."""

from __future__ import annotations

from pathlib import Path

import torch
from console import UserError
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_model(name: str, device: str) -> torch.nn.Module:
    """Return a causal language model in fp32 and evaluation mode; UserError where there is none."""
    model = _load(AutoModelForCausalLM, name, dtype=torch.float32)
    return model.to(device).eval()


def load_tokenizer(name: str) -> object:
    """Return a tokenizer; UserError where there is none."""
    return _load(AutoTokenizer, name)


def _load(cls: type, name: str, **options: object) -> object:
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"--model must hold a causal language model; {name!r} has no config.json")
    try:
        return cls.from_pretrained(str(folder) if folder.is_dir() else name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"--model {name!r} cannot be loaded as a causal model: {reason}") from None
