"""Whole models on every device: training, merging, recomputing, low precision, memory."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from devices import assert_near, ran
from models import Net, adapted, fit, tiny_llama, tokens, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from reslora import (
    ResLoraConfig,
    calibrate,
    finish,
    inject,
    merge,
    merge_and_unload,
    unmerge,
)
from reslora.injection.adapted import find_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from memory import saved_bytes

SHORTCUTS = [("none", 1), ("is", 1), ("bs", 2), ("ms", -1)]
WIDTH = 64
BF16 = torch.bfloat16


def net(device, dtype, res_mode="is", pre_num=1, **options):
    """Make a Net with fp32 adapters; the same for each device and type, up to rounding."""
    torch.manual_seed(0)
    made = {"r": 8, "lora_alpha": 8, "target_modules": ["lin"], "res_mode": res_mode}
    model = inject(Net(WIDTH).to(dtype), ResLoraConfig(**made, pre_num=pre_num, **options))
    for layer in find_layers(model):
        with torch.no_grad():
            layer.reslora_B.normal_(std=0.1)
    return model.to(device)


def data(device, dtype, rows=512):
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype), torch.tanh(1.5 * x.roll(1, 1)).to(device, dtype)


def loss_of(x, target):
    return lambda model: (model(x) - target).float().square().mean()


def gradients(model, x):
    return torch.autograd.grad(model(x).float().square().sum(), trained(model))


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_training_reaches_the_loss_of_fp64(device, res_mode, pre_num):
    """With norms recorded, as every training run does."""
    exact = net("cpu", torch.float64, res_mode, pre_num).double()
    wanted = fit(exact, loss_of(*data("cpu", torch.float64)), 30)
    model = net(device, BF16, res_mode, pre_num)
    losses, kernels = ran(device, lambda: fit(model, loss_of(*data(device, BF16)), 30))
    assert wanted[-1] < 0.8 * wanted[0]
    assert losses[-1] == pytest.approx(wanted[-1], rel=0.05)
    if device == "cuda" and res_mode in ("is", "ms"):
        assert "project" in kernels  # its norms
        assert model.layers[1].lin.norm_count.item() > 0


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_a_model_merges_comes_back_to_the_same_bits_and_finishes(device, res_mode, pre_num):
    model = net(device, torch.float32, res_mode, pre_num).train()
    x, _ = data(device, torch.float32)
    want = model(x).detach()
    before = [layer.base_layer.weight.clone() for layer in find_layers(model)]
    if res_mode in ("is", "ms"):
        calibrate(model, [x])
    merge(model)
    got = model(x).detach()
    assert (got - want).norm() <= (1e-4 if res_mode in ("none", "bs") else 0.5) * want.norm()
    unmerge(model)
    weights = [layer.base_layer.weight for layer in find_layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    if res_mode in ("is", "ms"):
        finish(model, [x])
        want = model(x).detach()
        torch.testing.assert_close(merge_and_unload(model)(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_recomputed_layers_use_the_masks_of_the_forward(device, res_mode, pre_num):
    model = net(device, BF16, res_mode, pre_num, lora_dropout=0.3).train()
    x, _ = data(device, BF16)

    def run(mode):
        model.checkpointing = mode
        torch.manual_seed(3)
        return gradients(model, x)

    want = run(None)
    got, kernels = ran(device, lambda: run({"use_reentrant": False}))
    assert_near(got, want)
    if device == "cuda":
        assert kernels >= {"project", "project_grad", "expand", "expand_grad"}


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_autocast_and_a_gradient_scaler_train(device, dtype):
    model = net(device, torch.float32, lora_dropout=0.05).train()
    x, target = data(device, torch.float32)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)

    def train():
        losses = []
        for _ in range(12):
            with torch.autocast(device, dtype=dtype):
                loss = loss_of(x, target)(model)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    losses, kernels = ran(device, train)
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.dtype == torch.float32 for p in trained(model))
    if device == "cuda":
        assert kernels >= {"project", "project_grad"}


def test_fp32_adapters_beside_a_bf16_base_get_fp32_gradients_near_fp64(device):
    model = net(device, BF16)
    x, _ = data(device, BF16)
    exact = copy.deepcopy(model).double()
    for g, w in zip(gradients(model, x), gradients(exact, x.double()), strict=True):
        assert g.dtype == torch.float32
        assert (g.double() - w).norm() <= 0.05 * w.norm()


def test_forward_and_backward_in_a_graph_equal_the_eager_ones(cuda):
    model = net(cuda, BF16).train()
    x, _ = data(cuda, BF16)
    want = [g.clone() for g in gradients(model, x)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    count = model.layers[1].lin.norm_count.item()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(model, x)
    for _ in range(2):
        graph.replay()
    assert_near(got, want)
    assert model.layers[1].lin.norm_count.item() == count + 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_the_peak_is_that_of_the_frozen_model_and_thin_rows(cuda, res_mode, pre_num, dropout):
    """As tests/python/nn/test_memory.py for the CPU; workspaces may take half of a wide tensor."""
    rows, width, depth = 16384, 1024, 3

    def peak(model):
        x = torch.randn(rows, width, device=cuda, dtype=BF16, requires_grad=True)
        dy = torch.randn(rows, width, device=cuda, dtype=BF16)
        for _ in range(2):
            model(x).backward(dy)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(x).backward(dy)
        return torch.cuda.max_memory_allocated() - before

    def row():
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).to(cuda, BF16)

    options = {"target_modules": r"\d+", "r": 8, "lora_dropout": dropout}
    model = adapted(row(), 0.05, res_mode=res_mode, pre_num=pre_num, **options).train()
    wide = rows * width * 2
    kept = (depth - 1) * wide  # the frozen model keeps no x
    thin = depth * rows * (width // 8 if dropout else 0) + wide // 2
    assert peak(model.to(BF16)) <= peak(row().requires_grad_(False)) + kept + thin


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_a_layer_saves_thin_rows_and_bits(device, res_mode, pre_num, dropout):
    model = net(device, BF16, res_mode, pre_num, lora_dropout=dropout).to(BF16).train()
    x = data(device, BF16)[0].requires_grad_()
    layers = find_layers(model)
    rows = sum(8 * len(layer.wiring.b) for layer in layers)
    bits = WIDTH // 8 if dropout else 0
    tanh = WIDTH * 2  # what tanh saves is the next layer's x
    allowed = len(x) * (rows * 2 + len(layers) * (bits + tanh))
    stacked = sum(8 * (len(one.wiring.a) + len(one.wiring.b)) for one in layers) * WIDTH * 2
    saved = saved_bytes(lambda: model(x), [x, *model.parameters()])
    assert saved <= allowed + stacked + 8192  # A and B that were put together; small change
    assert saved < len(x) * len(layers) * 2 * tanh  # one wide temporary more a layer


class Recomputed(nn.Module):
    """Layers of a Llama in checkpoints, as training of large models has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids):
        return checkpoint(lambda i: self.model(i).logits, ids, use_reentrant=False)


def quantized(kind, device):
    """Return a tiny Llama with quantised layers, or skip where the package is not installed."""
    model = tiny_llama(2, hidden_size=64, intermediate_size=64).to(device, BF16)
    try:
        if kind == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(model, Int8WeightOnlyConfig(version=2))
            return model
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        pytest.skip(f"no CUDA device with {kind}" if device == "cuda" else f"{kind} is absent")
    for block in model.model.layers:
        own = Linear4bit(64, 64, bias=False, compute_dtype=BF16)
        own.load_state_dict({"weight": block.mlp.down_proj.weight.float().cpu()})
        block.mlp.down_proj = own.to(device)
    return model


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_quantised_bases_train(device, kind):
    model = quantized(kind, device)
    options = {"target_modules": ["down_proj"], "res_mode": "is", "lora_dropout": 0.05}
    model = adapted(model, 0.05, r=4, **options).train()
    ids = tokens(4, 9).to(device)
    steps = lambda: fit(model, lambda m: m(input_ids=ids, labels=ids).loss, 8)  # noqa: E731
    losses, kernels = ran(device, steps)
    assert losses[-1] < losses[0]
    if device == "cuda":
        assert kernels >= {"project", "project_grad"}


def test_a_causal_model_in_a_checkpoint_trains_in_bf16(device):
    model = tiny_llama(2, hidden_size=32, intermediate_size=48).to(device, BF16)
    options = {"target_modules": ["q_proj", "k_proj", "v_proj"], "res_mode": "ms", "pre_num": -1}
    model = adapted(model, 0.05, r=4, **options).train()
    ids = tokens(4, 9).to(device)
    one = Recomputed(model)

    def loss(_):
        logits = one(ids)[:, :-1].float().flatten(0, 1)
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    losses = fit(one, loss, 8)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_equals_the_eager_one(device, mode, fresh_compiler):
    model = net(device, torch.float32).train()
    x, _ = data(device, torch.float32)
    want = gradients(model, x)
    options = {"mode": mode} if device == "cuda" else {"backend": "aot_eager"}
    call = torch.compile(model, fullgraph=True, **options)
    for _ in range(3):  # a graph is recorded in the second call
        loss = call(x).square().sum()
        got = torch.autograd.grad(loss, trained(model))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4 * w.abs().max().item())
