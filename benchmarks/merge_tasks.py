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
Row = tuple[list[int], Any]


@dataclass
class Task:
    """Rows to train on and rows held out; a row is (tokens, labels)."""

    name: str
    model_folder: Path
    pad: int
    train: list[Row]
    held_out: list[Row]
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

    def batch(self, rows: list[Row]) -> Batch:
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

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""
        logits, labels = self._targets(logits, batch)
        return cross_entropy(logits, labels, ignore_index=IGNORED)

    def score(self, logits: Tensor, batch: Batch) -> tuple[float, float, int]:
        """Return the summed loss, the number of right predictions and the number of targets."""
        logits, labels = self._targets(logits, batch)
        loss = cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        hits = (logits.argmax(-1) == labels).sum()
        return float(loss), float(hits), int((labels != IGNORED).sum())

    def _targets(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits and labels, row by row; of text each token's are those of the next."""
        labels = batch["labels"]
        if self.is_classification:
            return logits, labels
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def inputs(batch: Batch) -> Batch:
    """Return what the model is called with."""
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def load(name: str, model_folder: Path, data_folder: Path) -> Task:
    """Return a task by name: shakespeare, gsm8k or sst2."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    make = {"shakespeare": _shakespeare, "gsm8k": _gsm8k, "sst2": _sst2}[name]
    return make(model_folder, data_folder, tokenizer)


# ---- Rows of each kind of data


def text_rows(text: str, tokenizer: Any, length: int) -> list[Row]:
    """Return text as windows of `length` tokens that follow each other; every token is a target."""
    ids = tokenizer(text)["input_ids"]
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return [(block, block) for block in blocks]


def answer_rows(lines: list[str], tokenizer: Any, longest: int) -> list[Row]:
    """Return questions with their answers, of which the answers alone are targets.

    Rows are cut off at `longest` tokens; those that would hold fewer than 8 of the answer are left
    out.
    """
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


def sentiment_rows(lines: list[str], tokenizer: Any, longest: int) -> list[Row]:
    """Return sentences, cut off at `longest` tokens, with their labels."""
    return [(tokenizer(line[2:])["input_ids"][:longest], int(line[0])) for line in lines]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, which may be gzipped."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        return file.read().splitlines()


# ---- The tasks


def _shakespeare(model: Path, data: Path, tokenizer: Any, length: int = 96) -> Task:
    rows = text_rows((data / "tinyshakespeare/input.txt").read_text(), tokenizer, length)
    cut = int(0.9 * len(rows))
    held_out = rows[cut:]
    return Task("shakespeare", model, 1, rows[:cut], held_out[:: max(1, len(held_out) // 160)], 8)


def _gsm8k(model: Path, data: Path, tokenizer: Any, longest: int = 160) -> Task:
    train = answer_rows(read_lines(data / "gsm8k/train.jsonl.gz"), tokenizer, longest)
    test = answer_rows(read_lines(data / "gsm8k/test.jsonl")[::10], tokenizer, longest)
    return Task("gsm8k", model, 1, train, test, 4)


def _sst2(model: Path, data: Path, tokenizer: Any) -> Task:
    train, test = (
        sentiment_rows(read_lines(data / f"sst2/stsa.binary.{part}"), tokenizer, 48)
        for part in ("train", "test")
    )
    return Task("sst2", model, 1, train, test, 16, True)
