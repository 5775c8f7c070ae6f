"""The study's picture: differences to tuned LoRA above, losses by rate below.

    points = points_of(settings, grid)     # what is drawn
    draw(points).savefig("picture.svg", metadata=metadata_of(points))

The file holds a digest of what is drawn, so that `is_of` can say without matplotlib whether it is
up to date.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison import Measured, Setting
from rates import rate_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = dict[str, Any]
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "reslora", "font.family": "sans-serif"}


def points_of(settings: Sequence[Setting], grid: dict[str, Any]) -> list[Points]:
    """Return for each task and rank that has been begun its intervals and its losses by rate."""
    return [
        {
            "name": setting.name,
            "metric": setting.metric,
            "signal": setting.signal,
            "intervals": {
                one.method.cell.method: [one.interval.mean, one.interval.low, one.interval.high]
                for one in setting.comparisons
                if one.interval
            },
            "incomplete": [m.cell.method for m in setting.methods if not m.is_complete],
            "tuning": {
                method.cell.method: _by_rate(method, grid["lattice_base"])
                for method in (setting.reference, *setting.methods)
                if method.scores
            },
        }
        for setting in settings
        if setting.is_begun
    ]


def _by_rate(method: Measured, base: float) -> list[tuple[float, float]]:
    """Return the tuning's losses by rate without the runs that diverged."""
    scores = sorted(method.scores.items())
    return [(rate_at(n, base), score) for n, score in scores if math.isfinite(score)]


def metadata_of(points: list[Points]) -> dict[str, Any]:
    """Return what the file says of itself: the digest of what is drawn, and no date."""
    digest = hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()
    return {"Date": None, "Description": f"digest {digest}"}


def is_of(path: Path, points: list[Points]) -> bool:
    """Say whether a file shows these points."""
    return path.exists() and metadata_of(points)["Description"] in path.read_text()


def save(points: list[Points], path: Path) -> None:
    """Write the picture.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ImportError("the picture needs matplotlib: pip install matplotlib") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        draw(points).savefig(path, metadata=metadata_of(points))


def draw(points: list[Points]) -> Figure:
    """Return the picture: a column for each task and rank."""
    from matplotlib.figure import Figure

    columns = max(1, len(points))
    figure = Figure(figsize=(1 + 4.5 * columns, 7), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for column, one in enumerate(points):
        _differences(grid[0][column], one)
        _tuning(grid[1][column], one)
    return figure


def _differences(axes: Axes, one: Points) -> None:
    """Draw the mean difference and its interval of each method; hollow where seeds are missing."""
    unit = "test loss" if one["metric"] == "loss" else "test error, %"
    axes.set_title(f"{one['name']} ({one['signal']})")
    axes.axvline(0, color="grey", linewidth=1)
    names = list(one["intervals"])[::-1]
    for row, name in enumerate(names):
        mean, low, high = one["intervals"][name]
        axes.plot([low, high], [row, row], color="C0")
        face = "white" if name in one["incomplete"] else "C0"
        axes.plot([mean], [row], marker="o", color="C0", markerfacecolor=face)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"{unit} minus that of tuned LoRA (95 %)")
    if not names:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no method compared yet", ha="center", transform=axes.transAxes)


def _tuning(axes: Axes, one: Points) -> None:
    """Draw the validation loss against the rate for each method."""
    rates: set[float] = set()
    for name, pairs in one["tuning"].items():
        own = [rate for rate, _ in pairs]
        axes.plot(own, [loss for _, loss in pairs], marker=".", label=name)
        rates.update(own)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(sorted(rates), [f"{rate:.2g}" for rate in sorted(rates)], rotation=60)
    axes.set(xlabel="rate", ylabel="validation loss, one seed")
    if rates:
        axes.legend(fontsize="small")
