"""Writes the files that the C++ and the Python modules must agree on (format 1 of adapters).

    python tests/data/make_parity.py

For each case: parity_<case>.safetensors, an adapter as save_pretrained writes it, and
parity_<case>_values.safetensors with the base weights, an input x and the output y in fp64. For the
case "is" also parity_is_statistics.safetensors (norm windows and fits), and `merged`, the output of
the model merged by those fits, among the values.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import reslora
from reslora import _C

CASES = {
    "none": ("none", 0),
    "is": ("is", 1),
    "bs2": ("bs", 2),
    "ms2": ("ms", 2),
    "msall": ("ms", -1),
}
WIDTH, LAYERS, FOLDER = 6, 4, Path(__file__).parent


class Stack(nn.Module):
    """Four square layers with tanh after each, in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., 6] -> [..., 6]."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def config_of(case: str) -> reslora.ResLoraConfig:
    """Return the options of a case; the C++ test repeats them."""
    res_mode, pre_num = CASES[case]
    return reslora.ResLoraConfig(
        r=3, lora_alpha=6, res_mode=res_mode, pre_num=pre_num, target_modules=r"layers\.\d+"
    )


def main() -> None:
    """Write all files beside this script."""
    for case in CASES:
        torch.manual_seed(0)
        model = Stack()
        values = {name: t.detach().clone() for name, t in model.state_dict().items()}
        reslora.inject(model, config_of(case))
        for name, parameter in model.named_parameters():
            if "reslora_" in name:
                nn.init.normal_(parameter)
        x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            values |= {"x": x, "y": model(x)}
        with tempfile.TemporaryDirectory() as folder:
            if case == "is":
                values["merged"] = merged(model, x, Path(folder))
            reslora.save_pretrained(model, folder)
            written = Path(folder) / "adapter_model.safetensors"
            shutil.copyfile(written, FOLDER / f"parity_{case}.safetensors")
        _C.save_tensors(str(FOLDER / f"parity_{case}_values.safetensors"), values, {})


def merged(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
    """Write the statistics of a model; return its output when it is merged by their fits."""
    model(x)  # fills the norm windows
    reslora.calibrate(model.eval(), [torch.randn(40, WIDTH, dtype=torch.float64)])
    reslora.save_pretrained(model, folder, statistics=True)
    written = folder / "adapter_statistics.safetensors"
    shutil.copyfile(written, FOLDER / "parity_is_statistics.safetensors")
    reslora.merge(model, "lsq")
    with torch.no_grad():
        y = model(x)
    reslora.unmerge(model)
    return y


if __name__ == "__main__":
    main()
