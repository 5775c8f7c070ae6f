"""One run: adapt, train, validate and, in the test phase, test. `one_run` returns its line.

On one machine, with one thread, a repeated run gives the same curves and metrics bit by bit: the
seed sets the order of the batches, the first A and a new head, and dropout is 0.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from lines import Line, Run
from memory import peak_resident_bytes
from merge_tasks import Batch, Task, inputs
from methods import adapt, make_optimizer, trained
from tasks import Spec, StudyTask
from torch import nn


@dataclass
class Record:
    """What is measured while a model is trained; curves are lists of [step, loss]."""

    training: list[list[float]] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    seconds_per_step: list[float] = field(default_factory=list)
    peak_memory: int = 0
    diverged: bool = False

    def note(self, curve: list[list[float]], step: int, loss: float) -> bool:
        """Add a point to a curve; return False, and add none, where the loss has diverged."""
        self.diverged = not math.isfinite(loss)
        if not self.diverged:
            curve.append([step, loss])
        return not self.diverged


def one_run(
    run: Run, task: StudyTask, grid: dict[str, Any], device: str, origin: dict[str, Any]
) -> Line:
    """Train one model and return the line of the run.

    Args:
        run: what to run.
        task: its task; the test data are read in the phase `test` alone.
        grid: the whole grid.
        device: cpu or cuda.
        origin: versions and commits, for the line.
    """
    start = time.monotonic()
    set_deterministic(device)
    spec, options = grid["tasks"][run.task], grid["methods"][run.method]
    model = task.rows.load_model(run.seed).to(device)
    model.config.use_cache = False
    model = adapt(model, options, run.rank, run.seed, grid["targets"])
    parameters = trained(model)
    record = Record()
    if parameters:
        optimizer = make_optimizer(model, options, run.rate)
        record = fit(model, optimizer, task, spec, run.seed)
    metrics: dict[str, Any] = {"validation": None, "test": None}
    if not record.diverged:
        metrics["validation"] = evaluate(model, task.rows, task.validation)
        record.diverged = not math.isfinite(metrics["validation"]["loss"])
    if record.diverged:
        metrics["validation"] = None
    elif run.phase == "test":
        metrics["test"] = evaluate(model, task.rows, task.read_test())
    seconds = record.seconds_per_step
    return run.as_dict() | {
        "steps": spec["steps"] if parameters else 0,
        "diverged": record.diverged,
        "training_curve": record.training,
        "validation_curve": record.validation,
        **metrics,
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "seconds": round(time.monotonic() - start, 2),
        "peak_memory_bytes": record.peak_memory or None,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "device": device,
        **origin,
    }


def set_deterministic(device: str) -> None:
    """Let torch take the same path in every run."""
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: StudyTask, spec: Spec, seed: int
) -> Record:
    """Train by the grid's steps and return what was measured; stop where the loss diverges.

    A point of the training curve is the mean over a window of steps, before each of them; one of
    the validation curve is the loss on the fixed subset after so many steps.
    """
    record = Record()
    batches = islice(task.rows.training(seed), spec["steps"])
    schedule = _schedule(optimizer, spec)

    def window() -> float:
        return _train_window(model, optimizer, task.rows, batches, schedule, spec["window"])

    for end in range(spec["window"], spec["steps"] + 1, spec["window"]):
        before = time.perf_counter()
        if end == spec["window"]:
            loss, record.peak_memory = _with_peak(window, next(model.parameters()).device)
        else:
            loss = window()
            record.seconds_per_step.append((time.perf_counter() - before) / spec["window"])
        if not record.note(record.training, end, loss):
            break
        if end in spec["validation_at"]:
            loss = evaluate(model, task.rows, task.subset)["loss"]
            if not record.note(record.validation, end, loss):
                break
    return record


def _schedule(optimizer: torch.optim.Optimizer, spec: Spec) -> Iterator[None]:
    """Set the rates of each step: linear warm-up, then linear decay to 0."""
    steps, warm_up = spec["steps"], spec["warm_up"]
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        factor = min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        yield


def _train_window(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Task,
    batches: Iterator[Batch],
    schedule: Iterator[None],
    count: int,
) -> float:
    """Take some steps and return the mean of their losses."""
    model.train()
    device = next(model.parameters()).device
    losses = []
    for batch in islice(batches, count):
        next(schedule)
        batch = {key: value.to(device) for key, value in batch.items()}
        loss = rows.loss(model(**inputs(batch)).logits, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return float(torch.stack(losses).double().mean())


def _with_peak(work: Callable[[], float], device: torch.device) -> tuple[float, int]:
    """Return what work returns, and by how many bytes the memory in use grew meanwhile."""
    results: list[float] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results.append(work())
        return results[0], torch.cuda.max_memory_allocated(device) - before
    peak = peak_resident_bytes(lambda: results.append(work()))
    return results[0], peak


@torch.no_grad()
def evaluate(model: nn.Module, rows: Task, batches: list[Batch]) -> dict[str, float]:
    """Return the mean loss over all targets and the share that is predicted rightly."""
    model.eval()
    device = next(model.parameters()).device
    loss = hits = count = 0.0
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        one = rows.score(model(**inputs(batch)).logits, batch)
        loss, hits, count = loss + one[0], hits + one[1], count + one[2]
    return {"loss": loss / count, "accuracy": hits / count}
