"""Writes the benchmark table of the README from results/*.json, so that no figure is typed by hand.

python benchmarks/readme_table.py           # rewrites the part between the two marks
python benchmarks/readme_table.py --check   # exit code 1 where the README says something else
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
FILES = ["layer_2048x768.json", "layer_128x384.json"]
ROWS = ["peft", "naive is", "naive bs", "naive ms"] + [
    f"reslora {mode}" for mode in ("none", "is", "bs", "ms")
]


def cell(results: dict[str, Any], name: str) -> str:
    """Return 'median (5 %-95 %)' of a variant's ratio to the frozen layers."""
    ratio = results[name]["ratio"]
    return f"{ratio['median']:.2f} ({ratio['p5']:.2f}-{ratio['p95']:.2f})"


def table() -> str:
    """Return the text between the marks."""
    runs = [json.loads((HERE / "results" / name).read_text()) for name in FILES]
    dropouts = runs[0]["settings"]["dropout"]
    columns = [(run, p) for run in runs for p in dropouts]
    heads = [
        f"T={r['settings']['tokens']}, {r['settings']['in_features']}, p={p:g}" for r, p in columns
    ]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(columns)]
    for row in ROWS:
        cells = [cell(run["results"], f"{row} p={p:g}") for run, p in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    one = runs[0]
    where = one["environment"]
    settings = one["settings"]
    lines.append("")
    lines.append(
        f"r = {settings['rank']}, {settings['layers']} layers, {settings['dtype']}, "
        f"{where['cores']} cores ({where['cpu']}), torch {where['torch']}, peft {where['peft']}; "
        f"{', '.join(str(r['settings']['rounds']) for r in runs)} rounds."
    )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Rewrite or check the README."""
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    wanted = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if arguments == ["--check"]:
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
