"""What is to be run: the cells of the grid (task, method, rank), and what each of them still lacks.

Everything here follows from the lines that exist and from the grid, and from nothing else, so that
a study goes on alike after a kill, on another day, or with another number of processes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lines import Line, Run, run_of
from rates import best_index, index_of, next_indices, rate_at

Grid = dict[str, Any]
TYPICAL_TUNING = 5  # runs of a cell that needs no extension


@dataclass(frozen=True)
class Cell:
    """One method on one task at one rank (0 where it has no adapter), and how many test seeds."""

    task: str
    method: str
    rank: int
    seeds: int


def cells_of(question: dict[str, Any], grid: Grid, task: str) -> Iterator[Cell]:
    """Yield the cells of a question, rank by rank; those without a rank come with the first."""
    for place, rank in enumerate(question["ranks"]):
        for method in question["methods"]:
            kind = grid["methods"][method]["kind"]
            if kind not in ("head", "frozen"):
                yield Cell(task, method, rank, question["seeds"])
            elif place == 0:
                yield Cell(task, method, 0, 1 if kind == "frozen" else question["seeds"])


def scores_of(cell: Cell, lines: Sequence[Line], grid: Grid) -> dict[int, float]:
    """Return what tuning has measured: validation loss, infinite where a run diverged, by place."""
    return {
        index_of(line["rate"], grid["lattice_base"]): (
            math.inf if line["diverged"] else line["validation"]["loss"]
        )
        for line in lines
        if line["phase"] == "tune" and is_of(cell, line)
    }


def tuned(cell: Cell, lines: Sequence[Line], grid: Grid) -> tuple[list[int], int | None]:
    """Return the places of the lattice to try next, and the best place once there are none."""
    scores = scores_of(cell, lines, grid)
    start = grid["methods"][cell.method]["start"][str(cell.rank)]
    pending = next_indices(scores, index_of(start, grid["lattice_base"]))
    return pending, None if pending else best_index(scores)


def missing(cell: Cell, lines: Sequence[Line], grid: Grid) -> list[Run]:
    """Return the runs of a cell that can start now: of its tuning, then at its best rate."""
    key = (cell.task, cell.method, cell.rank)
    rate = 0.0
    if grid["methods"][cell.method]["kind"] != "frozen":
        pending, best = tuned(cell, lines, grid)
        if best is None:
            rates = [rate_at(index, grid["lattice_base"]) for index in pending]
            return [Run(*key, rate, grid["tuning_seed"], "tune") for rate in rates]
        rate = rate_at(best, grid["lattice_base"])
    done = {run_of(line) for line in lines if line["phase"] == "test"}
    runs = [Run(*key, rate, seed, "test") for seed in grid["test_seeds"][: cell.seeds]]
    return [run for run in runs if run not in done]


def runs_left(cell: Cell, lines: Sequence[Line], grid: Grid) -> int:
    """Return how many runs a cell lacks; while its rate is not found, at least."""
    now = missing(cell, lines, grid)
    if not now or now[0].phase == "test":
        return len(now)
    done = sum(line["phase"] == "tune" and is_of(cell, line) for line in lines)
    return max(len(now), TYPICAL_TUNING - done) + cell.seeds


def next_runs(lines: Sequence[Line], grid: Grid, task: str) -> list[Run]:
    """Return all runs that can start now, those first that complete an answer at least cost.

    Questions go by their order, ranks by theirs; what the others are compared with goes first, then
    cells that have begun, then the cell that lacks the fewest seconds.
    """
    ordered: list[tuple[tuple[Any, ...], Cell]] = []
    for number, question in enumerate(grid["questions"]):
        if task in question["tasks"]:
            for place, cell in enumerate(cells_of(question, grid, task)):
                left = seconds_left(cell, lines, grid)
                rank = question["ranks"].index(cell.rank) if cell.rank else 0
                is_other = cell.method != question["methods"][0]
                is_fresh = not any(is_of(cell, line) for line in lines)
                ordered.append(((number, rank, is_other, is_fresh, left, place), cell))
    runs = [run for _, cell in sorted(ordered) for run in missing(cell, lines, grid)]
    return list(dict.fromkeys(runs))


def seconds_of(cell: Cell | Run, lines: Sequence[Line], grid: Grid) -> float:
    """Return what a run of a cell takes: the median of the likest runs that were measured."""
    is_frozen = cell.method == "frozen"
    timed = [
        line
        for line in lines
        if line["task"] == cell.task and (line["method"] == "frozen") == is_frozen
    ]
    for keys in (("method", "rank"), ("method",), ()):
        likest = [line for line in timed if all(line[key] == getattr(cell, key) for key in keys)]
        if likest:
            return statistics.median(line["seconds"] for line in likest)
    return grid["tasks"][cell.task]["seconds"] * (0.1 if is_frozen else 1.0)


def seconds_left(cell: Cell, lines: Sequence[Line], grid: Grid) -> float:
    """Return what completing a cell takes on one core, while its rate is not found at least."""
    return runs_left(cell, lines, grid) * seconds_of(cell, lines, grid)


def is_of(cell: Cell, line: Line) -> bool:
    """Say whether a line is of a cell."""
    return (line["task"], line["method"], line["rank"]) == (cell.task, cell.method, cell.rank)
