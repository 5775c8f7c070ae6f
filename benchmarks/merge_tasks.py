"""The tasks that bench_merge.py adapts tiny-llama to: text, worked answers, sentiment.

    task = load("shakespeare", model_folder, data_folder)
    model = task.load_model(seed)
    batch = next(task.training(seed))       # input_ids, attention_mask, labels
    losses, hits, count = task.score(logits, batch)

Data are files beside the project (no download); a missing one is an error that names it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

IGNORED = -100
Batch = dict[str, Tensor]


@dataclass
class Task:
    """Rows to train on and rows held out; a row is (tokens, labels)."""

    name: str
    model_folder: Path
    pad: int
    train: list[tuple[list[int], Any]]
    held_out: list[tuple[list[int], Any]]
    batch_size: int
    is_classification: bool = False

    def load_model(self, seed: int) -> nn.Module:
        """Return the pretrained model, with a fresh head where the task needs one."""
        torch.manual_seed(seed)
        if self.is_classification:
            return LlamaForSequenceClassification.from_pretrained(self.model_folder, num_labels=2)
        return LlamaForCausalLM.from_pretrained(self.model_folder)

    def training(self, seed: int) -> Iterator[Batch]:
        """Yield shuffled batches of the training rows without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for i in range(0, len(order) - self.batch_size + 1, self.batch_size):
                yield self.batch([self.train[j] for j in order[i : i + self.batch_size]])

    def evaluation(self) -> list[Batch]:
        """Return all held-out rows in batches of like lengths."""
        rows = sorted(self.held_out, key=lambda row: len(row[0]))
        size = 4 * self.batch_size
        return [self.batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def batch(self, rows: list[tuple[list[int], Any]]) -> Batch:
        """Pad rows on the right."""
        length = max(len(tokens) for tokens, _ in rows)
        ids = torch.full((len(rows), length), self.pad)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED)
        for i, (tokens, target) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
            if not self.is_classification:
                labels[i, : len(tokens)] = torch.tensor(target)
        if self.is_classification:
            labels = torch.tensor([target for _, target in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def score(self, logits: Tensor, batch: Batch) -> tuple[float, float, int]:
        """Return the summed loss, the number of right predictions and the number of targets."""
        labels = batch["labels"]
        if not self.is_classification:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        hits = (logits.argmax(-1) == labels).sum()
        return float(loss), float(hits), int((labels != IGNORED).sum())


def load(name: str, model_folder: Path, data_folder: Path) -> Task:
    """Return a task by name: shakespeare, gsm8k or sst2."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    make = {"shakespeare": _shakespeare, "gsm8k": _gsm8k, "sst2": _sst2}[name]
    return make(model_folder, data_folder, tokenizer)


def _shakespeare(model: Path, data: Path, tokenizer: Any, length: int = 96) -> Task:
    ids = tokenizer((data / "tinyshakespeare/input.txt").read_text())["input_ids"]
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    rows = [(block, block) for block in blocks]
    cut = int(0.9 * len(rows))
    held_out = rows[cut:]
    return Task("shakespeare", model, 1, rows[:cut], held_out[:: max(1, len(held_out) // 160)], 8)


def _gsm8k(model: Path, data: Path, tokenizer: Any, longest: int = 160) -> Task:
    def rows(lines: list[str]) -> list[tuple[list[int], Any]]:
        found = []
        for line in lines:
            entry = json.loads(line)
            question = tokenizer(entry["question"] + "\n")["input_ids"]
            answer = [*tokenizer(entry["answer"])["input_ids"], 0]
            tokens = (question + answer)[:longest]
            labels = ([IGNORED] * len(question) + answer)[:longest]
            if len(question) < longest - 8:
                found.append((tokens, labels))
        return found

    train = gzip.open(data / "gsm8k/train.jsonl.gz", "rt").read().splitlines()
    test = (data / "gsm8k/test.jsonl").read_text().splitlines()
    return Task("gsm8k", model, 1, rows(train), rows(test[::10]), 4)


def _sst2(model: Path, data: Path, tokenizer: Any) -> Task:
    def rows(part: str) -> list[tuple[list[int], Any]]:
        lines = (data / f"sst2/stsa.binary.{part}").read_text().splitlines()
        return [(tokenizer(line[2:])["input_ids"][:48], int(line[0])) for line in lines]

    return Task("sst2", model, 1, rows("train"), rows("test"), 16, True)
