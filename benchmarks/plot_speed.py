"""Plots of what was measured about speed, from results/: overhead bars and growth curves.

python benchmarks/plot_speed.py     # writes results/overhead.svg and results/growth.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("none", "is", "bs 3", "ms 1", "ms all")


def cells() -> list[dict[str, Any]]:
    """Return the cells of the grid in float32."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / "grid").glob("*.json"))]
    return [cell for cell in found if cell.get("dtype", "float32") == "float32"]


def bars(axes: Axes, cell: dict[str, Any]) -> None:
    """Draw time over the frozen chain, less one, for each method with and without dropout."""
    case, results = cell["case"], cell["results"]
    names = ["peft", *METHODS]
    for k, p in enumerate(("0", "0.05")):
        rows = [results[f"{name} p={p}"]["ratio"] for name in names]
        heights = [100 * (row["median"] - 1) for row in rows]
        errors = [
            [max(0.0, 100 * (row["median"] - row["p5"])) for row in rows],
            [max(0.0, 100 * (row["p95"] - row["median"])) for row in rows],
        ]
        places = [i + 0.4 * k for i in range(len(names))]
        axes.bar(places, heights, 0.38, yerr=errors, label=f"dropout {p}", error_kw={"lw": 0.8})
    axes.set_xticks([i + 0.2 for i in range(len(names))], ["PEFT LoRA", *METHODS], rotation=30)
    axes.set_title(
        f"T={case['tokens']}, {case['in_features']} to {case['out_features']}, r={case['rank']}"
    )
    axes.set_ylabel("% over the frozen layers")
    axes.legend()


def overhead() -> None:
    """Draw bars for three cells: few, some and many tokens."""
    wanted = [(16, 768, 768), (128, 768, 768), (2048, 768, 768)]
    found = []
    for cell in cells():
        case = cell["case"]
        if (case["tokens"], case["in_features"], case["out_features"]) in wanted:
            if case["rank"] == 16:
                found.append(cell)
    if not found:
        return
    found.sort(key=lambda cell: cell["case"]["tokens"])
    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    for axes, cell in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        bars(axes, cell)
    figure.savefig(RESULTS / "overhead.svg", metadata={"Date": None})


def growth() -> None:
    """Draw time against T, cost against m of `bs`, time and merge time against the length."""
    path = RESULTS / "growth.json"
    if not path.exists():
        return
    results = json.loads(path.read_text())["results"]
    figure = Figure(figsize=(20, 4), layout="constrained")
    by_tokens, by_reach, by_length, merging = figure.subplots(1, 4)
    curve = results["tokens"]["curve"]
    for name, slope in results["tokens"]["slopes"].items():
        times = [curve[T][name]["milliseconds"]["median"] for T in curve]
        by_tokens.loglog([int(T) for T in curve], times, marker="o", label=f"{name}: {slope:.2f}")
    by_tokens.minorticks_off()
    by_tokens.set_xticks([int(T) for T in curve], list(curve))
    by_tokens.set(xlabel="tokens", ylabel="ms", title="time against T, and its slope")
    reach = {int(k.split()[1]): v["ratio"] for k, v in results["reach"].items() if k != "frozen"}
    values = [reach[m]["median"] for m in reach]
    low = [reach[m]["median"] - reach[m]["p5"] for m in reach]
    high = [reach[m]["p95"] - reach[m]["median"] for m in reach]
    by_reach.errorbar(list(reach), values, yerr=[low, high], marker="o")
    by_reach.set(xlabel="m", ylabel="time over frozen", title="bs against m")
    lengths = results["length"]
    for name in ("frozen", "none", "is", "bs 3", "ms all"):
        times = [lengths[n]["steps"][name]["milliseconds"]["median"] / int(n) for n in lengths]
        by_length.plot([int(n) for n in lengths], times, marker="o", label=name)
    by_length.set(xlabel="layers", ylabel="ms a layer", title="time of a layer against length")
    by_length.set_ylim(bottom=0)
    for name in ("none", "is", "bs 3", "ms all"):
        times = [1000 * lengths[n][name]["merge"] for n in lengths]
        merging.loglog([int(n) for n in lengths], times, marker="o", label=name)
    merging.minorticks_off()
    merging.set_xticks([int(n) for n in lengths], list(lengths))
    merging.set(xlabel="layers", ylabel="ms", title="time to merge a chain against its length")
    for axes in (by_tokens, by_length, merging):
        axes.legend()
    figure.savefig(RESULTS / "growth.svg", metadata={"Date": None})


if __name__ == "__main__":
    overhead()
    growth()
