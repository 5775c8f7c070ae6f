"""Writes the folders of adapters that later versions must go on to read (formats 1 and 2).

    python tests/data/make_folders.py

`folder_core` is what save_pretrained writes with statistics, `folder_left_out` the same of a model
with links that are left out (format 2), `folder_peft` what a PeftModel saves. In
folder_values.safetensors are the base weights, an input x, and for each folder the output and that
of the merged model.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import reslora
from reslora import _C

WIDTH, LAYERS, DATA = 4, 3, Path(__file__).parent
FOLDERS = ("core", "left_out", "peft")
OPTIONS = {"r": 2, "lora_alpha": 4, "res_mode": "is", "target_modules": r"layers\.\d+"}


class Stack(nn.Module):
    """Square layers with tanh after each; `calls`: how often the first runs in a forward."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.calls = calls
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., 4] -> [..., 4]."""
        for _ in range(self.calls - 1):
            self.layers[0](x.flip(0))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def base_for(folder: str) -> Stack:
    """Return the plain model of a folder, with random weights."""
    return Stack(calls=2 if folder == "left_out" else 1)


def adapted(base: Stack, folder: str) -> nn.Module:
    """Return a model with random adapters, as the core or PEFT makes it."""
    if folder == "peft":
        from peft import get_peft_model

        from reslora.peft import ResLoraConfig

        model: nn.Module = get_peft_model(base, ResLoraConfig(**OPTIONS))
    else:
        model = reslora.inject(base, reslora.ResLoraConfig(**OPTIONS))
    for name, parameter in model.named_parameters():
        if "reslora_" in name:
            nn.init.normal_(parameter)
    return model


def main() -> None:
    """Write everything beside this script."""
    torch.manual_seed(0)
    values = {name: t.clone() for name, t in Stack().state_dict().items()}
    values["x"] = torch.randn(8, WIDTH)
    for folder in FOLDERS:
        base = base_for(folder)
        base.load_state_dict({k: t for k, t in values.items() if k.startswith("layers.")})
        model = adapted(copy.deepcopy(base), folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of links that are left out
            model(values["x"])
        target = DATA / f"folder_{folder}"
        shutil.rmtree(target, ignore_errors=True)
        if folder == "peft":
            model.save_pretrained(target)
        else:
            reslora.calibrate(model.eval(), [torch.randn(40, WIDTH)])
            reslora.save_pretrained(model, target, statistics=True)
        (target / "README.md").unlink()
        loaded = reslora.load(copy.deepcopy(base), target).eval()
        with torch.no_grad():
            values[f"{folder} y"] = loaded(values["x"])
            values[f"{folder} merged"] = reslora.merge_and_unload(loaded)(values["x"])
    _C.save_tensors(DATA / "folder_values.safetensors", values, {})


if __name__ == "__main__":
    main()
