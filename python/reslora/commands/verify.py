"""Comparing a merged folder with base and adapter, unmerged, on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..files.base_files import base_folder, model_config
from ..files.checkpoint import load
from ..files.folders import PathLike
from ..merging.distance import kl_sum

BLOCK, BLOCKS = 256, 32


@dataclass
class Comparison:
    """Losses in nats per token, and KL(unmerged || merged), on the same tokens."""

    tokens: int
    loss_base: float
    loss_unmerged: float
    loss_merged: float
    kl: float
    top1_agreement: float

    def __str__(self) -> str:
        """Return a sentence for people."""
        return (
            f"on {self.tokens:,} tokens: loss {self.loss_unmerged:.4f} unmerged, "
            f"{self.loss_merged:.4f} merged, {self.loss_base:.4f} without adapter; KL "
            f"{self.kl:.3e}, same prediction for {100 * self.top1_agreement:.2f} %"
        )


def read_words(path: PathLike) -> str:
    """Return the text that a merge is verified on.

    Raises:
        ValueError: for a file that cannot be read, is no UTF-8 or is empty.
    """
    try:
        words = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"[verify] FILE must be one to read; got {path} ({reason})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"[verify] FILE must be UTF-8 text; got {path} ({error})") from None
    if not words.strip():
        raise ValueError(f"[verify] FILE must hold text; got {path}, which is empty")
    return words


def read_blocks(base: PathLike, words: str) -> Tensor:
    """Return at most 32 blocks of at most 256 tokens of a text; needs transformers.

    Raises:
        ValueError: for less than two tokens, and a base that is no causal language model or has no
            tokenizer.
        ImportError: without transformers.
    """
    try:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer
    except ImportError:
        raise ImportError("--verify needs transformers: pip install transformers") from None
    folder = base_folder(base)
    config = model_config(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"[verify] BASE must be a causal language model; got {config.model_type} (in Python, "
            "merge(model, verify=batches) measures any model)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"[verify] BASE must have a tokenizer; got {base} ({reason})") from None
    ids = tokenizer(words)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"[verify] FILE must hold text of at least 2 tokens; got {len(ids)}")
    longest = getattr(config, "max_position_embeddings", None) or BLOCK
    length = min(BLOCK, longest, len(ids))
    count = min(BLOCKS, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def verify_folder(
    base: PathLike, adapter: PathLike, merged: PathLike, blocks: Tensor
) -> Comparison:
    """Compare on blocks of tokens [blocks, length]; needs transformers."""
    from transformers import AutoModelForCausalLM

    folder = base_folder(base)
    count, length = blocks.shape
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    after = AutoModelForCausalLM.from_pretrained(merged).eval()
    losses = [0.0, 0.0, 0.0]
    divergence = same = 0.0
    reference = [_logits(plain, block) for block in blocks]
    adapted = load(plain, adapter).eval()
    for block, before in zip(blocks, reference, strict=True):
        unmerged, own = _logits(adapted, block), _logits(after, block)
        for i, logits in enumerate((before, unmerged, own)):
            losses[i] += float(cross_entropy(logits[:-1], block[1:], reduction="sum"))
        divergence += float(kl_sum(unmerged, own))
        same += float((unmerged.argmax(-1) == own.argmax(-1)).sum())
    targets, rows = count * (length - 1), count * length
    means = [value / targets for value in losses]
    if not all(math.isfinite(value) for value in (*means, divergence)):
        raise ValueError(f"[verify] losses must be finite; got {means} (base, unmerged, merged)")
    loss_base, loss_unmerged, loss_merged = means
    return Comparison(rows, loss_base, loss_unmerged, loss_merged, divergence / rows, same / rows)


def _logits(model: torch.nn.Module, block: Tensor) -> Tensor:
    try:
        return model(input_ids=block[None]).logits[0].float()
    except IndexError as error:
        raise ValueError(
            f"[verify] the tokenizer and the model must be of one vocabulary; got token "
            f"{int(block.max())} ({error})"
        ) from None
