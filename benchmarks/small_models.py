"""Pretrains small base models for bench_merge.py: like GPT-2, like T5, and an encoder like BERT.

python benchmarks/small_models.py --tokenizer FOLDER --data FOLDER --output FOLDER --minutes 4

The text is WikiText-2, of which one window in twenty is held out. A decoder says each next token,
an encoder with a decoder the second half of a window from its first, an encoder what was masked. A
model is ready when its loss is well below that of random weights; both are printed and written to
loss.json beside the weights. Weights are derived from data with licences of their own: they stay
outside of the project.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from merge_bases import halves
from merge_tasks import IGNORED, Batch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from whole_files import replace_text

LENGTH, BATCH, HELD_OUT = 96, 16, 20
END, PAD = 0, 1  # of the tokenizer
MASKED_SHARE = 0.15
PEAK_RATE, WARM_UP = 2e-3, 30
WIDTH, HEADS, LAYERS = 128, 4, 6


def gpt2(vocabulary: int) -> nn.Module:
    """Return a decoder with random weights."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=2 * LENGTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=END,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )


def t5(vocabulary: int) -> nn.Module:
    """Return an encoder with a decoder, with random weights."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=4 * WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=END,
        )
    )


def bert(vocabulary: int) -> nn.Module:
    """Return an encoder with random weights; one token more stands for what is masked."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=vocabulary + 1,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=2 * LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=PAD,
        )
    )


def whole(windows: Tensor, vocabulary: int, generator: torch.Generator) -> Batch:
    """Return windows of which every next token is a target."""
    return {"input_ids": windows, "labels": windows}


def split(windows: Tensor, vocabulary: int, generator: torch.Generator) -> Batch:
    """Return first halves to read and second halves to say."""
    return halves(windows, windows, torch.ones_like(windows), LENGTH // 2)


def masked(windows: Tensor, vocabulary: int, generator: torch.Generator) -> Batch:
    """Return windows with tokens hidden, which are the targets."""
    hidden = torch.rand(windows.shape, generator=generator) < MASKED_SHARE
    return {
        "input_ids": torch.where(hidden, vocabulary, windows),
        "labels": torch.where(hidden, windows, IGNORED),
    }


Make = Callable[[int], nn.Module]
MakeBatch = Callable[[Tensor, int, torch.Generator], Batch]
MODELS: dict[str, tuple[Make, MakeBatch]] = {
    "gpt2": (gpt2, whole),
    "t5": (t5, split),
    "bert": (bert, masked),
}


def windows_of(data: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return windows to train on and those held out, [number, tokens]."""
    parts = [(data / f"wikitext2/{part}.txt").read_text() for part in ("valid", "test")]
    ids = torch.tensor(tokenizer("".join(parts))["input_ids"])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    is_held_out = torch.arange(len(windows)) % HELD_OUT == 0
    return windows[~is_held_out], windows[is_held_out]


@torch.no_grad()
def loss_of(model: nn.Module, windows: Tensor, make_batch: MakeBatch, vocabulary: int) -> float:
    """Return the mean loss over windows."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    batches = [make_batch(part, vocabulary, generator) for part in windows.split(4 * BATCH)]
    losses = [float(model(**batch).loss) * len(batch["input_ids"]) for batch in batches]
    return sum(losses) / len(windows)


def pretrain(
    model: nn.Module, windows: Tensor, make_batch: MakeBatch, vocabulary: int, minutes: float
) -> int:
    """Train for minutes of processor time, the rate falling with them; return the steps."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    begin, step = time.process_time(), 0
    with tqdm(total=round(60 * minutes), unit="s", desc="pretraining", leave=False) as bar:
        while (spent := (time.process_time() - begin) / (60 * minutes)) < 1:
            step += 1
            optimizer.param_groups[0]["lr"] = PEAK_RATE * min(step / WARM_UP, 1 - spent)
            chosen = torch.randint(len(windows), (BATCH,), generator=generator)
            loss = model(**make_batch(windows[chosen], vocabulary, generator)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(step=step, loss=f"{loss.item():.3f}")
            bar.update(round(60 * minutes * spent) - bar.n)
    return step


def make(name: str, options: argparse.Namespace) -> str:
    """Pretrain one model and write it; return a sentence about it."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    windows, held_out = windows_of(options.data, tokenizer)
    make_model, make_batch = MODELS[name]
    vocabulary = len(tokenizer)
    model = make_model(vocabulary)
    random = loss_of(model, held_out, make_batch, vocabulary)
    steps = pretrain(model, windows, make_batch, vocabulary, options.minutes)
    trained = loss_of(model, held_out, make_batch, vocabulary)
    size = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(options.output / name)
    losses = {"random": random, "trained": trained, "steps": steps, "parameters": size}
    replace_text(options.output / name / "loss.json", json.dumps(losses) + "\n")
    return (
        f"{name}: {size / 1e6:.1f} M parameters, {steps} steps; loss on held-out windows "
        f"{trained:.3f}, of random weights {random:.3f}"
    )


def main(arguments: list[str]) -> int:
    """Pretrain the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tiny-llama")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder outside of the project")
    parser.add_argument(
        "--minutes", type=float, default=4, help="of a core, for each model (default: 4)"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args(arguments)
    for name in options.models:
        print(make(name, options), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
