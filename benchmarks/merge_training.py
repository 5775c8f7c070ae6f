"""What the benchmarks of merging share: training an adapter, and what a merge rule makes of it.

trainer = Trainer(model, task, seed, lr=2e-3, steps=200)
trainer.run(trainer.steps)
_, reference = evaluate(model, task)
with merged_by(model, "input"):
    found, _ = evaluate(model, task, reference)     # loss, accuracy, KL, top-1 agreement
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from merge_tasks import Batch, Task
from torch import nn

import reslora
from reslora.injection.adapted import injection_of
from reslora.merging.distance import kl_sum
from reslora.merging.planning import make_plan
from reslora.merging.stand_ins import plain_lora, standing_in


def inputs(batch: Batch) -> Batch:
    """Return what the model is called with, also where an encoder and a decoder take more.

    The `inputs` of merge_tasks.py, which knows decoders alone, is part of what the study's runs are
    dated by, and stays as it is.
    """
    return {key: value for key, value in batch.items() if key != "labels"}


def heads_of(model: nn.Module) -> list[str] | None:
    """Return the parts of a classifier that have no pretrained weights, to be trained whole."""
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return [name for name in ("score", "classifier", "pooler") if name in names] or None


def adapted(task: Task, seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Return the task's model with fresh adapters by some options of ResLoraConfig."""
    model = task.load_model(seed).to(dtype)
    heads = heads_of(model) if task.is_classification else None
    return reslora.inject(model, reslora.ResLoraConfig(modules_to_save=heads, **options))


class Trainer:
    """AdamW with warm-up and linear decay over a fixed number of steps; can be copied mid-way."""

    def __init__(self, model: nn.Module, task: Task, seed: int, lr: float, steps: int) -> None:
        self.model, self.task, self.lr, self.steps = model, task, lr, steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        self.batches = islice(task.training(1000 + seed), steps)
        self.step = 0

    def run(self, until: int) -> None:
        """Train up to a step."""
        warm_up = max(1, self.steps // 20)
        self.model.train()
        for batch in islice(self.batches, until - self.step):
            rate = min((self.step + 1) / warm_up, (self.steps - self.step) / self.steps)
            self.optimizer.param_groups[0]["lr"] = self.lr * rate
            logits = self.model(**inputs(batch)).logits
            loss = self.task.loss(logits, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        self.model.eval()

    def copy(self, seed: int) -> Trainer:
        """Return a trainer that goes on alike, with a model and optimizer state of its own."""
        model = copy.deepcopy(self.model)
        other = Trainer(model, self.task, seed, self.lr, self.steps)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        next(islice(other.batches, self.step - 1, None))
        other.step = self.step
        return other


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, reference: list[torch.Tensor] | None = None
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Return loss, accuracy and, beside reference logits, KL and agreement; and the logits."""
    model.eval()
    loss = hits = divergence = same = 0.0
    count = rows = 0
    outputs = []
    for i, batch in enumerate(task.evaluation()):
        logits = model(**inputs(batch)).logits.float()
        one = task.score(logits, batch)
        loss, hits, count = loss + one[0], hits + one[1], count + one[2]
        if not task.is_classification:
            mask = batch.get("decoder_attention_mask", batch["attention_mask"])
            logits = logits[mask.bool()]
        outputs.append(logits)
        if reference is not None:
            rows += len(logits)
            divergence += float(kl_sum(reference[i], logits))
            same += float((reference[i].argmax(-1) == logits.argmax(-1)).sum())
    result = {"loss": loss / count, "accuracy": hits / count}
    if reference is not None:
        result |= {"kl": divergence / rows, "top1": same / rows}
    return result, outputs


@contextmanager
def merged_by(model: nn.Module, rule: str) -> Iterator[None]:
    """Stand in for every layer by what a rule makes of it, without rounding."""
    injection = injection_of(model, "bench")
    plan = make_plan(injection, rule, "bench", use_affine=False)
    planned = list(zip(injection.layers, plan.layers, strict=True))
    with standing_in(planned, lambda layer, p: plain_lora(layer, p.A, p.B, 1.0)):
        yield
