"""The words and tables of a study's figures: `details` returns the page with all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from comparison import Comparison, Measured, Setting, values_of
from paired import Interval, interval

StepTimes = dict[str, Any]
MARK = "†"
HEAD = """# Every cell of the study

Written by `report.py`; the page that it belongs to, [benchmarks/paper](../../paper/README.md),
says what the words mean. Less is better in every figure; a difference is method minus LoRA of the
same seed, with its 95 % interval. p is that of a paired t test; Holm's counts every method that is
planned. "One rate" is what the tuning runs say when both are taken at one rate, as the paper does:
the difference of the validation loss, one seed. Steps are those after which a method has the final
validation loss of LoRA of the same seed, the median over seeds and how many of them get there.
Parameters are those that are trained, beside LoRA's; † marks a method that trains more."""
COLUMNS = (
    "method",
    "parameters",
    "tuned rate (runs)",
    "seeds",
    "test figure",
    "difference",
    "p",
    "p, Holm",
    "seeds won, lost",
    "verdict",
    "one rate",
    "steps",
)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def counted(count: int, word: str) -> str:
    """Return a count with its word."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def figure(value: float, metric: str, sign: str = "") -> str:
    """Return a loss to four digits, an error in percent to two."""
    return format(value, f"{sign}.{4 if metric == 'loss' else 2}f")


def spread(one: Interval, metric: str, sign: str = "") -> str:
    """Return a mean and its interval."""
    low, high = (figure(value, metric, sign) for value in (one.low, one.high))
    return f"{figure(one.mean, metric, sign)} ({low} to {high})"


def seeds_of(method: Measured, count: int) -> str:
    """Return how many seeds there are, and of how many where some are missing."""
    planned = method.cell.seeds
    return f"{count} of {planned} seeds" if count < planned else counted(count, "seed")


def progress(method: Measured) -> str:
    """Return how far a cell is that has no test run."""
    if method.is_missing:
        return "missing"
    if method.rate is None:
        edge = ", the best so far at an edge" if method.is_at_edge else ""
        return f"rate not found yet ({counted(len(method.scores), 'run')}{edge})"
    return f"rate found, 0 of {method.cell.seeds} seeds"


def mean_text(method: Measured, metric: str) -> str:
    """Return the mean test figure of a method over its seeds, with its interval."""
    values = list(values_of(method, metric).values())
    if not values:
        return progress(method)
    diverged = sum(map(math.isinf, values))
    if diverged:
        return f"diverged in {diverged}"
    return spread(interval(values), metric) if len(values) > 1 else figure(values[0], metric)


def mean_and_seeds(method: Measured, metric: str) -> str:
    """Return the mean test figure of a method, and over how many seeds."""
    seeds = f", {seeds_of(method, len(method.tests))}" if method.tests else ""
    return mean_text(method, metric) + seeds


def difference_text(one: Comparison, metric: str) -> str:
    """Return the mean difference to LoRA and its interval, or what is missing for it."""
    values = list(one.differences.values())
    if not values:
        return progress(one.method)
    count = seeds_of(one.method, len(values))
    if any(map(math.isnan, values)):
        return f"LoRA diverged, {count}"
    if one.diverged:
        return f"diverged in {one.diverged}, {count}"
    if one.interval is None:
        return f"{figure(values[0], metric, '+')}, {count}"
    return f"{spread(one.interval, metric, '+')}, {count}"


def won_and_lost(one: Comparison) -> str:
    """Return in how many seeds a method is better than LoRA, and in how many worse."""
    values = one.differences.values()
    return f"{sum(v < 0 for v in values)}, {sum(v > 0 for v in values)}" if values else ""


def one_rate_text(one: Comparison) -> str:
    """Return the difference at one rate for both, and the rate."""
    if one.one_rate is None:
        return "not run"
    rate, difference = one.one_rate
    return (
        f"{difference:+.4f} at {rate:g}" if math.isfinite(difference) else f"diverged at {rate:g}"
    )


def p_text(value: float | None) -> str:
    """Return a p value to three digits."""
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def details(settings: Sequence[Setting], grid: dict[str, Any], times: StepTimes | None) -> str:
    """Return the page with a table of every task and rank that has been begun."""
    lines = [HEAD]
    for setting in settings:
        if setting.is_begun:
            lines += ["", f"## {setting.name}", "", *_setting_lines(setting, grid, times)]
    waiting = [setting.name for setting in settings if not setting.is_begun]
    lines += ["", "Nothing has been run of: " + (", ".join(waiting) or "none") + "."]
    lines += ["", "## Wins and losses by task", "", *_wins(settings)]
    return "\n".join(lines) + "\n"


def _setting_lines(setting: Setting, grid: dict[str, Any], times: StepTimes | None) -> list[str]:
    """Return what is known of a task at a rank."""
    metric, base = setting.metric, setting.base
    what = "test loss" if metric == "loss" else "test error in %"
    beside = (
        f"`{base.cell.method}`: {mean_and_seeds(base, metric)}" if base else "no base is planned"
    )
    lines = [f"{setting.signal.capitalize()} ({what} of the base, {beside}).", ""]
    heads = [what if head == "test figure" else head for head in COLUMNS]
    if times:
        heads.append("time to LoRA's final loss")
    rows = [_reference_row(setting)]
    rows += [_row(one, setting, grid, times) for one in setting.comparisons]
    rows = [row + [""] * (len(heads) - len(row)) for row in rows]
    return lines + table(heads, rows) + _notes(setting, grid)


def _beginning(method: Measured, setting: Setting, mark: str) -> list[str]:
    """Return the first columns of a row."""
    parameters = ""
    if method.parameters and setting.reference.parameters:
        parameters = f"{method.parameters / setting.reference.parameters:.2f} x"
    rate = "" if method.rate is None else f"{method.rate:g} ({len(method.scores)})"
    seeds = f"{len(method.tests)} of {method.cell.seeds}"
    mean = mean_text(method, setting.metric)
    return [f"`{method.cell.method}`{mark}", parameters, rate, seeds, mean]


def _reference_row(setting: Setting) -> list[str]:
    return _beginning(setting.reference, setting, "")


def _row(
    one: Comparison, setting: Setting, grid: dict[str, Any], times: StepTimes | None
) -> list[str]:
    """Return the row of a method."""
    mark = f" {MARK}" if one.has_more_parameters else ""
    difference = difference_text(one, setting.metric) if one.differences else ""
    row = [
        *_beginning(one.method, setting, mark),
        difference,
        p_text(None if one.diverged else one.p_value),
        p_text(None if one.diverged else one.corrected),
        won_and_lost(one),
        one.verdict or "",
        one_rate_text(one),
        _steps_text(one, setting),
    ]
    return [*row, _time_text(one, setting, grid, times)] if times else row


def _median_steps(one: Comparison) -> float:
    return statistics.median(one.steps.values()) if one.steps else math.inf


def _last_step(setting: Setting) -> int:
    return max(line["steps"] for line in setting.reference.tests.values())


def _steps_text(one: Comparison, setting: Setting) -> str:
    if not one.steps:
        return ""
    reached = sum(map(math.isfinite, one.steps.values()))
    steps = _median_steps(one)
    text = f"{steps:.0f} of {_last_step(setting)}" if math.isfinite(steps) else "not reached"
    return f"{text} ({reached} of {counted(len(one.steps), 'seed')})"


def _time_text(one: Comparison, setting: Setting, grid: dict[str, Any], times: StepTimes) -> str:
    """Return the time to LoRA's final loss as a share of LoRA's own."""
    own, theirs = (
        step_ratio(grid["methods"][method.cell.method], times)
        for method in (one.method, setting.reference)
    )
    steps = _median_steps(one)
    if own is None or theirs is None or not math.isfinite(steps):
        return ""
    return f"{steps / _last_step(setting) * own / theirs:.2f}"


def step_ratio(options: Mapping[str, Any], times: StepTimes) -> float | None:
    """Return a step's time over the frozen model's as bench_step.py measured it, None if not.

    Args:
        options: the method, as in the grid.
        times: a result file of bench_step.py; its shortcuts must have the method's m.
    """
    name = None
    if options["kind"] == "peft" and not options.get("use_dora") and "rank_factor" not in options:
        name = "peft"
    elif options["kind"] == "reslora":
        mode = options["res_mode"]
        if times["settings"]["pre_num"].get(mode) == options.get("pre_num", 1):
            name = mode
    found = times["results"]["steps"].get(name)
    return found["ratio"]["median"] if found else None


def _notes(setting: Setting, grid: dict[str, Any]) -> list[str]:
    """Return what a reader must know of single cells."""
    notes = []
    for method in (setting.reference, *setting.methods):
        name = f"`{method.cell.method}`"
        if method.is_at_edge and not method.is_missing:
            notes.append(f"the best rate of {name} so far is at an edge of those tried")
        if method.other_tests:
            runs = counted(method.other_tests, "test run")
            notes.append(f"{name} has {runs} at other rates than the tuned one, which are left out")
    most = len(grid["test_seeds"])
    unclear = [
        f"`{one.method.cell.method}`"
        for one in setting.comparisons
        if one.verdict and one.interval and one.interval.low <= 0 <= one.interval.high
        if len(one.differences) < most
    ]
    if unclear:
        notes.append(f"where the interval covers zero, {most} seeds are due: {', '.join(unclear)}")
    return ["", "Notes: " + "; ".join(notes) + "."] if notes else []


def _wins(settings: Sequence[Setting]) -> list[str]:
    """Return a table of verdicts, methods by tasks; ranks of a task are added up."""
    tasks = list(dict.fromkeys(setting.task for setting in settings))
    methods = {one.method.cell.method for setting in settings for one in setting.comparisons}
    order = [m.cell.method for setting in settings for m in setting.methods]
    rows = []
    for method in sorted(methods, key=order.index):
        cells = [_verdicts(method, [s for s in settings if s.task == task]) for task in tasks]
        rows.append([f"`{method}`", *cells])
    text = (
        "Better, worse, no difference found after Holm's correction, and not compared yet, over "
        "the ranks of a task; ranks at which the task shows no signal are not compared."
    )
    return [text, "", *table(["method", *tasks], rows)]


def _verdicts(method: str, settings: Sequence[Setting]) -> str:
    """Return the four counts."""
    verdicts = [
        one.verdict if setting.counts else None
        for setting in settings
        for one in setting.comparisons
        if one.method.cell.method == method
    ]
    return ", ".join(
        str(verdicts.count(v)) for v in ("better", "worse", "no difference found", None)
    )
