"""The tasks of the study: what is trained on, validated on and tested on.

    task = load("shakespeare", spec, Places(model_folder, data_folder))
    task.rows                  # merge_tasks.Task with the training rows
    task.validation            # batches; task.subset is a fixed part of them
    task.read_test()           # batches; before this call nothing of the test data is read

The rows come from merge_tasks.py; here is only how they are divided. The model tiny-llama was
pretrained on other text (its read-me says which).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import merge_tasks
import torch
from merge_tasks import Batch, Row
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Spec = dict[str, Any]


@dataclass(frozen=True)
class Places:
    """The folder of the model and the folder of the data sets."""

    model: Path
    data: Path


@dataclass
class StudyTask:
    """Training rows, batches to validate on, and a call that reads those to test on."""

    rows: merge_tasks.Task
    validation: list[Batch]
    subset: list[Batch]
    read_test: Callable[[], list[Batch]]


def load(name: str, spec: Spec, places: Places) -> StudyTask:
    """Return a task by its name in the grid, without any of its test data.

    Args:
        name: shakespeare, gsm8k, sst2 or smoke.
        spec: what the grid says of the task.
        places: where model and data lie.

    Raises:
        FileNotFoundError: where one of the folders or files is absent.
    """
    if name == "smoke":
        return _smoke(spec)
    if not (places.model / "config.json").is_file():
        raise FileNotFoundError(f"--model must be a folder with a model; got {places.model}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(places.model)
    maker = {"shakespeare": _Shakespeare, "gsm8k": _Gsm8k, "sst2": _Sst2}[name]
    parts = maker(places.data, tokenizer, spec)
    rows = merge_tasks.Task(name, places.model, 1, parts.train(), [], spec["batch"], name == "sst2")
    return _divided(rows, parts.validation(), parts.test, spec)


def _divided(
    rows: merge_tasks.Task, validation: list[Row], test: Callable[[], list[Row]], spec: Spec
) -> StudyTask:
    """Return a task whose subset is spread evenly over the validation rows."""
    every = max(1, len(validation) // spec["subset_rows"])

    def batches(part: list[Row]) -> list[Batch]:
        return replace(rows, held_out=part).evaluation()

    subset = validation[::every][: spec["subset_rows"]]
    return StudyTask(rows, batches(validation), batches(subset), lambda: batches(test()))


@dataclass
class _Parts:
    data: Path
    tokenizer: Any
    spec: Spec


class _Shakespeare(_Parts):
    """One file, divided by position; only the bytes of the part that is asked for are read."""

    def _part(self, number: int) -> list[Row]:
        path = self.data / "tinyshakespeare/input.txt"
        size, parts = path.stat().st_size, self.spec["parts"]
        start, end = (int(size * sum(parts[:n])) for n in (number, number + 1))
        with path.open("rb") as file:
            file.seek(start)
            text = file.read(end - start).decode("ascii")
        return merge_tasks.text_rows(text, self.tokenizer, self.spec["length"])

    def train(self) -> list[Row]:
        return self._part(0)

    def validation(self) -> list[Row]:
        return self._part(1)

    def test(self) -> list[Row]:
        return self._part(2)


class _Gsm8k(_Parts):
    """Official train and test; every n-th row of train is validation, every n-th of test counts."""

    def _rows(self, name: str, keep: Callable[[int], bool]) -> list[Row]:
        found = merge_tasks.read_lines(self.data / "gsm8k" / name)
        kept = [line for i, line in enumerate(found) if keep(i)]
        return merge_tasks.answer_rows(kept, self.tokenizer, self.spec["length"])

    def train(self) -> list[Row]:
        return self._rows("train.jsonl.gz", lambda i: i % self.spec["validation_every"] != 0)

    def validation(self) -> list[Row]:
        return self._rows("train.jsonl.gz", lambda i: i % self.spec["validation_every"] == 0)

    def test(self) -> list[Row]:
        return self._rows("test.jsonl", lambda i: i % self.spec["test_every"] == 0)


class _Sst2(_Parts):
    """Official train, dev (as validation) and test."""

    def _rows(self, part: str) -> list[Row]:
        found = merge_tasks.read_lines(self.data / f"sst2/stsa.binary.{part}")
        return merge_tasks.sentiment_rows(found, self.tokenizer, self.spec["length"])

    def train(self) -> list[Row]:
        return self._rows("train")

    def validation(self) -> list[Row]:
        return self._rows("dev")

    def test(self) -> list[Row]:
        return self._rows("test")


# ---- A task of seconds


VOCABULARY = 32


class _TinyTask(merge_tasks.Task):
    """Adapts a small random Llama, the same for all seeds, which lies in no folder."""

    def load_model(self, seed: int) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))


def _smoke(spec: Spec) -> StudyTask:
    """Return a task of generated text: every token is the one before it plus 1, 2 or 3."""

    def part(seed: int, count: int) -> list[Row]:
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randint(1, 4, (count, spec["length"]), generator=generator)
        tokens = (steps.cumsum(1) % VOCABULARY).tolist()
        return [(row, row) for row in tokens]

    rows = _TinyTask("smoke", Path(), 1, part(1, 64), [], spec["batch"])
    return _divided(rows, part(2, 8), lambda: part(3, 8), spec)
