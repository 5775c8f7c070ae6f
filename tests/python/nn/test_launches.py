"""How many kernels a layer starts on a GPU, beside PEFT's LoRA, counted on the CPU.

Counted are calls of ATen that compute something, and the launches of reslora's own kernels, which
a C++ program runs on the CPU on the op's path on CUDA (tests/cuda_on_cpu/op_test.cpp).
"""

from __future__ import annotations

import re
import subprocess
from functools import cache

import peft
import pytest
import torch
from cpp_programs import build_folder
from torch import nn
from torch.profiler import ProfilerActivity, profile

# What allocates or describes memory, and what calls another function that is counted.
NOT_COUNTED = set(
    "empty empty_like empty_strided view reshape t transpose narrow slice as_strided expand select "
    "unsqueeze squeeze detach detach_ alias _unsafe_view resolve_conj resolve_neg permute dropout "
    "to _to_copy clone contiguous matmul linear zeros zeros_like ones ones_like stack view_as "
    "expand_as type_as".split()
)
RECORDING = 1  # `record_norms` is a launch of its own


@cache
def ours() -> dict[tuple[str, str, str, str], tuple[int, int]]:
    """Return launches forward and backward by shortcut, dtype of A and B, dropout and norms."""
    program = build_folder() / "tests/cuda_on_cpu/cuda_on_cpu_op"
    if not program.exists():
        pytest.skip("no CUDA toolkit: the op's path on CUDA was not built")
    printed = subprocess.run(
        [program, "--gtest_filter=OpOnCuda.PrintsItsLaunches"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = {}
    for line in re.findall(r"^launches (.*)$", printed, re.MULTILINE):
        case, forward, backward = re.split(r" (?:for|back)ward ", line)
        mode, dtype, dropout, norms = case.split()
        found[mode, dtype, dropout, norms] = launches_in(forward), launches_in(backward)
        assert launches_in(forward) > 2 and launches_in(backward) > 3, line
    return found


def launches_in(printed: str) -> int:
    """Return our launches, the first word, and those of the calls of ATen that follow."""
    own, *names = printed.split()
    return int(own) + len(computing(names))


def computing(names: list[str]) -> list[str]:
    """Return the functions of ATen that compute something."""
    plain = [name.removeprefix("aten::") for name in names if name.startswith("aten::")]
    return [name for name in plain if name not in NOT_COUNTED]


def calls_of(body) -> list[str]:
    """Return the functions of ATen that compute something in a call of `body`."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        body()
    return computing([event.name for event in seen.events()])


def peft_launches(dtype: torch.dtype, dropout: float) -> int:
    """Return what PEFT's LoRA starts in a forward and backward of one layer in bf16."""
    config = peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout)
    base = nn.Sequential(nn.Linear(48, 40, bias=False)).to(torch.bfloat16)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    x = torch.ones(32, 48, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.ones(32, 40, dtype=torch.bfloat16)
    model(x).backward(grad)
    x.grad = None
    model.zero_grad()
    outputs: list[torch.Tensor] = []
    forward = calls_of(lambda: outputs.append(model(x)))
    return len(forward) + len(calls_of(lambda: outputs[0].backward(grad)))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_starts_at_most_as_many_kernels_as_pefts_lora(dtype, dropout):
    found = ours()
    most = peft_launches(dtype, dropout)
    name = {torch.bfloat16: "BFloat16", torch.float32: "Float"}[dtype]
    for mode in ("none", "is", "ms"):
        for norms in ("plain", "norms"):
            case = (mode, name, f"{dropout:.2f}", norms)
            forward, backward = found[case]
            total = forward + backward + (RECORDING if norms == "norms" else 0)
            assert total <= most, (case, forward, backward, most)


def test_norms_cost_at_most_five_launches():
    found = ours()
    for (mode, dtype, dropout, norms), (forward, backward) in found.items():
        if norms == "norms":
            plain = found[mode, dtype, dropout, "plain"]
            assert forward + RECORDING - plain[0] <= 5 and backward == plain[1]
