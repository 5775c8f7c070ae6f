"""Lines of studies that did not take place: the figures of every method are planted."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

Line = dict[str, Any]
Grid = dict[str, Any]
VERSIONS = {"torch": "0", "reslora": "0"}
LOSS = 3.8  # of LoRA on average


def small_grid(grid: Grid, *tasks: str, ranks: tuple[int, ...] = (2,)) -> Grid:
    """Return the grid with some of its tasks and ranks only."""
    questions = [
        question | {"tasks": [task], "ranks": list(ranks)}
        for question in grid["questions"]
        for task in question["tasks"]
        if task in tasks
    ]
    return grid | {"questions": questions}


def line_of(method: str, rank: int, rate: float, seed: int, phase: str, loss: float) -> Line:
    """Return the line of a run on tinyshakespeare that ended with a loss."""
    run = {"task": "shakespeare", "method": method, "rank": rank, "rate": rate, "seed": seed}
    metrics = {"loss": loss, "accuracy": 1 - loss / 10}
    return run | {
        "phase": phase,
        "steps": 600,
        "diverged": False,
        "validation_curve": [[300, loss + 0.1], [600, loss]],
        "validation": metrics,
        "test": metrics if phase == "test" else None,
        "trainable_parameters": 200 if method == "lora 2r" else 100,
        "device": "cpu",
        "versions": VERSIONS,
    }


def tuning_of(method: str, rank: int, grid: Grid) -> list[Line]:
    """Return a tuning that ends with the rate that it began with."""
    start = grid["methods"][method]["start"][str(rank)]
    return [
        line_of(method, rank, float(f"{start * 2 ** (n / 2):.6g}"), 1000, "tune", 3.7 + abs(n) / 90)
        for n in (0, 2, -2, 1, -1)
    ]


def runs_at_start(method: str, rank: int, grid: Grid, losses: Mapping[int, float]) -> list[Line]:
    """Return test runs at that rate, by seed."""
    start = grid["methods"][method]["start"][str(rank)]
    return [line_of(method, rank, start, seed, "test", loss) for seed, loss in losses.items()]


def frozen_line(loss: float = 5.0) -> Line:
    """Return the line of the base as it is."""
    return line_of("frozen", 0, 0.0, 1, "test", loss) | {"trainable_parameters": 0}


def planted(
    grid: Grid,
    effects: Mapping[str, float],
    draw: random.Random,
    noise: float = 0.003,
    shared: float = 0.05,
    seeds: int = 5,
) -> list[Line]:
    """Return the lines of all methods of the first question at its first rank.

    Args:
        grid: what is planned.
        effects: by how much a method's loss lies above LoRA's; 0 for those without one.
        draw: where the noise comes from.
        noise: standard deviation of a run's own noise.
        shared: that of the noise which all methods of a seed share.
        seeds: how many are tested.
    """
    question = grid["questions"][0]
    rank = question["ranks"][0]
    levels = {seed: LOSS + draw.gauss(0, shared) for seed in grid["test_seeds"][:seeds]}
    lines = [frozen_line()]
    for method in question["methods"]:
        if method != "frozen":
            effect = effects.get(method, 0.0)
            losses = {s: level + effect + draw.gauss(0, noise) for s, level in levels.items()}
            lines += tuning_of(method, rank, grid) + runs_at_start(method, rank, grid, losses)
    return lines
