"""Tables and a plot of what bench_merge.py measured, from results/merge/*.json.

python benchmarks/merge_summary.py     # writes results/merge.svg and prints the table

Figures are means over seeds; the interval is from the smallest to the largest of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve().parent
CELLS = HERE / "results" / "merge"
PLOT = HERE / "results" / "merge.svg"
RULES = ["drop", "one", "weight", "input", "factored", "lsq", "lsq + refine", "finish"]
APPROXIMATE = ["is", "ms 1", "ms 3", "ms all"]
EXACT = ["lora", "lora 2x", "bs 1"]
NAMES = {"lora": "plain LoRA", "lora 2x": "plain LoRA, doubled lora_alpha", "bs 1": "bs"}
TITLES = {
    "shakespeare": "tinyshakespeare",
    "gsm8k": "answers of GSM8K",
    "sst2": "SST-2, accuracy",
}

Cells = dict[tuple[str, str], list[dict[str, Any]]]


def load_cells() -> Cells:
    """Return the records by task and method, one for each seed."""
    cells: Cells = {}
    for path in sorted(CELLS.glob("*.json")):
        record = json.loads(path.read_text())
        cells.setdefault((record["task"], record["method"]), []).append(record)
    return cells


def metric_of(task: str) -> str:
    """Return what a task is judged by."""
    return "accuracy" if task == "sst2" else "loss"


def spread(values: list[float], pattern: str) -> str:
    """Return the mean and, for more than one value, the range."""
    text = format(mean(values), pattern)
    if len(values) == 1:
        return text
    return f"{text} ({format(min(values), pattern)} to {format(max(values), pattern)})"


def task_table(task: str, cells: Cells) -> list[str]:
    """Return the lines of one task: KL, and the change of its metric, by rule and shortcut."""
    metric = metric_of(task)
    methods = [m for m in APPROXIMATE if (task, m) in cells]
    seeds = [len(cells[task, method]) for method in methods]
    heads = [f"{m}, {n} seed{'s' if n > 1 else ''}" for m, n in zip(methods, seeds, strict=True)]
    lines = [f"| {TITLES[task]} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(methods)]
    unmerged = [spread([r["unmerged"][metric] for r in cells[task, m]], ".4f") for m in methods]
    lines.append(f"| {metric}, unmerged | " + " | ".join(unmerged) + " |")
    for rule in RULES:
        row = [_cell(cells[task, method], rule, metric) for method in methods]
        lines.append(f"| {rule} | " + " | ".join(row) + " |")
    controls = [
        f"{NAMES[m]} {spread([r['unmerged'][metric] for r in cells[task, m]], '.4f')}"
        for m in EXACT
        if (task, m) in cells
    ]
    rounding = [abs(r["rules"]["exact"]["kl"]) for r in cells.get((task, "bs 1"), [])]
    lines += ["", f"Beside them, {metric}: {'; '.join(controls)}."]
    if rounding:
        lines[-1] += f" Merging bs leaves the rounding of fp32: KL at most {max(rounding):.1g}."
    if metric == "accuracy":
        lines.append(_changed_sides(task, cells, methods))
    return [*lines, ""]


def _changed_sides(task: str, cells: Cells, methods: list[str]) -> str:
    """Return how many predictions differ at all: changes of accuracy are small beside it."""
    shares = [1 - r["rules"]["lsq + refine"]["top1"] for m in methods for r in cells[task, m]]
    return (
        f"A model that is right in 6 of 10 has many close calls: after `lsq + refine` "
        f"{min(shares):.1%} to {max(shares):.1%} of its predictions are other ones, in both "
        "directions; what accuracy gains or loses is the difference."
    )


def _cell(records: list[dict[str, Any]], rule: str, metric: str) -> str:
    """Return 'KL (share of the paper's better rule), change of the metric'."""
    found = [r["rules"][rule] for r in records]
    kl = mean(entry["kl"] for entry in found)
    paper = mean(min(r["rules"]["input"]["kl"], r["rules"]["weight"]["kl"]) for r in records)
    pairs = zip(found, records, strict=True)
    change = mean(entry[metric] - r["unmerged"][metric] for entry, r in pairs)
    return f"{kl:#.3g} ({kl / paper:.2f}), {change:+.4f}"


def goals(tasks: list[str], cells: Cells) -> list[str]:
    """Return what was aimed at, and which means over seeds missed it."""
    missed: dict[str, list[str]] = {"lsq": [], "refine": [], "metric": [], "finish": []}
    columns = [(t, m) for t in tasks for m in APPROXIMATE if (t, m) in cells]
    for task, method in columns:
        records, metric = cells[task, method], metric_of(task)
        kl = {rule: mean(r["rules"][rule]["kl"] for r in records) for rule in RULES}
        paper = mean(min(r["rules"]["input"]["kl"], r["rules"]["weight"]["kl"]) for r in records)
        values = {rule: mean(r["rules"][rule][metric] for r in records) for rule in RULES}
        unmerged = mean(r["unmerged"][metric] for r in records)
        name = f"{TITLES[task].removesuffix(', accuracy')} {method}"
        change = values["lsq + refine"] - unmerged
        bound, better = (0.01, 1) if metric == "loss" else (0.001, -1)
        gap = better * (values["finish"] - values["lsq"])
        for goal, ok, got in (
            ("lsq", kl["lsq"] <= paper / 4, f"{kl['lsq'] / paper:.2f}"),
            ("refine", kl["lsq + refine"] <= paper / 10, f"{kl['lsq + refine'] / paper:.2f}"),
            ("metric", abs(change) <= bound, f"{change:+.4f}"),
            ("finish", gap <= 0, f"{values['finish'] - values['lsq']:+.4f}"),
        ):
            if not ok:
                missed[goal].append(f"{name} {got}")
    aims = {
        "lsq": "KL of `lsq` at most 1/4 of the better of the paper's rules",
        "refine": "KL of `lsq + refine` at most 1/10 of it",
        "metric": "a loss within 0.01, an accuracy within 0.001 of unmerged after `lsq + refine`",
        "finish": "*finish* ahead of `lsq`",
    }
    lines = ["Aims, by means over seeds:", ""]
    for goal, aim in aims.items():
        count = f"{len(columns) - len(missed[goal])} of {len(columns)}"
        rest = f"; missed: {', '.join(missed[goal])}" if missed[goal] else ""
        lines.append(f"- {aim}: {count}{rest}.")
    return [*lines, ""]


def table() -> str:
    """Return the text for the README."""
    cells = load_cells()
    tasks = [task for task in TITLES if any((task, m) in cells for m in APPROXIMATE)]
    one = next(iter(cells.values()))[0]
    settings, where = one["settings"], one["environment"]
    lines = [line for task in tasks for line in task_table(task, cells)]
    lines += goals(tasks, cells)
    lines.append(
        f"tiny-llama (3.6 M parameters), all linear layers, r {settings['r']}, lora_alpha "
        f"{settings['lora_alpha']}, {settings['steps']} steps; {settings['calibration_batches']} "
        f"calibration batches, {settings['refine_steps']} refine steps, finish at "
        f"{settings['finish_at']:.0%}; torch {where['torch']}, {where['cores']} cores."
    )
    return "\n".join(lines)


def plot() -> None:
    """Draw KL by rule and shortcut, a panel for each task."""
    from matplotlib.figure import Figure

    cells = load_cells()
    tasks = [task for task in TITLES if any((task, m) in cells for m in APPROXIMATE)]
    figure = Figure(figsize=(4.5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for method in [m for m in APPROXIMATE if (task, m) in cells]:
            records = cells[task, method]
            values = [[r["rules"][rule]["kl"] for r in records] for rule in RULES]
            means = [mean(v) for v in values]
            low = [m - min(v) for m, v in zip(means, values, strict=True)]
            high = [max(v) - m for m, v in zip(means, values, strict=True)]
            axes.errorbar(range(len(RULES)), means, yerr=[low, high], marker="o", label=method)
        axes.set_yscale("log")
        axes.set_xticks(range(len(RULES)), RULES, rotation=35, ha="right")
        axes.set_title(TITLES[task])
        axes.set_ylabel("KL(unmerged || merged), nats")
        axes.legend()
    # No date: the same results give the same file.
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    plot()
    print(table())
    sys.exit(0)
