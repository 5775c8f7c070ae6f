"""What the lines of a study say: each method beside tuned LoRA, on each task at each rank.

    for setting in settings_of(unique(lines), grid):    # a task at a rank
        for one in setting.comparisons:                 # a method in it
            print(one.method.cell, one.interval, one.corrected, one.verdict)

Every figure is of the kind of which less is better: a loss, or the share predicted wrongly in
percent; a negative difference is a gain over LoRA. A method is judged at the rate that the study's
own rule has found (cells.py) and not before all of its planned seeds are there. Holm's correction
counts all methods that the grid plans for a task and rank, also those that have not been run, so
that no verdict becomes weaker by the order in which cells are completed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cells import Cell, Grid, cells_of, is_of, scores_of, tuned
from lines import Line, run_of
from paired import Interval, holm, interval, p_value
from rates import best_index, rate_at

ALPHA = 0.05
TRIAL = "smoke"  # the question that shows only that the program runs


@dataclass(frozen=True)
class Measured:
    """What the lines hold of a cell.

    Attributes:
        cell: which.
        scores: validation losses of the tuning by the rate's place on the lattice.
        rate: the tuned rate; None while the rule asks for more runs; 0 where nothing is trained.
        is_at_edge: whether no rate beyond the best one so far was tried to one of its sides.
        tests: the lines at the tuned rate by seed.
        other_tests: how many test lines are at other rates; they count for nothing.
        parameters: how many are trained, None where there is no line.
    """

    cell: Cell
    scores: dict[int, float]
    rate: float | None
    is_at_edge: bool
    tests: dict[int, Line]
    other_tests: int
    parameters: int | None

    @property
    def is_complete(self) -> bool:
        """Whether all planned seeds have been tested at the tuned rate."""
        return self.rate is not None and len(self.tests) >= self.cell.seeds

    @property
    def is_missing(self) -> bool:
        """Whether there is no line."""
        return self.parameters is None


@dataclass
class Comparison:
    """A method beside tuned LoRA; numbers are None where they cannot be said.

    Attributes:
        method: what the lines hold of it.
        differences: method minus LoRA by seed, for the seeds that both have; infinite where the
            method diverged, NaN where LoRA did.
        interval: of the mean difference.
        p_value: that of no difference, where all planned seeds are there.
        corrected: the same after Holm's correction.
        verdict: "better", "worse", "no difference found", or None where cells are incomplete.
        one_rate: (rate, difference of the validation loss) as the paper compares: the tuning runs
            of both at the rate that is LoRA's best of those that both were run at.
        steps: by seed, after how many steps the method has LoRA's final validation loss.
        has_more_parameters: whether it trains more than LoRA.
    """

    method: Measured
    differences: dict[int, float]
    interval: Interval | None = None
    p_value: float | None = None
    corrected: float | None = None
    verdict: str | None = None
    one_rate: tuple[float, float] | None = None
    steps: dict[int, float] = field(default_factory=dict)
    has_more_parameters: bool = False

    @property
    def diverged(self) -> int:
        """How many of the method's test runs have diverged."""
        return sum(math.isinf(difference) for difference in self.differences.values())


@dataclass
class Setting:
    """A task at a rank: LoRA, the base without adapters, and the others beside LoRA.

    Attributes:
        signal: "signal" where tuned LoRA beats the base by more than the interval over the seeds,
            else "no signal"; "not run" while runs for it are missing. Only the first counts.
    """

    task: str
    rank: int
    metric: str
    reference: Measured
    base: Measured | None
    comparisons: list[Comparison]
    signal: str

    @property
    def name(self) -> str:
        """How pages call it."""
        return f"{self.task} r {self.rank}"

    @property
    def counts(self) -> bool:
        """Whether verdicts in it count."""
        return self.signal == "signal"

    @property
    def is_begun(self) -> bool:
        """Whether there is a line of LoRA or of another adapter."""
        return not all(one.is_missing for one in (self.reference, *self.methods))

    @property
    def methods(self) -> list[Measured]:
        """The methods that are compared with LoRA."""
        return [one.method for one in self.comparisons]

    def mean_of(self, method: Measured) -> float:
        """Return the mean test figure of a method that has been tested."""
        values = values_of(method, self.metric).values()
        return sum(values) / len(values)


def unique(lines: Sequence[Line]) -> list[Line]:
    """Return the first line of every run."""
    found: dict[Any, Line] = {}
    for line in lines:
        found.setdefault(run_of(line), line)
    return list(found.values())


def planned_cells(grid: Grid) -> dict[tuple[str, int], list[Cell]]:
    """Return the grid's cells by task and rank, each once, with the most seeds any question asks.

    The first of each is what the others are compared with; rank 0 is the base.
    """
    found: dict[tuple[str, int], dict[str, Cell]] = {}
    for question in grid["questions"]:
        for task in question["tasks"] if question["name"] != TRIAL else []:
            for cell in cells_of(question, grid, task):
                own = found.setdefault((task, cell.rank), {})
                if cell.method not in own or own[cell.method].seeds < cell.seeds:
                    own[cell.method] = cell
    return {key: list(own.values()) for key, own in found.items()}


def measured(cell: Cell, lines: Sequence[Line], grid: Grid) -> Measured:
    """Return what the lines hold of a cell."""
    own = [line for line in lines if is_of(cell, line)]
    scores = scores_of(cell, own, grid)
    rate: float | None = 0.0
    if grid["methods"][cell.method]["kind"] != "frozen":
        _, best = tuned(cell, own, grid)
        rate = None if best is None else rate_at(best, grid["lattice_base"])
    tested = [line for line in own if line["phase"] == "test"]
    tests = {
        line["seed"]: line
        for line in tested
        if line["rate"] == rate and line["seed"] in grid["test_seeds"]
    }
    is_at_edge = bool(scores) and best_index(scores) in (min(scores), max(scores))
    parameters = own[0]["trainable_parameters"] if own else None
    return Measured(cell, scores, rate, is_at_edge, tests, len(tested) - len(tests), parameters)


def values_of(method: Measured, metric: str) -> dict[int, float]:
    """Return the test figures by seed, infinite where a run diverged."""
    return {seed: _value(line, metric) for seed, line in sorted(method.tests.items())}


def _value(line: Line, metric: str) -> float:
    if line["diverged"] or line["test"] is None:
        return math.inf
    test = line["test"]
    value = test["loss"] if metric == "loss" else 100 * (1 - test["accuracy"])
    return value if math.isfinite(value) else math.inf


def settings_of(lines: Sequence[Line], grid: Grid) -> Iterator[Setting]:
    """Yield every task at every rank that the grid plans, in its order.

    Args:
        lines: one of each run, see `unique`.
        grid: what is planned.
    """
    cells = planned_cells(grid)
    for (task, rank), planned in cells.items():
        if rank:
            of_task = [line for line in lines if line["task"] == task]
            first, *others = (measured(cell, of_task, grid) for cell in planned)
            bases = [measured(cell, of_task, grid) for cell in cells.get((task, 0), [])]
            yield _setting(first, others, bases[0] if bases else None, grid)


def _setting(first: Measured, others: list[Measured], base: Measured | None, grid: Grid) -> Setting:
    """Return a setting with the verdicts on all of its methods."""
    task, rank = first.cell.task, first.cell.rank
    metric = grid["tasks"][task].get("metric", "loss")
    comparisons = [_compared(one, first, metric, grid) for one in others]
    known = [1.0 if one.p_value is None else one.p_value for one in comparisons]
    for one, corrected in zip(comparisons, holm(known), strict=True):
        if one.p_value is not None:
            one.corrected = corrected
            one.verdict = _verdict(one)
    signal = _signal(first, base, metric, grid) if base else "not run"
    return Setting(task, rank, metric, first, base, comparisons, signal)


def _compared(method: Measured, reference: Measured, metric: str, grid: Grid) -> Comparison:
    """Return a comparison that has no verdict yet."""
    one = Comparison(method, _differences(method, reference, metric))
    one.one_rate = _at_one_rate(method, reference, grid)
    one.steps = {
        seed: steps_to(method.tests[seed], final_loss(reference.tests[seed]))
        for seed, difference in one.differences.items()
        if not math.isnan(difference)
    }
    if not method.is_missing and not reference.is_missing:
        one.has_more_parameters = method.parameters > reference.parameters
    values = list(one.differences.values())
    is_finite = all(map(math.isfinite, values))
    if len(values) > 1 and is_finite:
        one.interval = interval(values)
    needed = max(2, method.cell.seeds)
    if len(values) >= needed and method.is_complete and reference.is_complete:
        if is_finite:
            one.p_value = p_value(values)
        elif not any(map(math.isnan, values)):
            one.p_value = 1.0  # no mean to test; the runs that diverged are the verdict
    return one


def _differences(method: Measured, reference: Measured, metric: str) -> dict[int, float]:
    """Return method minus LoRA for the seeds that both have."""
    own, theirs = values_of(method, metric), values_of(reference, metric)
    return {
        seed: own[seed] - theirs[seed] if math.isfinite(theirs[seed]) else math.nan
        for seed in own
        if seed in theirs
    }


def _verdict(one: Comparison) -> str:
    if one.diverged:
        return "worse"
    assert one.interval is not None and one.corrected is not None
    if one.corrected >= ALPHA:
        return "no difference found"
    return "better" if one.interval.mean < 0 else "worse"


def _signal(reference: Measured, base: Measured, metric: str, grid: Grid) -> str:
    """Return whether tuned LoRA beats the base; one as it is has the same figure for every seed."""
    if not (reference.is_complete and base.is_complete):
        return "not run"
    differences = list(_differences(reference, base, metric).values())
    if grid["methods"][base.cell.method]["kind"] == "frozen":
        unchanged = next(iter(values_of(base, metric).values()))
        differences = [value - unchanged for value in values_of(reference, metric).values()]
    if len(differences) < 2:
        return "not run"
    if not all(map(math.isfinite, differences)):
        return "no signal"
    return "signal" if interval(differences).high < 0 else "no signal"


def _at_one_rate(method: Measured, reference: Measured, grid: Grid) -> tuple[float, float] | None:
    """Return (rate, difference) at LoRA's best rate of those that both were tuned over."""
    theirs = {n: score for n, score in reference.scores.items() if math.isfinite(score)}
    common = {n: score for n, score in theirs.items() if n in method.scores}
    if reference.rate is None or not common:
        return None
    best = best_index(common)
    score = method.scores[best]
    difference = score - common[best] if math.isfinite(score) else math.inf
    return rate_at(best, grid["lattice_base"]), difference


# ---- Steps


def final_loss(line: Line) -> float:
    """Return the last loss of a validation curve; of a run that has not diverged."""
    return line["validation_curve"][-1][1]


def steps_to(line: Line, target: float) -> float:
    """Return after how many steps a curve first is at a loss, straight between its points."""
    before: list[float] | None = None
    for step, loss in line["validation_curve"]:
        if loss <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = [step, loss]
    return math.inf
