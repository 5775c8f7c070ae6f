"""What does a training step of a whole model cost: PEFT's LoRA against every shortcut?

Models of random weights in the shapes of real ones, all linear layers adapted, r = 16: a BERT (6
layers of 384, batch 16 x 64) and a Llama (30 layers of 576, intermediate 1536, 9 heads, 3 of them
for keys, batch 4 x 128; also 6 layers of it, which compile in minutes). A step is forward, loss and
backward. The reference is the frozen model with gradients down to its embeddings; variants
are timed in interleaved rounds, eager and compiled. Peak memory is measured at batch 8 x 256, with
and without checkpointing.

    python benchmarks/bench_step.py                  # all models
    python benchmarks/bench_step.py --models bert --no-compile --rounds 5
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import harness
import peft
import torch
from memory import peak_resident_bytes, return_memory_at_once
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import reslora
from reslora.injection.adapted import find_layers
from reslora.nn.layer import ALONE

RANK, ALPHA = 16, 16
METHODS = {"none": 0, "is": 1, "bs": 3, "ms": -1}
APART = "none, each layer apart"  # without evaluating q, k, v and gate, up together
MEMORY_BATCH = (8, 256)


def bert() -> nn.Module:
    """Return a BERT of 6 layers with a fresh head."""
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def llama(layers: int) -> nn.Module:
    """Return a Llama of so many layers."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


LLAMA = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# name: how to make it, batch, length, what PEFT and reslora adapt
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, str]] = {
    "bert": (bert, 16, 64, r".*encoder\.layer\..*(query|key|value|dense)"),
    "llama": (partial(llama, 30), 4, 128, LLAMA),
    "llama6": (partial(llama, 6), 4, 128, LLAMA),
}
COMPILED = ("bert", "llama6")  # 30 layers take more than ten minutes for each method


def adapted(model: nn.Module, targets: str, method: str) -> nn.Module:
    """Return the model frozen ("frozen"), with PEFT's LoRA ("peft") or with a shortcut."""
    torch.manual_seed(1)
    if method == "frozen":
        return model.requires_grad_(False)
    if method == "peft":
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        return peft.inject_adapter_in_model(config, model.requires_grad_(False))
    own = reslora.ResLoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, res_mode=method, pre_num=METHODS[method]
    )
    return reslora.inject(model, own)


def batch_of(name: str, rows: int, length: int) -> dict[str, Tensor]:
    """Return random tokens and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 8000, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids if name.startswith("llama") else ids[:, 0] % 2}


@contextmanager
def inputs_with_grad(model: nn.Module) -> Iterator[None]:
    """Let the output of the embeddings require grad, as in training where all layers learn."""
    handle = model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda module, args, output: output.requires_grad_()
    )
    try:
        yield
    finally:
        handle.remove()


def step_of(model: nn.Module, call: Any, batch: dict[str, Tensor]) -> Callable[[], float]:
    """Return a training step without the optimizer."""

    def step() -> float:
        model.zero_grad(set_to_none=True)
        return harness.timed(lambda: call(**batch).loss.backward())

    return step


def check_against_eager(name: str, model: nn.Module, call: Any, batch: dict[str, Tensor]) -> float:
    """Demand that a compiled model gives the eager model's loss and gradients."""
    results = []
    for run in (model, call):
        model.zero_grad(set_to_none=True)
        loss = run(**batch).loss
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat(grads) if grads else torch.zeros(1)))
    model.zero_grad(set_to_none=True)
    (loss, grads), (own_loss, own_grads) = results
    harness.require_close(f"{name}, loss", own_loss, loss, relative=1e-4)
    scale = float(grads.abs().max()) or 1.0
    return harness.require_close(
        f"{name}, gradients", own_grads / scale + 1, grads / scale + 1, relative=1e-3
    )


def check_values(models: dict[str, nn.Module], name: str, batch: dict[str, Tensor]) -> None:
    """Demand that every variant begins at the frozen model and that `none` is PEFT's LoRA."""
    with torch.no_grad():
        wanted = models["frozen"](**batch).loss
        for method, model in models.items():
            harness.require_close(f"{name} {method}", model(**batch).loss, wanted, relative=1e-5)
    own, other = models["none"], models["peft"]
    generator = torch.Generator().manual_seed(2)
    pairs = {layer.name: layer for layer in find_layers(own)}
    with torch.no_grad():
        for layer_name, module in other.named_modules():
            if layer_name in pairs:
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
                for tensor, mine in (
                    (A, pairs[layer_name].reslora_A),
                    (B, pairs[layer_name].reslora_B),
                ):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) / 30)
                    mine.copy_(tensor)
        harness.require_close(f"{name} none", own(**batch).loss, other(**batch).loss, relative=1e-4)


def time_model(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the steps' times, the graph breaks and the peak memory of one model."""
    make, rows, length, targets = MODELS[name]
    torch.manual_seed(0)
    plain = make()
    batch = batch_of(name, rows, length)
    methods = ["frozen", "peft", *METHODS]
    models = {m: adapted(copy.deepcopy(plain), targets, m).train() for m in methods}
    models[APART] = adapted(copy.deepcopy(plain), targets, "none").train()
    for layer in find_layers(models[APART]):
        layer.group = ALONE
    check_values(models, name, batch)
    steps, breaks, errors = {}, {}, {}
    for method, model in models.items():
        model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
            lambda module, args, output: output.requires_grad_()
        )
        steps[method] = step_of(model, model, batch)
        if options.compile and name in COMPILED and method not in ("frozen", APART):
            call, count = compiled(model)
            errors[method] = check_against_eager(f"{name} {method}", model, call, batch)
            breaks[method] = count()
            steps[f"{method} compiled"] = step_of(model, call, batch)
    times = harness.measure(steps, rounds=options.rounds, warmup=2)
    table = harness.ratios(times, reference="frozen")
    return {"steps": table, "graph_breaks": breaks, "compiled_error": errors}


def compiled(model: nn.Module) -> tuple[Any, Callable[[], int]]:
    """Return the compiled model, and what counts its graph breaks after a call."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model), lambda: sum(counters["graph_break"].values())


def memory_table(name: str) -> dict[str, dict[str, int]]:
    """Return peak bytes of a step beyond the model, by method, with and without checkpointing.

    Each method has a process of its own: one that has timed models holds pieces of their memory.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return {m: pool.submit(memory_of, name, m).result() for m in ("frozen", "peft", *METHODS)}


def memory_of(name: str, method: str) -> dict[str, int]:
    """Return a method's peaks, in a process that has done nothing else."""
    make, _, _, targets = MODELS[name]
    return_memory_at_once()
    batch = batch_of(name, *MEMORY_BATCH)
    torch.manual_seed(0)
    model = adapted(make(), targets, method).train()
    peaks = {}

    def work() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    with inputs_with_grad(model):
        for way in ("plain", "checkpointed"):
            if way == "checkpointed":
                model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            work()
            peaks[way] = peak_resident_bytes(work)
    return peaks


def main() -> None:
    """Run and write one result file for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    options = parser.parse_args()
    for name in options.models:
        before = harness.environment()
        results = time_model(name, options)
        results["memory"] = memory_table(name) if options.memory else {}
        path = harness.write(
            f"results/step_{name}.json",
            question=__doc__ or "",
            settings={
                "model": name,
                "batch": MODELS[name][1:3],
                "r": RANK,
                "pre_num": METHODS,
                "memory_batch": MEMORY_BATCH,
                "rounds": options.rounds,
            },
            results=results,
            environment_before=before,
        )
        print(harness.format_table(results["steps"], name))
        print(results["graph_breaks"], results["memory"])
        print(f"written to {path}")


if __name__ == "__main__":
    main()
