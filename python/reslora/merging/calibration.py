"""Fitting a plain LoRA to each linked layer on calibration batches, for the merge rule `lsq`.

Example::

    print(calibrate(model, loader, progressbar=True))
    merge(model)  # by lsq, since fits are at hand

Sums and solver are the C++ library's (include/reslora/regression.h).
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._C import (
    Fit,
    FitCollector,
    FitOptions,
    FitSums,
    few_rows_warning,
    has_moved_taps,
    measured_batches,
    solve_fit,
)
from ..injection.adapted import (
    Calibrated,
    Injection,
    check_enabled,
    earlier_fits_after_errors,
    evaluated_sum,
    injection_of,
)
from ..nn.layer import ResLoraLinear
from ..progress import progress
from .batches import as_batches, call, evaluating, masks_of, moved
from .planning import views_with
from .tap_moves import move_taps as choose_moves
from .tap_moves import moved_fits

DEFAULTS = FitOptions()
RIDGE = DEFAULTS.ridge


@dataclass
class Calibration:
    """What a calibration found and what it took. `str` of it is a few lines."""

    residuals: dict[str, float] = field(default_factory=dict)  # |v - A'x| / |v| by layer
    rows: int = 0  # the least that a layer saw
    passes: int = 0
    peak_bytes: int = 0
    row_file_bytes: int = 0
    solver_steps: int = 0
    seconds: float = 0.0
    moved: list[str] = field(default_factory=list)  # chains whose taps were moved
    distance_before: float = 0.0  # to the model (KL of logits) without and with moved taps
    distance: float = 0.0

    def __str__(self) -> str:
        """Return sentences for people."""
        if not self.residuals:
            return "nothing to fit: every layer merges exactly"
        worst = max(self.residuals, key=lambda name: self.residuals[name])
        lines = [
            f"fitted {len(self.residuals)} layers on {self.rows:,} rows each or more, "
            f"{self.passes} pass{'es' if self.passes > 1 else ''} over the batches, "
            f"{self.seconds:.1f} s, {self.peak_bytes / 1e6:,.1f} MB of sums at once",
            f"residual |v - A'x| / |v|: median {statistics.median(self.residuals.values()):.3f}, "
            f"largest {self.residuals[worst]:.3f} ({worst})",
        ]
        if self.moved:
            found = f": distance {self.distance_before:.2e} -> {self.distance:.2e}"
            lines.append(
                f"taps moved to the layers that they read in {len(self.moved)} chains "
                f"({', '.join(self.moved)}){found if self.distance_before else ''}"
            )
        if self.row_file_bytes:
            lines.append(
                f"layers above max_cov_bytes: {self.row_file_bytes / 1e6:,.1f} MB of rows in "
                f"temporary files, read {self.solver_steps} times by the iterative solver"
            )
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    data: Any = None,
    *,
    ridge: float = RIDGE,
    affine: bool = False,
    max_cov_bytes: int = DEFAULTS.max_cov_bytes,
    keep_covariances: bool = False,
    move_taps: bool = True,
    progressbar: bool = False,
) -> Calibration:
    """Fit each linked layer's A' on batches; `merge` and `export_lora` then use the rule `lsq`.

    A' = argmin sum |v - A'x|^2 + lambda |A' - A|^2 over all rows x of the layer but padding, where
    v is what entered B. Fits serve the adapter as it is now: train on and they are refused.

    Args:
        model: an adapted model; it is run in eval mode and without gradients.
        data: batches. None: solve again from kept covariances; []: forget all fits.
        ridge: lambda over the mean of |x|^2: how strongly few rows are held to the paper's form.
        affine: also fit an offset where the base has a bias, for merging into both (not exports).
        max_cov_bytes: limit of the sums held at once, 8 in^2 bytes for each distinct x. Above it
            layers are fitted in groups over repeated passes, a larger one from rows in a file.
        keep_covariances: keep the sums, to save them and to solve again with another ridge.
        move_taps: let the layers whose inputs taps read compute half of what these bring, in
            chains where that is nearer to the model on the first two batches (o_proj and down_proj,
            which add to one stream). Such fits have twice the rank.
        progressbar: show a bar for each pass.

    Raises:
        ValueError: for padding without a mask, a layer that no batch reaches, values that are not
            finite, data that cannot be read twice where it must be. Earlier fits stay then.

    Cost: forwards (move_taps: ten more, and two a chain), T in (in + 2r) an x, in^3/3 a layer.
    """
    injection = _ready(model, max_cov_bytes)
    start = time.monotonic()
    if isinstance(data, list | tuple) and not data:
        injection.calibrated = None
        return Calibration()
    if data is None:
        result = solve_again(injection, ridge, affine, moved_chains(injection))
    else:
        batches = _Noted(as_batches(data, "calibrate"))
        options = FitOptions(ridge, affine, max_cov_bytes, keep_covariances)
        with earlier_fits_after_errors(injection):
            result = _collect(model, injection, batches, options, progressbar)
            _move_taps(model, injection, batches.first if move_taps else [], result)
    result.seconds = time.monotonic() - start
    return _warn_few_rows(injection, result)


def _move_taps(
    model: nn.Module, injection: Injection, batches: list[Any], result: Calibration
) -> None:
    if result.residuals and batches:
        with evaluating(model):
            moves = choose_moves(model, injection, batches)
        result.moved, result.distance_before, result.distance = moves


def _ready(model: nn.Module, max_cov_bytes: int) -> Injection:
    if not isinstance(max_cov_bytes, int):
        raise ValueError(
            f"[calibrate] max_cov_bytes must be a whole number of bytes; got {max_cov_bytes!r}"
        )
    injection = injection_of(model, "calibrate")
    if injection.applied is not None:
        raise ValueError("[calibrate] the model must not be merged; got a merged one (unmerge it)")
    check_enabled(injection, "calibrate")
    return injection


class _Noted:
    """Batches that can be run over as often as their source; the first ones are kept."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source = source
        self.first: list[Any] = []

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def check_again(self, why: str, is_empty: bool = False) -> None:
        """Raise ValueError for a source that is gone once it was read."""
        if is_empty or isinstance(self.source, Iterator):
            raise ValueError(
                f"[calibrate] {why}; got data that can be read once: pass a list or a DataLoader"
            )

    def __iter__(self) -> Iterator[Any]:
        keeps = not self.first
        for batch in self.source:
            if keeps and len(self.first) < measured_batches():
                self.first.append(batch)
            yield batch


def _places(injection: Injection) -> Iterator[tuple[int, int, ResLoraLinear]]:
    for c, chain in enumerate(injection.chains):
        links = chain.evaluated()
        for n, layer in enumerate(chain.layers):
            if not links.merges_exactly(n):
                yield c, n, layer


class _LinksChangedError(Exception):
    """A forward has shown that calls of layers cannot be paired, so links are left out now."""


def _left_out(injection: Injection) -> list[Any]:
    return [chain.left_out for chain in injection.chains]


def _collect(
    model: nn.Module,
    injection: Injection,
    batches: _Noted,
    options: FitOptions,
    progressbar: bool,
) -> Calibration:
    while True:
        collector = FitCollector(views_with(injection, None), options)
        places = list(_places(injection))
        try:
            if places:
                _run_passes(model, injection, collector, batches, progressbar)
            break
        except _LinksChangedError:  # what was summed is of other links
            batches.check_again(
                "calibrating starts anew, since layers turned out to be called unequally often"
            )
    fits: dict[str, Fit] = {}
    sums: dict[str, FitSums] = {}
    for c, n, layer in places:
        fit, kept = collector.fit(c, n), collector.sums(c, n)
        assert fit is not None  # finish_pass refuses layers without rows
        fits[layer.name] = fit
        if kept is not None:
            sums[layer.name] = kept
    injection.calibrated = Calibrated(fits, evaluated_sum(injection), sums)
    if warning := collector.padding_warning():
        warnings.warn(warning, stacklevel=3)
    result = _result_of(fits)
    cost = collector.cost
    result.passes, result.peak_bytes = cost.passes, cost.peak_bytes
    result.row_file_bytes, result.solver_steps = cost.row_file_bytes, cost.solver_steps
    return result


def _result_of(fits: dict[str, Fit]) -> Calibration:
    rows = min((fit.rows for fit in fits.values()), default=0)
    residuals = {
        name: fit.residual if fit.offset is None else fit.affine_residual
        for name, fit in fits.items()
    }
    return Calibration(residuals, rows)


def _run_passes(
    model: nn.Module,
    injection: Injection,
    collector: FitCollector,
    batches: _Noted,
    progressbar: bool,
) -> None:
    known = _left_out(injection)
    with _observing(injection, collector), evaluating(model), torch.no_grad():
        count = 0
        while True:
            before, count = count, 0
            for batch in progress(batches, "calibrating", progressbar):
                batch = moved(batch, model)
                collector.begin_batch(masks_of(model, batch, "calibrate"))
                call(model, batch)
                collector.end_batch()
                count += 1
                if _left_out(injection) != known:
                    raise _LinksChangedError
            if count == 0 and before > 0:
                batches.check_again(
                    "more than one pass over the batches is needed (for max_cov_bytes, or since a "
                    "module stands at several places)",
                    is_empty=True,
                )
            if count == 0:
                raise ValueError("[calibrate] data must hold a batch; got none")
            if not collector.finish_pass():
                return


@contextmanager
def _observing(injection: Injection, collector: FitCollector) -> Iterator[None]:
    """Let the collector see the calls of every layer that needs a fit."""

    def observer(c: int, n: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        return lambda x, v, y: collector.add(c, n, x, v)

    try:
        for c, n, layer in _places(injection):
            layer.observer = observer(c, n)
        yield
    finally:
        for layer in injection.layers:
            layer.observer = None


def moved_chains(injection: Injection) -> list[str]:
    """Return the keys of the chains whose fits have their taps moved."""
    views = views_with(injection, injection.calibrated)
    pairs = zip(injection.chains, views, strict=True)
    return [chain.key for chain, view in pairs if has_moved_taps(view)]


def solve_again(injection: Injection, ridge: float, affine: bool, moved: list[str]) -> Calibration:
    """Solve fits again from kept covariances; move the taps of the chains that are named."""
    calibrated = injection.calibrated
    if calibrated is None or not calibrated.sums:
        raise ValueError(
            "[calibrate] solving again needs kept covariances; got none: pass batches, with "
            "keep_covariances=True to keep them"
        )
    if calibrated.adapter_sum != evaluated_sum(injection):
        raise ValueError(
            "[calibrate] covariances must be of the adapter as it is; got some made before it "
            "changed: pass batches"
        )
    # What was refined or has moved taps is left out: it belongs to the fits that are replaced.
    fits = {name: fit for name, fit in calibrated.fits.items() if fit.B is None}
    lacking = {x.name for _, _, x in _places(injection)} - set(fits) - set(calibrated.sums)
    if lacking:
        raise ValueError(
            f"[calibrate] solving again needs the covariance of every layer; got none of "
            f"{min(lacking)}: pass batches"
        )
    for chain, view in zip(injection.chains, views_with(injection, None), strict=True):
        for n, layer in enumerate(chain.layers):
            if layer.name not in calibrated.sums:
                continue
            has_bias = getattr(layer.base_layer, "bias", None) is not None
            options = FitOptions(ridge, affine and has_bias)
            sums, A = calibrated.sums[layer.name], layer.reslora_A.detach()
            fits[layer.name] = solve_fit(sums, A, options, layer.name, view, n)
    injection.calibrated = Calibrated(fits, calibrated.adapter_sum, calibrated.sums)
    result = _result_of(fits)
    _move_again(injection, moved, result)
    return result


def _move_again(injection: Injection, moved: list[str], result: Calibration) -> None:
    calibrated = injection.calibrated
    assert calibrated is not None
    plain = calibrated.fits
    for chain, view in zip(injection.chains, views_with(injection, calibrated), strict=True):
        if chain.key in moved:
            calibrated.fits = calibrated.fits | moved_fits(chain, view)
            calibrated.plain = plain
            result.moved.append(chain.key)


def _warn_few_rows(injection: Injection, result: Calibration) -> Calibration:
    if warning := few_rows_warning(views_with(injection, injection.calibrated)):
        warnings.warn(warning, stacklevel=3)
    return result
