"""A small Llama-architecture model, pretrained on the spot and kept for the next run.

    folder = pretrain.small_llama(cache, PretrainSettings(steps=700))   # config, weights, tokenizer

The text is the docstrings of Python's standard library. The folder appears under its name only
when it is complete: an interrupted run leaves nothing that a later one could mistake for a model.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import corpus
import interrupts
import tokenizers
import torch
from console import progress_bar
from places import PretrainSettings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"


def small_llama(cache: Path, settings: PretrainSettings) -> Path:
    """Return the folder of the pretrained model, making it first where the cache lacks it."""
    folder = settings.folder(cache)
    if folder.is_dir():
        print(f"small model: pretrained in an earlier run, {folder}")
        return folder
    with interrupts.temporary(cache) as unfinished:
        _pretrain(unfinished, settings)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster, and its model is as good
                raise
    return folder


def _pretrain(folder: Path, settings: PretrainSettings) -> None:
    print("small model: pretraining on the docstrings of Python's standard library (once)")
    documents = corpus.docstrings()
    tokenizer = _train_tokenizer(documents, settings.vocabulary)
    data = corpus.blocks(documents, tokenizer, settings.seq_len)
    torch.manual_seed(settings.seed)
    model = _untrained(settings, tokenizer)
    stats = _train(model, data, settings)
    stats |= {"tokens": data.numel(), "parameters": sum(p.numel() for p in model.parameters())}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps(asdict(settings) | stats, indent=2))


def _train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def _untrained(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.hidden_size * 3,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads // 2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _train(model: LlamaForCausalLM, data: torch.Tensor, settings: PretrainSettings) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    source = corpus.batches(data, settings.batch_size, settings.seed)
    start = time.monotonic()
    smooth, step = None, 0
    with progress_bar(range(settings.steps), "pretraining") as bar:
        while step < settings.steps:
            progress = max(step / settings.steps, (time.monotonic() - start) / settings.seconds)
            if progress >= 1:
                break
            decay = 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / 30) * decay
            batch = next(source)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            bar.update()
            step += 1
    model.eval()
    return {"steps_made": step, "seconds_taken": time.monotonic() - start, "loss": smooth}
