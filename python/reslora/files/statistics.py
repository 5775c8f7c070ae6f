"""Norm windows and fits beside an adapter, for a later merge."""

from __future__ import annotations

from pathlib import Path

from .._C import (
    STATISTICS_NAME,
    WEIGHTS_NAME,
    Fit,
    FitSums,
    LayerStatistics,
    Stage,
    check_current,
    load_statistics,
    save_statistics,
    sum_in_header,
)
from ..injection.adapted import Calibrated, Injection, adapter_sum, evaluated_sum
from ..nn.layer import ResLoraLinear

Statistics = dict[str, LayerStatistics]  # by layer
UNKNOWN = LayerStatistics()


def write_statistics(injection: Injection, folder: Path) -> None:
    """Write the norm windows beside an adapter that was saved as it is."""
    layers: Statistics = {
        layer.name: LayerStatistics(layer.norms, layer.norm_count, products=layer.products)
        for layer in injection.layers
        if layer.norms is not None and bool(layer.norm_count)
    }
    if not layers:
        return
    weights = folder / WEIGHTS_NAME  # a trainer may have written the whole model instead
    of_weights = sum_in_header(weights) if weights.is_file() else ""
    with Stage(folder) as stage:
        place = stage.path(STATISTICS_NAME)
        save_statistics(place, adapter_sum(injection), layers, of_weights)


def give_windows(layer: ResLoraLinear, own: LayerStatistics) -> None:
    """Give a layer the norms and sums of a file; a training that goes on adds to them in turn."""
    device = layer.reslora_A.device
    layer.norms = None if own.norms is None else own.norms.to(device)
    layer.norm_count = None if own.count is None else own.count.to(device)
    layer.products = None if own.products is None else own.products.to(device)
    layer.forwards = 0 if own.count is None else int(own.count)


def read_norms(injection: Injection, folder: Path) -> None:
    """Take up the norm windows beside an adapter that was loaded; without any, go on without."""
    path = folder / STATISTICS_NAME
    if not path.is_file():
        return
    stored = load_statistics(path, adapter_sum(injection))
    for layer in injection.layers:
        own = stored.get(layer.name, UNKNOWN)
        norms, count = own.norms, own.count
        if norms is not None and count is not None and layer.chain.keeps_norms:
            give_windows(layer, own)


def statistics_of(injection: Injection, covariances: bool) -> Statistics:
    """Return what a later merge needs; `covariances`: also what fits were solved from."""
    calibrated = injection.calibrated
    if calibrated is not None:
        way_out = "save without statistics"
        stored = evaluated_sum(injection, with_strengths=False)
        check_current(calibrated.adapter_sum, stored, "save", way_out)
    if covariances and (calibrated is None or not calibrated.sums):
        raise ValueError(
            "[save] statistics='covariances' needs kept covariances; got none: "
            "calibrate(model, data, keep_covariances=True)"
        )
    fits = {} if calibrated is None else calibrated.fits
    sums = calibrated.sums if calibrated is not None and covariances else {}
    found = {}
    for layer in injection.layers:
        has_norms = layer.norms is not None and bool(layer.norm_count)
        norms, count, products = layer.norms, layer.norm_count, layer.products
        if not has_norms:
            norms = count = products = None
        fit, own_sums = fits.get(layer.name), sums.get(layer.name)
        if not (norms is None and fit is None and own_sums is None):
            found[layer.name] = LayerStatistics(norms, count, fit, own_sums, products)
    return found


def give_statistics(injection: Injection, statistics: Statistics) -> None:
    """Give norm windows and fits of a file to an adapter that was just loaded."""
    injection.calibrated = None
    fits: dict[str, Fit] = {}
    sums: dict[str, FitSums] = {}
    for layer in injection.layers:
        own = statistics.get(layer.name, UNKNOWN)
        give_windows(layer, own)
        if own.fit is not None:
            fits[layer.name] = own.fit
        if own.sums is not None:
            sums[layer.name] = own.sums
    if fits:
        stored = evaluated_sum(injection, with_strengths=False)
        injection.calibrated = Calibrated(fits, stored, sums)
