"""The sections of the study's page that follow from its lines: answer, table, protocol.

The sentences of the answer are chosen by what was found. Only tasks with a signal and methods whose
planned seeds are all there have a say in them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from comparison import Comparison, Setting, measured, planned_cells
from lines import Line
from tables import (
    MARK,
    counted,
    difference_text,
    mean_and_seeds,
    one_rate_text,
    table,
)

Grid = dict[str, Any]
Found = list[tuple[Setting, Comparison]]
NAMED = 4  # so many comparisons are named in a sentence


def answer(settings: Sequence[Setting], lines: Sequence[Line], grid: Grid) -> str:
    """Return three sentences: what was found, what one rate would have said, how much is there."""
    judged = [
        (setting, one)
        for setting in settings
        if setting.counts
        for one in setting.comparisons
        if one.verdict
    ]
    return "\n".join(
        [
            _finding(judged, settings, grid),
            _at_one_rate(judged, settings),
            _coverage(settings, lines, grid),
        ]
    )


# ---- What was found


def _finding(judged: Found, settings: Sequence[Setting], grid: Grid) -> str:
    """Return the sentence on the shortcuts and on the other methods."""

    def is_shortcut(one: Comparison) -> bool:
        return grid["methods"][one.method.cell.method]["kind"] == "reslora"

    own = [(setting, one) for setting, one in judged if is_shortcut(one)]
    others = [(setting, one) for setting, one in judged if not is_shortcut(one)]
    planned = sum(is_shortcut(one) for setting in settings for one in setting.comparisons)
    if not own:
        lead = "It is not known yet: no shortcut has been compared with tuned LoRA at all its seeds"
    else:
        gains = _count(own, "better")
        are = "is" if len(own) == 1 else "are"
        found = f"a gain was found in {gains} of these" if gains else "no gain was found"
        lead = (
            f"{len(own)} of {planned} planned comparisons of a shortcut with tuned LoRA {are} "
            f"complete, and {found} ({_tallies(own)}{_room(own)})"
        )
    if not others:
        return f"{lead}, nor has any other variant."
    return f"{lead}; beside them, other variants: {_tallies(others)}."


def _count(found: Found, verdict: str) -> int:
    return sum(one.verdict == verdict for _, one in found)


def _tallies(found: Found) -> str:
    """Return how often each method was better or worse, and which were neither."""
    texts, neither = [], []
    for method in dict.fromkeys(one.method.cell.method for _, one in found):
        own = [(setting, one) for setting, one in found if one.method.cell.method == method]
        mark = f" {MARK}" if any(one.has_more_parameters for _, one in own) else ""
        counts = {verdict: _count(own, verdict) for verdict in ("better", "worse")}
        said = " and ".join(f"{word} in {count}" for word, count in counts.items() if count)
        if said:
            texts.append(f"`{method}`{mark} {said} of {len(own)}")
        else:
            neither.append(f"`{method}`{mark}")
    if neither:
        texts.append(f"neither better nor worse anywhere {', '.join(neither)}")
    return ", ".join(texts)


def _room(found: Found) -> str:
    """Return how large a gain the intervals leave room for where none was found."""
    rooms = [
        -100 * one.interval.low / setting.mean_of(setting.reference)
        for setting, one in found
        if one.interval and one.verdict == "no difference found"
    ]
    if not rooms:
        return ""
    return f"; where no difference was found, a gain of up to {max(0.0, *rooms):.2g} % may hide"


# ---- What the paper's protocol would have said


def _at_one_rate(judged: Found, settings: Sequence[Setting]) -> str:
    """Return the sentence on one rate for all methods and one seed."""
    begin = "Read as the paper reads its runs, one rate for all methods and one seed, "
    both = [(setting, one) for setting, one in judged if one.one_rate]
    if both:
        called = [(setting, one) for setting, one in both if one.one_rate[1] < 0]
        confirmed = _count(called, "better")
        missed = _count(both, "better") - confirmed
        return (
            f"{begin}the tuning runs would have called the method better than LoRA in "
            f"{len(called)} of {len(both)} of these comparisons, of which the tuned rates and all "
            f"seeds confirm {confirmed}, and would have missed {counted(missed, 'gain')}."
        )
    early = [(s, one) for s in settings for one in s.comparisons if one.one_rate]
    if not early:
        return f"{begin}nothing could be said yet either."
    texts = [f"`{one.method.cell.method}` on {s.name}: {one_rate_text(one)}" for s, one in early]
    named = f": {'; '.join(texts)}" if len(texts) <= NAMED else ""
    called_early = sum(one.one_rate[1] < 0 for _, one in early)
    return (
        f"{begin}the same runs would already call the method better than LoRA in {called_early} of "
        f"{counted(len(early), 'comparison')} (difference of the validation loss{named}); no "
        "tested seeds on a task that counts have confirmed or refuted this yet."
    )


# ---- How much is there


def _coverage(settings: Sequence[Setting], lines: Sequence[Line], grid: Grid) -> str:
    """Return the sentence on cells and on the tasks' signal."""
    cells = [
        measured(cell, lines, grid) for planned in planned_cells(grid).values() for cell in planned
    ]
    complete = sum(cell.is_complete for cell in cells)
    missing = sum(cell.is_missing for cell in cells)
    begun = len(cells) - complete - missing
    signals = Counter(setting.signal for setting in settings)
    return (
        f"Of {counted(len(cells), 'planned cell')} (a method on a task at a rank) {complete} "
        f"{'is' if complete == 1 else 'are'} complete, {begun} begun and {missing} missing, and of "
        f"{len(settings)} pairs of task and rank {signals['signal']} "
        f"{'counts' if signals['signal'] == 1 else 'count'} (tuned LoRA beats the base beyond the "
        f"seeds' interval), {signals['no signal']} show no signal and for {signals['not run']} "
        "this has not been run."
    )


# ---- The table


def main_table(settings: Sequence[Setting]) -> str:
    """Return methods by tasks and ranks; those of which nothing has been run are named below."""
    begun = [setting for setting in settings if setting.is_begun]
    waiting = [setting.name for setting in settings if not setting.is_begun]
    lines = []
    if begun:
        units = {"loss": "test loss", "error": "test error, %"}
        heads = [f"{setting.name}, {units[setting.metric]}" for setting in begun]
        rows = [
            ["signal", *(setting.signal for setting in begun)],
            ["the base", *(_base_text(setting) for setting in begun)],
            ["LoRA, tuned", *(mean_and_seeds(s.reference, s.metric) for s in begun)],
        ]
        rows += [_row(method, begun) for method in _methods(begun)]
        lines += table(["difference to tuned LoRA", *heads], rows)
    if waiting:
        lines += [
            "",
            f"Nothing has been run of {', '.join(waiting)}: all of their cells are missing.",
        ]
    if any(one.has_more_parameters for setting in begun for one in setting.comparisons):
        lines += ["", f"{MARK} trains more parameters than LoRA of this rank."]
    return "\n".join(lines).lstrip("\n")


def _base_text(setting: Setting) -> str:
    if setting.base is None:
        return "missing"
    return f"`{setting.base.cell.method}`: {mean_and_seeds(setting.base, setting.metric)}"


def _methods(settings: Sequence[Setting]) -> list[str]:
    return list(dict.fromkeys(m.cell.method for setting in settings for m in setting.methods))


def _row(method: str, settings: Sequence[Setting]) -> list[str]:
    """Return a method's row; what holds after Holm's correction is bold."""
    cells, is_marked = [], False
    for setting in settings:
        own = [one for one in setting.comparisons if one.method.cell.method == method]
        text = difference_text(own[0], setting.metric) if own else "not planned"
        if own and own[0].verdict in ("better", "worse"):
            text = f"**{text}: {own[0].verdict}**"
        is_marked = is_marked or any(one.has_more_parameters for one in own)
        cells.append(text)
    return [f"`{method}` {MARK}" if is_marked else f"`{method}`", *cells]


# ---- The protocol's numbers


def protocol(lines: Sequence[Line], repeated: int, grid: Grid) -> str:
    """Return what was run, in numbers."""
    units = {"loss": "loss", "error": "share predicted wrongly, %"}
    cells = planned_cells(grid)
    rows = []
    for task in dict.fromkeys(task for task, _ in cells):
        spec = grid["tasks"][task]
        ranks = ", ".join(str(rank) for of, rank in cells if of == task and rank)
        batch = f"{spec['batch']} x {spec['length']}"
        runs = str(sum(line["task"] == task for line in lines))
        unit = units[spec.get("metric", "loss")]
        rows.append([task, spec["data"], ranks, str(spec["steps"]), batch, unit, runs])
    heads = ["task", "data", "r", "steps", "batch x tokens", "tested on", "runs done"]
    seeds = sorted({cell.seeds for (_, rank), own in cells.items() for cell in own if rank})
    text = [
        *table(heads, rows),
        "",
        f"Tuning has seed {grid['tuning_seed']}; {' or '.join(map(str, seeds))} test seeds are "
        f"planned for a cell, the first of {', '.join(map(str, grid['test_seeds']))}. "
        + _origin(lines),
    ]
    if repeated:
        text += ["", f"{counted(repeated, 'line')} of a run that was there already left out."]
    return "\n".join(text)


def _origin(lines: Sequence[Line]) -> str:
    """Return on what the runs were made."""
    if not lines:
        return "There are no runs yet."
    devices = sorted({line["device"] for line in lines})
    versions = sorted({json.dumps(line["versions"], sort_keys=True) for line in lines})
    made = "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(one).items()) for one in versions)
    diverged = sum(line["diverged"] for line in lines)
    return f"Runs on {' and '.join(devices)} with {made}; {diverged} of {len(lines)} diverged."
