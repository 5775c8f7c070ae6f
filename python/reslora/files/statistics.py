"""Norm windows and fits beside an adapter, for a later merge."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .._C import AdapterFile, Fit, FitSums, load_statistics, save_statistics, tensors_sum
from ..injection.adapted import Calibrated, Injection, adapter_sum
from ..nn.factors import is_factor
from .folders import STATISTICS_NAME

# By layer: norms [2, N], their count [1], fit, and what it was solved from.
Statistics = dict[str, "tuple[Tensor | None, Tensor | None, Fit | None, FitSums | None]"]


def write_statistics(injection: Injection, folder: Path) -> None:
    """Write the norm windows beside an adapter that was saved as it is."""
    layers: Statistics = {
        layer.name: (layer.norms, layer.norm_count, None, None)
        for layer in injection.layers
        if layer.norms is not None and bool(layer.norm_count)
    }
    if layers:
        save_statistics(folder / STATISTICS_NAME, adapter_sum(injection), layers)


def read_norms(injection: Injection, folder: Path) -> None:
    """Take up the norm windows beside an adapter that was loaded; without any, go on without."""
    path = folder / STATISTICS_NAME
    if not path.is_file():
        return
    stored = load_statistics(path, adapter_sum(injection))
    for layer in injection.layers:
        norms, count = stored.get(layer.name, (None, None, None, None))[:2]
        if norms is not None and count is not None and layer.chain.keeps_norms:
            device = layer.reslora_A.device
            layer.norms, layer.norm_count = norms.to(device), count.to(device)


def statistics_of(injection: Injection, covariances: bool) -> Statistics:
    """Return what a later merge needs; `covariances`: also what fits were solved from."""
    calibrated = injection.calibrated
    if calibrated is not None and calibrated.adapter_sum != adapter_sum(injection):
        raise ValueError(
            "[save] statistics must be of the adapter as it is; got fits made before it changed: "
            "calibrate again, or save without statistics"
        )
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
        norms = (layer.norms, layer.norm_count) if has_norms else (None, None)
        own = (*norms, fits.get(layer.name), sums.get(layer.name))
        if any(part is not None for part in own):
            found[layer.name] = own
    return found


def give_statistics(injection: Injection, statistics: Statistics) -> None:
    """Give norm windows and fits of a file to an adapter that was just loaded."""
    injection.calibrated = None
    fits: dict[str, Fit] = {}
    sums: dict[str, FitSums] = {}
    for layer in injection.layers:
        norms, count, fit, own_sums = statistics.get(layer.name, (None, None, None, None))
        device = layer.reslora_A.device
        layer.norms = None if norms is None else norms.to(device)
        layer.norm_count = None if count is None else count.to(device)
        if fit is not None:
            fits[layer.name] = fit
        if own_sums is not None:
            sums[layer.name] = own_sums
    if fits:
        injection.calibrated = Calibrated(fits, adapter_sum(injection), sums)


def sum_of_factors(tensors: dict[str, Tensor]) -> str:
    """Return what `adapter_sum` does, of an adapter's tensors with those of its heads."""
    return tensors_sum({key: tensor for key, tensor in tensors.items() if is_factor(key)})


def read_statistics(folder: Path, adapter: AdapterFile) -> Statistics:
    """Read the statistics beside an adapter's file, by layer; empty where there are none."""
    path = folder / STATISTICS_NAME
    if not path.is_file():
        return {}
    statistics = load_statistics(path, sum_of_factors(adapter.tensors))
    shapes = {name: [r, i] for _, layers in adapter.chains for name, i, _, r, _ in layers}
    for name, (_, _, fit, _) in statistics.items():
        if name not in shapes:
            raise ValueError(f"[load] statistics must be of layers of the adapter; got {name}")
        if fit is None:
            continue
        r, inputs = shapes[name]
        wanted = [r if fit.B is None else len(fit.A), inputs]  # with a B of its own: any rank
        if list(fit.A.shape) != wanted:
            raise ValueError(
                f"[load] a fit must have the shape of A, {wanted}; got {list(fit.A.shape)} "
                f"for {name}"
            )
    return statistics
