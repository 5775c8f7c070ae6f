"""One file, both worlds: what a C++ program trained, in Python; and on to deployment.

examples/cpp/train_tiny writes base weights, adapter, export and outputs; `twin` is its network.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import peft
import pytest
import torch
from cpp_programs import build_example, run
from torch import Tensor, nn

import reslora
from reslora import _C

pytestmark = pytest.mark.timeout(1800)
MODES = ("none", "is", "bs", "ms")


class Block(nn.Module):
    """A residual block, as the four in examples/cpp/train_tiny/main.cpp."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, width] -> [T, width]."""
        return x + self.down_proj(nn.functional.gelu(self.up_proj(x)))


@pytest.fixture(scope="module")
def train_tiny() -> Path:
    """The program, built against the installed package."""
    return build_example("train_tiny")


@pytest.fixture(scope="module")
def trained(train_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that the program wrote, by shortcut and type."""
    folders = {}
    for mode in MODES:
        for kind in ("float", "double"):
            folder = tmp_path_factory.mktemp(f"{mode}_{kind}")
            printed = run(train_tiny, mode, folder, kind)
            assert "merged:" in printed
            folders[f"{mode} {kind}"] = folder
    return folders


def twin(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the plain Python twin with the program's base weights, x and y."""
    base, _ = _C.load_tensors(str(folder / "base.safetensors"))
    values, _ = _C.load_tensors(str(folder / "values.safetensors"))
    model = nn.Sequential(*(Block(16) for _ in range(4))).to(values["x"].dtype)
    model.load_state_dict(base)
    return model.eval(), values["x"], values["y"]


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_trained_in_cpp_gives_the_same_outputs_in_python(mode, trained):
    model, x, y = twin(trained[f"{mode} double"])
    reslora.load(model, trained[f"{mode} double"] / "adapter")
    with torch.no_grad():
        assert torch.equal(model(x), y)  # bit for bit
    model, x, y = twin(trained[f"{mode} float"])
    reslora.load(model, trained[f"{mode} float"] / "adapter")
    with torch.no_grad():
        assert (model(x) - y).norm() <= 1e-6 * y.norm()


@pytest.mark.parametrize("mode", MODES)
def test_norm_windows_and_exports_agree(mode, trained, tmp_path):
    """Python reads the windows that C++ recorded: both choose and compute the same plain LoRA."""
    folder = trained[f"{mode} double"]
    model, x, _ = twin(folder)
    reslora.load(model, folder / "adapter")
    reslora.export_lora(model, tmp_path)
    ours, _ = _C.load_tensors(str(tmp_path / "adapter_model.safetensors"))
    theirs, _ = _C.load_tensors(str(folder / "lora/adapter_model.safetensors"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-9, atol=1e-12)
    reslora.merge_and_unload(model)
    with torch.no_grad():
        wanted = model(x)
    loaded = peft.PeftModel.from_pretrained(
        twin(folder)[0], folder / "lora", autocast_adapter_dtype=False
    )
    with torch.no_grad():
        assert (loaded(x) - wanted).norm() <= 1e-9 * wanted.norm()


def test_saving_again_in_python_changes_no_option(trained, tmp_path):
    model, _, _ = twin(trained["ms float"])
    reslora.load(model, trained["ms float"] / "adapter")
    reslora.save_pretrained(model, tmp_path)
    first = reslora.ResLoraConfig.load(trained["ms float"] / "adapter/adapter_config.json")
    assert reslora.ResLoraConfig.load(tmp_path / "adapter_config.json") == first


def test_bad_arguments_give_a_sentence(train_tiny: Path, tmp_path: Path):
    done = subprocess.run([train_tiny, "xs"], capture_output=True, text=True, check=False)
    assert (done.returncode, "res_mode must be" in done.stderr) == (1, True)


def test_a_merged_model_is_deployed_with_aot_inductor(trained, tmp_path):
    """C++ trains, Python merges and exports, C++ runs: the outputs are those of the trained one."""
    folder = trained["bs float"]  # merges exactly
    model, x, _ = twin(folder)
    reslora.load(model, folder / "adapter")
    model = reslora.merge_and_unload(model)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "model.pt2")
        )
    printed = run(build_example("deploy"), package, folder / "values.safetensors")
    assert float(printed.rsplit(" ", 1)[1]) <= 1e-5
