"""Writes the README's tables of figures from results/, so that no figure is typed by hand.

python benchmarks/readme_table.py           # rewrites the part between the two marks
python benchmarks/readme_table.py --check   # exit code 1 where the README says something else
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import merge_summary

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
FILES = ["layer_2048x768.json", "layer_128x384.json"]
MODES = ("none", "is", "bs", "ms")
ROWS = [
    "peft",
    *(f"naive {mode}" for mode in MODES[1:]),
    *(f"python op {mode}" for mode in MODES),
    *(f"reslora {mode}" for mode in MODES),
]


def cell(results: dict[str, Any], name: str) -> str:
    """Return 'median (5 %-95 %)' of a variant's ratio to the frozen layers, if it was measured."""
    if name not in results:
        return ""
    ratio = results[name]["ratio"]
    return f"{ratio['median']:.2f} ({ratio['p5']:.2f}-{ratio['p95']:.2f})"


def speed_table() -> str:
    """Return what bench_layer.py measured."""
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


def file_merge_sentence() -> str:
    """Return what bench_file_merge.py measured."""
    run = json.loads((HERE / "results" / "file_merge.json").read_text())
    results, settings = run["results"], run["settings"]
    ratio = results["times"]["merge"]["ratio"]
    return (
        f"`reslora merge` on {results['bytes'] / 1e9:.1f} GB of {settings['dtype']} (r "
        f"{settings['r']}, {settings['res_mode']}) took {ratio['median']:.1f} "
        f"({ratio['p5']:.1f}-{ratio['p95']:.1f}) times as long as `cp` and `sync`, "
        f"with {results['anonymous_bytes'] / 1e6:.0f} MB of memory beyond `import torch`."
    )


SECTIONS = {
    "benchmarks": speed_table,
    "merging": merge_summary.table,
    "file merge": file_merge_sentence,
}


def filled(text: str) -> str:
    """Return the README's text with every section written anew."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, rest = text.split(begin)
        _, tail = rest.split(end)
        text = f"{head}{begin}\n{make()}\n{end}{tail}"
    return text


def main(arguments: list[str]) -> int:
    """Rewrite or check the README."""
    text = README.read_text()
    wanted = filled(text)
    if arguments == ["--check"]:
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
