"""A small Llama-architecture model, pretrained on the spot and kept for the next run.

    folder = pretrain.small_llama(cache, PretrainSettings())   # config, weights, tokenizer

The text is the docstrings of Python's standard library. The folder's name is made from the settings
and the Python version, and it appears under that name only when it is complete: a run that was
interrupted leaves nothing that a later run could mistake for a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import corpus
import tokenizers
import torch
from console import progress_bar
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"


@dataclass(frozen=True)
class PretrainSettings:
    """What decides the weights: a change of any makes another folder in the cache."""

    steps: int
    seconds: float = 100.0  # the schedule ends early on a slow machine
    hidden_size: int = 128
    layers: int = 6
    heads: int = 4
    vocabulary: int = 1024
    seq_len: int = 128
    batch_size: int = 8
    lr: float = 3e-3
    seed: int = 0


def small_llama(cache: Path, settings: PretrainSettings) -> Path:
    """Return the folder of the pretrained model, making it first where the cache lacks it."""
    made_of = json.dumps([asdict(settings), platform.python_version_tuple()[:2], "format 1"])
    key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    folder = cache / f"small-llama-{key}"
    if folder.is_dir():
        print(f"small model: pretrained in an earlier run, {folder}")
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=cache))
    try:
        _pretrain(unfinished, settings)
        unfinished.chmod(0o755)
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # else another run was faster, and its model is as good
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
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
