"""C++ and Python give the same fits for the same model, batches and masks.

tests/cpp/nn/calibrated.cpp calibrates what lies in a folder; `Net` is its model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cpp_programs import build_folder, run
from torch import Tensor, nn

from reslora import _C, ResLoraConfig, calibrate, inject, load, save_pretrained
from reslora.injection.adapted import injection_of

WIDTH = 8
Batches = list[dict[str, Tensor]]


class Block(nn.Module):
    """As in tests/cpp/nn/small_net.h."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(self.norm(x))))


class Net(nn.Module):
    """Four blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.head(x)


def padded_batches() -> Batches:
    """Return three batches of other lengths, with padding that is far from what the tokens are."""
    found = []
    for seed, length in enumerate((5, 9, 7)):
        x = torch.randn(30, length, WIDTH, dtype=torch.float64)
        mask = torch.arange(length) < torch.arange(30).remainder(length)[:, None] + 1
        x[~mask] = 50.0 + seed
        found.append({"x": x, "attention_mask": mask})
    return found


def fits(model: nn.Module) -> dict[str, _C.Fit]:
    calibrated = injection_of(model, "test").calibrated
    assert calibrated is not None
    return calibrated.fits


@pytest.mark.parametrize("res_mode", ["is", "ms"])
def test_fits_are_the_same_in_both_languages(res_mode: str, tmp_path: Path):
    program = build_folder() / "tests" / "reslora_calibrated"
    if not program.exists():
        pytest.skip("the C++ tests are not built")
    torch.manual_seed(2)
    base = Net().double()
    _C.save_tensors(tmp_path / "base.safetensors", dict(base.state_dict()))
    twin = Net().double()
    twin.load_state_dict(base.state_dict())
    targets = ["q_proj", "v_proj"]
    config = ResLoraConfig(r=2, lora_alpha=4, res_mode=res_mode, target_modules=targets)
    model = inject(base, config)
    with torch.no_grad():
        for layer in injection_of(model, "test").layers:
            layer.reslora_A.normal_(0, 0.3), layer.reslora_B.normal_(0, 0.3)
    save_pretrained(model, tmp_path / "adapter")
    batches = padded_batches()
    tensors = {f"x{k}": batch["x"] for k, batch in enumerate(batches)}
    tensors |= {f"mask{k}": batch["attention_mask"].long() for k, batch in enumerate(batches)}
    _C.save_tensors(tmp_path / "batches.safetensors", tensors)

    result = calibrate(model, batches)
    run(program, tmp_path)
    theirs, ours = fits(load(twin, tmp_path / "fitted")), fits(model)
    assert result.moved == ["layers.*.v_proj"], "v_proj adds to the stream"
    assert theirs.keys() == ours.keys()
    kept = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for name, fit in ours.items():
        other = theirs[name]
        torch.testing.assert_close(other.A, fit.A, rtol=1e-9, atol=1e-12)
        assert (other.B is None) == (fit.B is None) == ("q_proj" in name)
        if fit.B is not None:
            torch.testing.assert_close(other.B, fit.B, rtol=1e-9, atol=1e-12)
        assert other.rows == fit.rows and fit.rows in (0, kept)
