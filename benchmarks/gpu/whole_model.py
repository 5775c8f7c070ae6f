"""What does a training step of a whole Llama of 1 B parameters cost, and how much memory?

Random weights, made on the device; all linear layers adapted, r 16, dropout 0.05, bf16; forward,
loss and backward. The reference is the frozen model with gradients down to its embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench_step import LLAMA, METHODS
from session import Session
from speed import peak_of, reason_of, table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import reslora

BATCH, LENGTH = 4, 1024
RANK, ALPHA, DROPOUT = 16, 16, 0.05


def llama(session: Session) -> nn.Module:
    """Make the model on the device."""
    is_full = session.scale == 1
    config = LlamaConfig(
        vocab_size=session.size(128256),
        hidden_size=session.size(2048),
        intermediate_size=session.size(8192),
        num_hidden_layers=16 if is_full else 2,
        num_attention_heads=32 if is_full else 4,
        num_key_value_heads=8 if is_full else 2,
        use_cache=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(session.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def adapted(model: nn.Module, method: str) -> nn.Module:
    """Return the model frozen, with PEFT's LoRA, or with a shortcut."""
    options: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT}
    if method == "frozen":
        return model.requires_grad_(False)
    if method == "peft":
        import peft

        config = peft.LoraConfig(target_modules=LLAMA, **options)
        return peft.inject_adapter_in_model(config, model.requires_grad_(False))
    own = reslora.ResLoraConfig(
        target_modules=LLAMA, res_mode=method, pre_num=METHODS[method], **options
    )
    return reslora.inject(model, own)


def step_of(session: Session, method: str) -> tuple[Callable[[], None], int]:
    """Return a training step and the bytes that it holds at most beyond the model."""
    model = adapted(llama(session), method).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, session.size(LENGTH))
    ids = torch.randint(3, session.size(128256), shape, generator=generator).to(session.device)
    # As in training where all layers learn, and the frozen model's layers have work, too.
    model.get_input_embeddings().register_forward_hook(lambda *all: all[-1].requires_grad_())

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    step()
    return step, peak_of(session, step)


def run(session: Session) -> None:
    """Make every variant, then time them in interleaved rounds."""
    steps, peaks, failed = {}, {}, {}
    for method in ("frozen", "peft", *METHODS):
        try:
            steps[method], peaks[method] = step_of(session, method)
            session.say(f"{method}: {peaks[method] / 1e9:.2f} GB beyond the model")
            session.record({"method": method, "peak_bytes": peaks[method]})
        except (RuntimeError, ValueError, ImportError) as error:
            failed[method] = reason_of(error)
    rounds, results = table(session, steps, session.left() / 2 - 2)
    batch = [BATCH, session.size(LENGTH)]
    session.record({"batch": batch, "rounds": rounds, "failed": failed, "results": results})
    ratios = [f"{name} {row['ratio']['median']:.3f}" for name, row in results.items()]
    session.say(f"a step of a Llama: {', '.join(ratios)} {failed or ''}")
