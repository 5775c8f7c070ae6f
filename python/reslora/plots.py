"""Pictures of merges. Every function returns a matplotlib Figure (pip install reslora[plot]).

Example::

    report = merge_report(model, batches)
    plots.merge_errors(report).savefig("errors.png")
    plots.errors_by_rule({"input": first, "lsq": second}).savefig("rules.png")
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .reporting import MergeReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {
    "method_error": "error of the rule",
    "rounding_error": "error of rounding",
    "output_error": "error of both",
}


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def merge_errors(report: MergeReport, kind: str = "output_error") -> Figure:
    """Return a heat map of the layers' relative errors, layer index by target.

    Args:
        report: of `merge_report`, or of `merge` with `verify`.
        kind: "method_error", "rounding_error" or "output_error" (both together).

    Raises:
        ValueError: for a report without measurements, or another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"[plots] kind must be one of {', '.join(KINDS)}; got {kind!r}")
    errors = {e.name: getattr(e, kind) for e in report.layers if getattr(e, kind) is not None}
    if not errors:
        raise ValueError(
            f"[plots] the report must hold measurements; got none of {kind} (use merge_report)"
        )
    places = {name: _place(name) for name in errors}
    columns = list(dict.fromkeys(target for _, target in places.values()))
    rows = sorted({index for index, _ in places.values()})
    grid = [[math.nan] * len(columns) for _ in rows]
    for name, (index, target) in places.items():
        grid[rows.index(index)][columns.index(target)] = errors[name]
    figure, axes = _figure(2 + 0.9 * len(columns), 1.5 + 0.3 * len(rows))
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [str(row) for row in rows])
    axes.set_ylabel("layer")
    axes.set_title(f"{report.rule}: {KINDS[kind]}, |difference| / |y|")
    figure.colorbar(image, ax=axes)
    return figure


def _place(name: str) -> tuple[int, str]:
    """Return the layer index of a module path and what is left of the path."""
    match = re.search(r"(?:^|\.)(\d+)\.(.*)$", name)
    return (int(match[1]), match[2]) if match else (0, name)


def errors_by_rule(reports: Mapping[str, MergeReport]) -> Figure:
    """Return the layers' errors under several rules side by side, and each model's as a mark.

    Args:
        reports: measured reports by the name to show, of one model on the same batches.

    Raises:
        ValueError: without a measured report.
    """
    found = {
        name: [e.output_error for e in report.layers if e.output_error is not None]
        for name, report in reports.items()
    }
    if not found or not all(found.values()):
        raise ValueError("[plots] every report must hold measurements (use merge_report)")
    figure, axes = _figure(2 + 1.1 * len(found), 4)
    axes.boxplot(list(found.values()), tick_labels=list(found), showfliers=True)
    models = [report.output_error for report in reports.values()]
    axes.plot(range(1, len(found) + 1), models, "D", label="output of the model")
    axes.set_ylabel("relative error of a layer's output")
    axes.legend()
    return figure
