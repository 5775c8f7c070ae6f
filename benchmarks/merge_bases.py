"""The tasks of merge_tasks.py for other base models: those that small_models.py pretrains.

    task = load("shakespeare", "t5", tokenizer_folder, folder_of_small_models, data_folder)

A task is loaded with at most so many rows to test on, which are taken evenly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import merge_tasks
import torch
from merge_tasks import Batch, Row, Task
from merge_training import inputs
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

TINY_LLAMA = "tiny-llama"
START = 0  # what a decoder begins with: the end of a document


class SmallTask(Task):
    """A task of a small model: text of a decoder, or classes of an encoder with a head."""

    def load_model(self, seed: int) -> nn.Module:
        """Return the pretrained model, with a fresh head where the task needs one."""
        torch.manual_seed(seed)
        if self.is_classification:
            return AutoModelForSequenceClassification.from_pretrained(
                self.model_folder, num_labels=2
            )
        return AutoModelForCausalLM.from_pretrained(self.model_folder)


class HalvesTask(Task):
    """Text of an encoder with a decoder: the second half of a row is to be said from its first."""

    def load_model(self, seed: int) -> nn.Module:
        """Return the pretrained model."""
        torch.manual_seed(seed)
        return AutoModelForSeq2SeqLM.from_pretrained(self.model_folder)

    def batch(self, rows: list[Row]) -> Batch:
        """Split rows in the middle."""
        batch = super().batch(rows)
        middle = batch["input_ids"].shape[1] // 2
        return halves(batch["input_ids"], batch["labels"], batch["attention_mask"], middle)

    def _targets(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return logits.flatten(0, 1), batch["labels"].flatten()


def halves(ids: Tensor, labels: Tensor, mask: Tensor, middle: int) -> Batch:
    """Return what an encoder reads, up to the middle, and what a decoder says after it."""
    said = ids[:, middle:]
    return {
        "input_ids": ids[:, :middle],
        "attention_mask": mask[:, :middle],
        "decoder_input_ids": torch.cat([torch.full_like(said[:, :1], START), said[:, :-1]], 1),
        "decoder_attention_mask": mask[:, middle:],
        "labels": labels[:, middle:].contiguous(),
    }


KINDS = {TINY_LLAMA: Task, "gpt2": SmallTask, "bert": SmallTask, "t5": HalvesTask}


def load(name: str, base: str, tiny_llama: Path, models: Path, data: Path, tests: int) -> Task:
    """Return a task by name for a base model by name, with at most `tests` rows held out."""
    task = merge_tasks.load(name, tiny_llama, data)
    step = -(-len(task.held_out) // tests)
    task = replace(task, held_out=task.held_out[::step])
    folder = tiny_llama if base == TINY_LLAMA else models / base
    return KINDS[base](**vars(task) | {"model_folder": folder})


def first_rows(stream: Iterator[Batch], rows: int, pad: int) -> list[Batch]:
    """Return what a model is called with for the first `rows` tokens that are no padding."""
    found: list[Batch] = []
    while rows > 0:
        batch = _cut(inputs(next(stream)), rows, pad)
        rows -= int(batch["attention_mask"].sum())
        found.append(batch)
    return found


def _cut(batch: Batch, rows: int, pad: int) -> Batch:
    """Cut a batch off after so many tokens, by each of its masks.

    What is cut away is padding then, so that a classifier finds the last token of a sentence.
    """
    cut = dict(batch)
    for key in [key for key in batch if key.endswith("attention_mask")]:
        mask, ids = batch[key], key.replace("attention_mask", "input_ids")
        cut[key] = mask * (mask.flatten().cumsum(0).view_as(mask) <= rows)
        cut[ids] = torch.where(cut[key].bool(), batch[ids], pad)
    used = cut["attention_mask"].any(1)
    return {key: value[used] for key, value in cut.items()}
