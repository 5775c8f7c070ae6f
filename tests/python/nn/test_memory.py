"""What a step allocates: no T x d temporary beside y and dx, and little saved for the backward."""

import sys
from pathlib import Path

import pytest
import torch
from models import Net, adapted, tiny_llama, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from reslora.injection.adapted import find_layers
from reslora.nn import ops
from reslora.nn.grouping import Group
from reslora.nn.layer import ALONE

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from memory import allocations, changes_of, peak_bytes, saved_bytes

T, WIDTH, RANK, DEPTH = 2048, 256, 2, 3
SHORTCUTS = [("none", 1), ("is", 1), ("bs", 2), ("ms", -1)]
DTYPES = [torch.float32, torch.bfloat16]


class Row(nn.Module):
    """Linear layers in a row, with nothing between them that would allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def model_of(res_mode, pre_num, dropout, dtype):
    options = {"res_mode": res_mode, "pre_num": pre_num, "lora_dropout": dropout, "r": RANK}
    return adapted(Row().to(dtype), target_modules=r"layers\.\d+", deviation=0.05, **options)


def step_of(model, dtype):
    """Return a step on a fixed x and dy; gradients exist already."""
    x = torch.randn(T, WIDTH, dtype=dtype, requires_grad=True)
    dy = torch.randn(T, WIDTH, dtype=dtype)

    def step():
        model(x).backward(dy)

    step()
    return step


def wide(step, dtype):
    """Return how many allocations are as large as x."""
    return sum(size >= T * WIDTH * dtype.itemsize for size in allocations(step))


def frozen(dtype):
    return Row().to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_nothing_as_large_as_x_is_made_beside_y_and_dx(res_mode, pre_num, dropout, dtype):
    model = model_of(res_mode, pre_num, dropout, dtype)
    assert wide(step_of(model, dtype), dtype) == wide(step_of(frozen(dtype), dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_the_peak_is_that_of_the_frozen_model_and_thin_rows(res_mode, pre_num, dropout, dtype):
    model = model_of(res_mode, pre_num, dropout, dtype)
    peak = peak_bytes(step_of(model, dtype)) - peak_bytes(step_of(frozen(dtype), dtype))
    kept_x = (DEPTH - 1) * T * WIDTH * dtype.itemsize  # a frozen layer keeps no x
    rows = sum(RANK * (len(m.wiring.a) + len(m.wiring.b) + 1) for m in find_layers(model))
    thin = 2 * T * rows * 4 + DEPTH * (T * WIDTH // 8 if dropout else 0)
    parameters = 4 * sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert peak <= kept_x + thin + parameters
    assert thin + parameters < T * WIDTH * dtype.itemsize  # one temporary more would be seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_planted_temporary_is_seen(dtype, monkeypatch):
    model = model_of("is", 1, 0.0, dtype)
    step = step_of(model, dtype)
    count, peak = wide(step, dtype), peak_bytes(step)
    real = ops.adapt
    monkeypatch.setattr(ops, "adapt", lambda x, *a, **k: real(x * 1, *a, **k))
    assert wide(step, dtype) > count
    assert peak_bytes(step) > peak + T * WIDTH * dtype.itemsize // 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_a_layer_saves_thin_rows_and_bits(res_mode, pre_num, dropout):
    model = adapted(
        Net(width=48, depth=4), res_mode=res_mode, pre_num=pre_num, lora_dropout=dropout
    ).train()
    x = torch.randn(64, 48, requires_grad=True)
    known = [x, *model.parameters()]
    rows = sum(2 * len(layer.wiring.b) for layer in find_layers(model))
    tanh = 4 * 64 * 48 * 4  # what tanh saves is the next layer's x
    bits = 4 * 64 * 48 // 8 if dropout else 0
    assert saved_bytes(lambda: model(x), known) <= 64 * rows * 4 + bits + tanh


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layers_together_save_one_mask(dropout):
    model = adapted(
        tiny_llama(2),
        target_modules=["q_proj", "k_proj", "v_proj"],
        res_mode="none",
        lora_dropout=dropout,
    ).train()
    apart = [layer.group for layer in find_layers(model)]
    ids = tokens(2, 16)
    known = list(model.parameters())
    together = saved_bytes(lambda: model(ids).logits, known)
    for layer in find_layers(model):
        layer.group = ALONE
    alone = saved_bytes(lambda: model(ids).logits, known)
    assert all(isinstance(group, Group) for group in apart)
    width = model.config.hidden_size
    assert alone - together == (2 * 2 * 32 * (-(-width // 8)) if dropout else 0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_a_recompute_leaves_nothing_behind(res_mode, pre_num, dropout):
    """It is interrupted where the last tensor is saved, here in an adapted layer."""
    model = model_of(res_mode, pre_num, dropout, torch.float32)
    layers = list(model.layers)
    model.layers = nn.ModuleList(Recomputed(layer) for layer in layers)
    step = step_of(model, torch.float32)
    assert abs(sum(changes_of(step))) < T * WIDTH  # bytes: what stays is smaller than any x


class Recomputed(nn.Module):
    """A block whose activations are recomputed in the backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(lambda h: self.layer(torch.tanh(h)), x, use_reentrant=False)
