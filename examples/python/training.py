"""Training of the adapters and the loss on held-out text.

    losses, seconds = train(model, data, TrainSettings(), name="is")   # after reslora.inject(...)
    per_block = block_losses(model, held_out, 8, "cpu")                # one mean loss per block

Every method gets the same seed, the same batches in the same order and the same learning rate.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import corpus
import torch
from console import progress_bar
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class TrainSettings:
    """The same for every method."""

    steps: int = 150
    batch_size: int = 8
    lr: float = 2e-3
    seed: int = 0
    device: str = "cpu"


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the loss of every predicted token, [batch, seq_len - 1]."""
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")


def train(
    model: torch.nn.Module, data: torch.Tensor, settings: TrainSettings, *, name: str
) -> tuple[list[float], float]:
    """Train the parameters that require a gradient; return each step's loss and the seconds."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    source = corpus.batches(data, settings.batch_size, settings.seed)
    warm_up = max(1, settings.steps // 20)
    losses: list[float] = []
    smooth = math.nan
    start = time.monotonic()
    model.train()
    bar = progress_bar(range(settings.steps), name)
    for step in bar:
        rate = min((step + 1) / warm_up, (settings.steps - step) / settings.steps)
        optimizer.param_groups[0]["lr"] = settings.lr * rate
        tokens = next(source).to(settings.device)
        loss = next_token_loss(model(input_ids=tokens, use_cache=False).logits, tokens).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        smooth = losses[0] if step == 0 else 0.9 * smooth + 0.1 * losses[-1]
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
    model.eval()
    return losses, time.monotonic() - start


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: torch.Tensor, device: str) -> torch.Tensor:
    """Return the logits [batch, seq_len, vocabulary] in evaluation mode, on the CPU."""
    model.eval()
    return model(input_ids=tokens.to(device), use_cache=False).logits.float().cpu()


def block_losses(
    model: torch.nn.Module, held_out: torch.Tensor, batch_size: int, device: str
) -> torch.Tensor:
    """Return the mean loss of each held-out block, [blocks]."""
    parts = held_out.split(batch_size)
    return torch.cat(
        [next_token_loss(logits_of(model, part, device), part).mean(1) for part in parts]
    )
