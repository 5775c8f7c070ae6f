"""The README's examples run: Python here, C++ and CMake against the installed package."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import matplotlib
import peft
import pytest
import torch
from cpp_programs import REPOSITORY, TORCH, run
from transformers import LlamaConfig, LlamaForCausalLM

import reslora
from reslora.commands.options import cmake_prefix_path

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}


def blocks(language: str) -> list[str]:
    """Return the README's examples in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def small_llama() -> LlamaForCausalLM:
    """Return a model whose layers the examples name."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))


def train(model: torch.nn.Module) -> None:
    """Train for a few steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(5):
        ids = torch.randint(64, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model as training leaves it."""
    targets = ["q_proj", "v_proj"]
    reslora.inject(model, reslora.ResLoraConfig(r=4, target_modules=targets, res_mode="is"))
    train(model)
    return model.eval()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_examples_run_in_order(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    example = blocks("python")[number].replace("max_error=0.05", "max_error=0.2")  # random weights
    base = small_llama()
    model = copy.deepcopy(base)
    if "inject(" not in example and "LoraConfig(" not in example:
        model = adapted(model)
    batches = [{"input_ids": torch.randint(64, (8, 32))} for _ in range(8)]
    names = {"model": model, "base_model": base, "train": train, "batches": batches}
    names |= {"held_out": batches[:1], "peft": peft, "reslora": reslora, "torch": torch}
    exec(compile(example, f"README.md, python example {number}", "exec"), names)


def test_the_cmake_example_configures(tmp_path: Path) -> None:
    (example,) = blocks("cmake")
    (tmp_path / "main.cpp").write_text("int main() { return 0; }\n")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(small LANGUAGES CXX)\n"
        f"add_executable(program main.cpp)\n{example}"
    )
    options = (f"-DCMAKE_PREFIX_PATH={cmake_prefix_path}", f"-DRESLORA_TORCH_ROOT={TORCH}")
    run("cmake", "-S", ".", "-B", "build", *options, cwd=tmp_path)
