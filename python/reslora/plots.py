"""Pictures of adapters, trainings and merges, as matplotlib Figures (pip install reslora[plot]).

Example::

    report = merge_report(model, batches)
    plots.merge_errors(report).savefig("errors.png")
    plots.errors_by_rule({"input": first, "lsq": second}).savefig("rules.png")
    plots.singular_values("adapter").savefig("values.png")  # of a model, or of a folder
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._C import LayerMerge, window_in_order
from .injection.adapted import injection_of
from .merging.planning import make_plan
from .merging.report import MergeReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]
Source = nn.Module | PathLike

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
    title = f"{report.rule}: {KINDS[kind]}, |difference| / |y|"
    return _heat_map(errors, title, vmin=0)


def _heat_map(values: Mapping[str, float], title: str, **colours: Any) -> Figure:
    """Draw a number for each layer: layer index by target."""
    places = _places(values)
    columns = list(dict.fromkeys(target for _, target in places.values()))
    rows = sorted({index for index, _ in places.values()})
    grid = [[math.nan] * len(columns) for _ in rows]
    for name, (index, target) in places.items():
        grid[rows.index(index)][columns.index(target)] = values[name]
    figure, axes = _figure(2 + 0.9 * len(columns), 1.5 + 0.3 * len(rows))
    image = axes.imshow(grid, aspect="auto", cmap="viridis", **colours)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [str(row) for row in rows])
    axes.set_ylabel("layer")
    axes.set_title(title)
    figure.colorbar(image, ax=axes)
    return figure


def _places(names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Return (layer index, column) of layers; towers of a model have columns of their own."""
    found = {name: _place(name) for name in names}
    heads = {name: name[: len(name) - len(target)] for name, (_, target) in found.items()}
    heads = {name: re.sub(r"\d+\.$", "*.", head) for name, head in heads.items()}
    if len(set(heads.values())) == 1:
        return found
    return {name: (index, heads[name] + target) for name, (index, target) in found.items()}


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


# ---- Adapters: of a model, or of a folder that save_pretrained wrote ----------------------------


def alphas(
    source: Source,
    merge_method: str = "input",
    *,
    base: PathLike | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    base_revision: str | None = None,
) -> Figure:
    """Return a heat map of alpha* of the nearest predecessor, layer index by target.

    Args:
        source: an adapted model, or an adapter's folder with statistics or its name on the Hub.
        merge_method: a rule that has alpha*: "input", "weight" or "factored".
        base: of a folder: its base model (folder or Hub name), whose weights "weight" needs.
        revision: of an adapter of the Hub, as in `load`.
        subfolder: of a folder or a name, as in `load`.
        base_revision: of a `base` of the Hub; None: what the adapter's config names.

    Raises:
        ValueError: where no layer has an alpha* by this rule.
    """
    place = {"revision": revision, "subfolder": subfolder, "base_revision": base_revision}
    layers = _planned(source, merge_method, base, place)
    found = {layer.name: layer.alpha_star for layer in layers}
    values = {name: own[0] for name, own in found.items() if len(own)}
    if not values:
        raise ValueError(f"[plots] a layer must have alpha*; got none by {merge_method!r}")
    return _heat_map(values, f"alpha* by the rule {merge_method}")


def singular_values(
    source: Source,
    merge_method: str | None = None,
    *,
    base: PathLike | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    base_revision: str | None = None,
) -> Figure:
    """Return the singular values of W* - W of every layer, largest first, one line each.

    Args:
        source: an adapted model, or an adapter's folder or name.
        merge_method: as in `merge`.
        base: as in `alphas`.
        revision: as in `alphas`.
        subfolder: as in `alphas`.
        base_revision: as in `alphas`.

    Cost: an SVD of an R x R matrix for each layer.
    """
    lines = {}
    place = {"revision": revision, "subfolder": subfolder, "base_revision": base_revision}
    for layer in _planned(source, merge_method, base, place):
        lines[layer.name] = layer.singular_values().tolist()
    return _lines(lines, xlabel="rank", ylabel="singular value of W* - W", yscale="log")


def norm_windows(
    source: Source,
    which: str = "input",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Figure:
    """Return the norms of the last training forwards, one line for each layer.

    Args:
        source: an adapted model, or an adapter's folder with statistics or its name on the Hub.
        which: "input": |x|; "product": |A x|.
        revision: as in `alphas`.
        subfolder: as in `alphas`.

    Raises:
        ValueError: where no norms are at hand.
    """
    if which not in ("input", "product"):
        raise ValueError(f"[plots] which must be 'input' or 'product'; got {which!r}")
    found = {
        name: window
        for name, window in _windows(source, revision, subfolder).items()
        if window.shape[1]
    }
    if not found:
        raise ValueError("[plots] norms of training forwards must be at hand; got none")
    row = 0 if which == "input" else 1
    lines = {name: window[row].tolist() for name, window in found.items()}
    xlabel = "training forward (the last is right)"
    return _lines(lines, xlabel=xlabel, ylabel=f"norm of the {which}")


def _lines(lines: Mapping[str, list[float]], **labels: str) -> Figure:
    """Draw a line for each layer, in a colour for each target."""
    figure, axes = _figure(7, 4.5)
    colours: dict[str, str] = {}
    for name, values in lines.items():
        target = _place(name)[1]
        label = None if target in colours else target
        colour = colours.setdefault(target, f"C{len(colours)}")
        axes.plot(values, color=colour, lw=0.8, label=label)
    axes.set(**labels)
    axes.legend(fontsize="small")
    return figure


def loss_curves(runs: Mapping[str, Sequence[Any]], key: str = "loss") -> Figure:
    """Return the losses of several runs over their steps.

    Args:
        runs: by the name to show: numbers, or entries with `step` and `key` as in the
            `log_history` of a trainer's state.
        key: what to show of such entries, for example "eval_loss".

    Raises:
        ValueError: for a run without values.
    """
    if not runs:
        raise ValueError("[plots] runs must hold one at least; got none")
    figure, axes = _figure(7, 4.5)
    for name, run in runs.items():
        if run and isinstance(run[0], Mapping):
            points = [(entry["step"], entry[key]) for entry in run if key in entry]
        else:
            points = list(enumerate(run))
        if not points:
            raise ValueError(f"[plots] a run must hold {key!r}; got none in {name!r}")
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="." if len(points) < 40 else None, label=name)
    axes.set(xlabel="step", ylabel=key)
    axes.legend()
    return figure


def _planned(
    source: Source,
    merge_method: str | None,
    base: PathLike | None,
    place: dict[str, str | None],
) -> list[LayerMerge]:
    if isinstance(source, nn.Module):
        given = {key: value for key, value in {"base": base, **place}.items() if value is not None}
        if given:
            raise ValueError(f"[plots] {min(given)} is for an adapter's folder; got a model")
        return make_plan(injection_of(source, "plots"), merge_method, "plots").layers
    from .files.model_folder import plan_from_files

    return plan_from_files(source, merge_method, base, **place)[2].layers


def _windows(source: Source, revision: str | None, subfolder: str | None) -> dict[str, Tensor]:
    """Return norms [2, N] of every layer in the order of the forwards."""
    if isinstance(source, nn.Module):
        layers = injection_of(source, "plots").layers
        found = {layer.name: (layer.norms, layer.norm_count) for layer in layers}
    else:
        from .files.checkpoint import read_whole
        from .files.folders import adapter_folder

        folder = adapter_folder(source, "plots", revision, subfolder)
        stored = read_whole(folder)[2]
        found = {name: (own.norms, own.count) for name, own in stored.items()}
    windows = {}
    for name, (norms, count) in found.items():
        if norms is not None and count is not None:
            windows[name] = window_in_order(norms, count)
    return windows
