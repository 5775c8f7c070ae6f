"""Writes the README's tables of figures from results/, so that no figure is typed by hand.

python benchmarks/readme_table.py           # rewrites the part between the two marks
python benchmarks/readme_table.py --check   # exit code 1 where the README says something else
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import byte_model
import merge_summary
from sections import filled

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
FILES = ["layer_2048x768.json", "layer_128x384.json"]
MODES = ("none", "is", "bs", "ms")
DTYPES = ("float32", "bfloat16")
GRID = ("none", "is", "bs 3", "ms 1", "ms all")
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


def grid_table() -> str:
    """Return the grid of bench_grid.py: ratio to frozen by tokens, and who is below PEFT."""
    cells = [json.loads(p.read_text()) for p in sorted((HERE / "results" / "grid").glob("*.json"))]
    if not cells:
        return "The grid over tokens, shapes and ranks has not been measured."
    parts = [_grid_of([c for c in cells if c.get("dtype", "float32") == name]) for name in DTYPES]
    return "\n\n".join(part for part in parts if part)


def _grid_of(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return ""
    dtype = cells[0].get("dtype", "float32")
    names = ["peft", *GRID]
    lines = [
        f"Over a grid of tokens, shapes and ranks, {dtype}: median over shapes and ranks of the "
        "ratio to frozen, dropout 0 and 0.05. Then the cells in which a method was below PEFT's "
        "LoRA of the same rank, tied with it, or above it (by how often it was the faster in a "
        "round; a tie is what chance explains).",
        "",
        "| tokens (cells) | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for tokens in sorted({cell["case"]["tokens"] for cell in cells}):
        own = [cell for cell in cells if cell["case"]["tokens"] == tokens]
        row = [" / ".join(f"{_median(own, n, p):.2f}" for p in ("0", "0.05")) for n in names]
        lines.append(f"| {tokens} ({len(own)}) | " + " | ".join(row) + " |")
    for p in ("0", "0.05"):
        counts = [_counts(cells, name, p) for name in GRID]
        lines.append(f"| below, tied, above, dropout {p} | | " + " | ".join(counts) + " |")
    one = cells[0]["environment"]
    shapes = sorted({(c["case"]["in_features"], c["case"]["out_features"]) for c in cells})
    ranks = sorted({c["case"]["rank"] for c in cells})
    lines += [
        "",
        f"{len(cells)} cells; shapes {', '.join(f'{a}x{b}' for a, b in shapes)}; "
        f"r {', '.join(map(str, ranks))}; 6 layers, {dtype}, {one['cores']} cores ({one['cpu']}).",
    ]
    return "\n".join(lines)


def _median(cells: list[dict[str, Any]], name: str, p: str) -> float:
    return median(cell["results"][f"{name} p={p}"]["ratio"]["median"] for cell in cells)


def _counts(cells: list[dict[str, Any]], name: str, p: str) -> str:
    """Return how many cells are below, tied and above: two standard deviations of a fair coin."""
    below = tied = 0
    for cell in cells:
        faster = cell["results"][f"{name} p={p}"]["to_peft"]["faster"]
        is_tie = abs(faster - 0.5) * 2 * cell["rounds"] ** 0.5 < 2
        tied += is_tie
        below += not is_tie and faster > 0.5
    return f"{below}, {tied}, {len(cells) - below - tied}"


def steps_table() -> str:
    """Return what bench_step.py measured."""
    runs = [HERE / "results" / f"step_{name}.json" for name in ("bert", "llama", "llama6")]
    found = [json.loads(path.read_text()) for path in runs if path.exists()]
    if not found:
        return "Steps of whole models have not been measured."
    methods = ("frozen", "peft", "none", "none, each layer apart", "is", "bs", "ms")
    columns = [column for run in found for column in _step_columns(run, methods) if any(column[1])]
    rows = zip(methods, *(cells for _, cells in columns), strict=True)
    lines = [
        "A training step of a whole model with all linear layers adapted (r 16; bs m = 3, ms m = "
        "all), as the ratio to the frozen model's (which is never compiled), and peak memory at "
        "batch 8 x 256 in MB, plain and with checkpointing"
        + ("; llama6 is llama's first 6 layers of 30:" if len(found) == 3 else ":"),
        "",
        "| | " + " | ".join(head for head, _ in columns) + " |",
        "|---|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    own = sum(max(0, n - b["peft"]) for b in _breaks(found) for n in b.values())
    lines += ["", f"Graph breaks of the compiled models beyond those of PEFT's: {own}."]
    return "\n".join(lines)


def _breaks(runs: list[dict[str, Any]]) -> list[dict[str, int]]:
    found = [run["results"]["graph_breaks"] for run in runs]
    return [counts for counts in found if "peft" in counts]


def _step_columns(run: dict[str, Any], methods: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return (head, a cell for each method) of a model's columns."""
    name, (rows, length) = run["settings"]["model"], run["settings"]["batch"]
    steps, memory = run["results"]["steps"], run["results"]["memory"]
    peaks = [" / ".join(f"{n / 1e6:.0f}" for n in memory.get(m, {}).values()) for m in methods]
    return [
        (f"{name} {rows}x{length}", [cell(steps, method) for method in methods]),
        ("compiled", [cell(steps, f"{method} compiled") for method in methods]),
        ("memory", peaks),
    ]


def growth_sentence() -> str:
    """Return the slopes of bench_growth.py."""
    path = HERE / "results" / "growth.json"
    if not path.exists():
        return "How cost grows has not been measured."
    results = json.loads(path.read_text())["results"]
    slopes = ", ".join(f"{name} {s:.2f}" for name, s in results["tokens"]["slopes"].items())
    reach = results["reach"]
    blocks = {int(k.split()[1]): v["ratio"]["median"] for k, v in reach.items() if k != "frozen"}
    least, most = min(blocks), max(blocks)
    each = 100 * (blocks[most] - blocks[least]) / (most - least)
    lengths = results["length"]
    longest = max(lengths, key=int)
    shortest = min(lengths, key=int)

    def growth(name: str) -> float:
        times = [lengths[n]["steps"][name]["milliseconds"]["median"] for n in (shortest, longest)]
        return times[1] / times[0]

    def merging(name: str) -> float:
        return lengths[longest][name]["merge"] / lengths[shortest][name]["merge"]

    names = ("none", "is", "bs 3", "ms all")
    return (
        f"Growth: the log-log slope of time over tokens is {slopes}; another block of `bs` costs "
        f"{each:.1f} % of the frozen layers each; {longest} layers cost "
        + ", ".join(f"{growth(name):.1f} ({name})" for name in names)
        + f" times what {shortest} do, and to merge "
        + ", ".join(f"{merging(name):.1f} ({name})" for name in names)
        + " times."
    )


SECTIONS = {
    "benchmarks": speed_table,
    "grid": grid_table,
    "steps": steps_table,
    "growth": growth_sentence,
    "model": byte_model.sentence,
    "merging": merge_summary.table,
    "file merge": file_merge_sentence,
}


def main(arguments: list[str]) -> int:
    """Rewrite or check the README."""
    text = README.read_text()
    wanted = filled(text, SECTIONS)
    if arguments == ["--check"]:
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
