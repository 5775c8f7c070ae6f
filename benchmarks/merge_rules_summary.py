"""Tables of what bench_merge.py --settings measured, from results/merge_rules/LABEL/*.json.

python benchmarks/merge_rules_summary.py                          # before and after
python benchmarks/merge_rules_summary.py --before v1 --after v2   # two other labels

A setting has one line: geometric means over its seeds. The paper's rules are `weight` and `input`;
the better one of them, for each setting and seed, is what the others are compared with. Goals are
judged by every setting and seed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

RECORDS = Path(__file__).resolve().parent / "results" / "merge_rules"
PAPER = ("weight", "input")
TINY = 1e-12  # a KL is at least so much: rounding leaves some below 0

Record = dict[str, Any]
Records = dict[tuple[str, int], Record]


def load_records(folder: Path) -> Records:
    """Return the records of a label by setting and seed, sorted by name."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(r["setting"]["name"], r["seed"]): r for r in records}


def kl(record: Record, rule: str) -> float:
    """Return the KL of a rule; nan where there is none."""
    entry = record["rules"].get(rule, {})
    return max(entry["kl"], TINY) if "kl" in entry else math.nan


def paper(record: Record) -> float:
    """Return the KL of the better rule of the paper."""
    return min(value for rule in PAPER if not math.isnan(value := kl(record, rule)))


def by_rows(record: Record) -> dict[int, str]:
    """Return the names of what is calibrated on so many rows."""
    return {rows: f"lsq, {rows} rows" for rows in record["setting"]["rows"]}


def mean(values: Iterable[float]) -> float:
    """Return the geometric mean of what is there; nan without any."""
    there = [value for value in values if not math.isnan(value)]
    return geometric_mean(there) if there else math.nan


def figure(value: float) -> str:
    """Return a figure for a table."""
    return "" if math.isnan(value) else f"{value:#.3g}".rstrip(".")


def rows_of(head: list[str], lines: list[list[str]]) -> list[str]:
    """Return the lines of a table."""
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]


class Summary:
    """The records of two labels beside each other."""

    def __init__(self, before: Records, after: Records) -> None:
        self.before, self.after = before, after
        self.both = [key for key in after if key in before]
        self.names = list(dict.fromkeys(name for name, _ in after))
        self.rows = sorted({rows for r in after.values() for rows in by_rows(r)})

    def line(self, name: str, *columns: Callable[[Record], float], of: Records) -> list[float]:
        """Return geometric means over the seeds of a setting."""
        found = [record for (other, _), record in of.items() if other == name]
        return [mean(column(record) for record in found) for column in columns]

    def rules(self) -> list[str]:
        """Return the table of the rules, with the default before and after."""
        lines = []
        for name in self.names:
            rules = ("weight", "input", "factored", "projected", "lsq")
            found = self.line(name, *(lambda r, x=x: kl(r, x) for x in rules), of=self.after)
            (best,) = self.line(name, paper, of=self.after)
            (old,) = self.line(name, lambda r: kl(r, "lsq"), of=self.before)
            shares = [found[3] / best, found[4] / best, found[4] / old]
            lines.append([name, *map(figure, [*found[:4], old, found[4], *shares])])
        columns = [[key_of(line[i]) for line in lines] for i in range(7, 10)]
        lines.append(["geometric mean", *[""] * 6, *(figure(mean(c)) for c in columns)])
        head = ["KL by setting", "weight", "input", "factored", "projected", "lsq before"]
        head += ["lsq after", "projected / paper", "lsq / paper", "after / before"]
        return rows_of(head, lines)

    def few_rows(self) -> list[str]:
        """Return the table of `lsq` by its number of rows, as shares of the paper's better rule."""

        def columns(of: Records, name: str) -> list[float]:
            shares = [lambda r, n=n: kl(r, f"lsq, {n} rows") / paper(r) for n in self.rows]
            return self.line(name, *shares, of=of)

        lines, means = [], []
        for name in self.names:
            old, new = columns(self.before, name), columns(self.after, name)
            means.append(new)
            lines.append([name, *map(arrow, old, new)])
        last = [figure(mean(column)) for column in zip(*means, strict=True)]
        lines.append(["geometric mean", *last])
        head = ["KL / that of the paper's better rule", *(f"{n} rows" for n in self.rows)]
        return rows_of(head, lines)

    def cost(self) -> list[str]:
        """Return the table of what calibrating takes."""

        def columns(of: Records, name: str) -> list[float]:
            keys = ("cpu_seconds", "forward_cpu_seconds", "peak_bytes", "forward_peak_bytes")
            return self.line(name, *(lambda r, k=k: r["rules"]["lsq"][k] for k in keys), of=of)

        lines = []
        for name in self.names:
            old, new = columns(self.before, name), columns(self.after, name)
            scaled = [[v / scale for v in (old[i], new[i])] for i, scale in enumerate(UNITS)]
            lines.append([name, *(arrow(*pair) for pair in scaled)])
        head = ["what calibrating takes", "s of a core", "s of its forwards alone"]
        return rows_of([*head, "MB at most", "MB of its forwards alone"], lines)

    def goals(self) -> list[str]:
        """Return what was aimed at, how often it was reached and where it was not."""
        after = self.after
        few = {
            f"{label(key)}, {n} rows": kl(record, rule) / paper(record)
            for key, record in after.items()
            for n, rule in by_rows(record).items()
        }
        quarter, share, seconds, memory = {}, {}, {}, {}
        for key in self.both:
            old, new = self.before[key], after[key]
            names = by_rows(old)
            quarter |= {
                f"{label(key)}, {n} rows": kl(new, by_rows(new)[n // 4]) / kl(old, names[n])
                for n in names
                if n // 4 in by_rows(new)
            }
            share[label(key)] = kl(new, "lsq") / kl(old, "lsq")
            pairs = [(new["rules"]["lsq"][k], old["rules"]["lsq"][k]) for k in COSTS]
            seconds[label(key)], memory[label(key)] = (a / b for a, b in pairs)
        projected = {label(k): kl(r, "projected") / paper(r) for k, r in after.items()}
        return [
            "Aims, by setting and seed:",
            "",
            judged("`lsq` never worse than the paper's better rule, at any number of rows", few, 1),
            judged("a quarter of the rows does what all did before", quarter, 1),
            judged("`lsq` by default never worse than before", share, 1),
            *(
                [f"- its share of before, aim 0.6: {figure(mean(share.values()))}."]
                if share
                else []
            ),
            judged("`projected` not worse than the paper's better rule", projected, 1),
            judged("calibrating takes at most four times what it took", seconds, 4),
            judged("and at most twice the memory", memory, 2),
        ]


UNITS = (1, 1, 1e6, 1e6)
COSTS = ("cpu_seconds", "peak_bytes")


def key_of(text: str) -> float:
    """Return the figure of a cell."""
    return float(text) if text else math.nan


def label(key: tuple[str, int]) -> str:
    """Return the name of a setting and seed."""
    return f"{key[0]} ({key[1]})"


def arrow(old: float, new: float) -> str:
    """Return 'before -> after', or what there is of it."""
    return " -> ".join(text for text in (figure(old), figure(new)) if text)


def judged(aim: str, ratios: dict[str, float], bound: float) -> str:
    """Return a line of the aims: how many ratios keep to a bound, and which do not."""
    there = {name: value for name, value in ratios.items() if not math.isnan(value)}
    if not there:
        return f"- {aim}: nothing to judge by."
    missed = [f"{name} {figure(value)}" for name, value in there.items() if value > bound]
    rest = f"; missed: {', '.join(missed)}" if missed else ""
    return f"- {aim}: {len(there) - len(missed)} of {len(there)}{rest}."


def text_of(before: Records, after: Records) -> str:
    """Return the tables and the aims."""
    summary = Summary(before, after)
    lines = [*summary.rules(), *summary.few_rows(), *summary.cost(), *summary.goals()]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the tables of two labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--before", default="before", help="label of the records of before")
    parser.add_argument("--after", default="after", help="label of those of after")
    options = parser.parse_args(arguments)
    before, after = (
        load_records(options.records / name) for name in (options.before, options.after)
    )
    if not after:
        print(f"merge_rules_summary.py: no records in {options.records / options.after}")
        return 2
    print(text_of(before, after))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
