"""Saving and loading adapters, with what a later merge needs.

Example::

    save_pretrained(model, "adapter")  # adapter_config.json, adapter_model.safetensors, README.md
    save_pretrained(model, "adapter", statistics=True)  # also adapter_statistics.safetensors
    model = load(base_model, "adapter")  # injects by the saved config

Files are read and written by the C++ library. Loading is strict: every key and shape must fit.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .config import ResLoraConfig
from .hub import local_folder
from .injection import Injection, inject, saved_module, saved_names
from .layer import is_conv1d
from .merging import unload
from .planning import Calibrated, adapter_sum, factors_of, is_factor
from .sharding import is_sharded, whole, writes
from .targets import matches_names
from .utils import find_layers, injection_of, plain_model, staged, write_text

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MODEL_PREFIX = "base_model.model."  # where PEFT has the model
STATISTICS_NAME = "adapter_statistics.safetensors"
ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME, STATISTICS_NAME)
# Options that change what an adapter computes, beside the ranks and scalings of its chains.
FORMULA_OPTIONS = ("res_mode", "pre_num", "first_block")

PathLike = str | os.PathLike[str]
# By layer: norms [2, N], their count [1], fit, and what it was solved from.
Statistics = dict[str, "tuple[Tensor | None, Tensor | None, _C.Fit | None, _C.FitSums | None]"]


def save_pretrained(
    model: nn.Module, directory: PathLike, *, statistics: bool | str = False
) -> None:
    """Write the unmerged adapter, and `modules_to_save`, to a folder.

    Keys are `<module>.reslora_A.weight` [r, in] and `<module>.reslora_B.weight` [out, r]. The kind
    of the adapter is RESLORA, so that nothing loads it as plain LoRA by mistake.

    Args:
        model: an adapted model.
        directory: the folder to write.
        statistics: True: also write norm windows and fits, so that a merge can be done later
            without data; "covariances": and what the fits were solved from, where it was kept
            (`calibrate(keep_covariances=True)`). False removes statistics that lie in the folder,
            since they would be of another adapter.

    Of a sharded model (FSDP2) every rank calls this, and the first writes.
    """
    model = plain_model(model)
    injection = injection_of(model, "save_pretrained")
    if statistics not in (False, True, "covariances"):
        raise ValueError(
            f"[save] statistics must be True, False or 'covariances'; got {statistics!r}"
        )
    base = base_name(model, None)
    text = _saved_config(model, injection).to_json(
        base_model_name_or_path=base, fan_in_fan_out=transposed_chains(injection)
    )
    layers = _statistics_of(injection, statistics == "covariances") if statistics else {}
    own = {key: tensor.detach() for key, tensor in _own_tensors(model, injection).items()}
    tensors = {key: whole(tensor) for key, tensor in own.items()}
    if not writes(own):
        return
    folder = make_folder(directory)
    with staged(folder) as stage:
        _C.save_adapter(stage / WEIGHTS_NAME, text, injection.chain_records, tensors)
        if layers:
            _C.save_statistics(stage / STATISTICS_NAME, _sum_of_factors(tensors), layers)
        write_text(stage / CONFIG_NAME, text)
        write_text(stage / "README.md", _card(injection, base))
    if not layers:
        (folder / STATISTICS_NAME).unlink(missing_ok=True)


def _saved_config(model: nn.Module, injection: Injection) -> ResLoraConfig:
    """Return the config, with those of modules_to_save that are there: PEFT lists guesses."""
    config = copy.copy(injection.config)
    heads = saved_names(model, injection)
    names = [n for n in config.modules_to_save or () if any(matches_names([n], h) for h in heads)]
    config.modules_to_save = names or None
    return config


def transposed_chains(injection: Injection) -> list[str]:
    """Return the chains whose base files hold W^T, for merges on files."""
    return [c.key for c in injection.chains if any(is_conv1d(x.base_layer) for x in c.layers)]


def write_statistics(injection: Injection, folder: Path) -> None:
    """Write the norm windows beside an adapter that was saved as it is."""
    layers: Statistics = {
        layer.name: (layer.norms, layer.norm_count, None, None)
        for layer in injection.layers
        if layer.norms is not None and bool(layer.norm_count)
    }
    if layers:
        _C.save_statistics(folder / STATISTICS_NAME, adapter_sum(injection), layers)


def read_norms(injection: Injection, folder: Path) -> None:
    """Take up the norm windows beside an adapter that was loaded; without any, go on without."""
    path = folder / STATISTICS_NAME
    if not path.is_file():
        return
    stored = _C.load_statistics(path, adapter_sum(injection))
    for layer in injection.layers:
        norms, count = stored.get(layer.name, (None, None, None, None))[:2]
        if norms is not None and count is not None and layer.chain.keeps_norms:
            device = layer.reslora_A.device
            layer.norms, layer.norm_count = norms.to(device), count.to(device)


def _statistics_of(injection: Injection, covariances: bool) -> dict[str, Any]:
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


def load(
    model: nn.Module,
    directory: PathLike,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> nn.Module:
    """Load an adapter into a model and return it; a plain model is injected first.

    Args:
        model: a plain model, or one with an adapter of the same form.
        directory: folder that `save_pretrained` wrote, or its name on the Hub ("user/name").
        revision: branch, tag or commit of a name of the Hub; None: its default branch.
        subfolder: where the adapter lies below `directory`.

    Raises:
        FileNotFoundError: without an adapter in the folder, and for a name that cannot be had.
        ValueError: for a file that is damaged or belongs to another model. The model is then
            unchanged.
    """
    folder = adapter_folder(directory, "load", revision, subfolder)
    adapter, config = read_adapter(folder)
    statistics = read_statistics(folder, adapter)
    if find_layers(model):
        _copy_adapter(plain_model(model), injection_of(model, "load"), adapter, config)
    else:
        inject(model, config)
        try:
            _copy_adapter(model, injection_of(model, "load"), adapter, config)
        except BaseException:
            unload(model)
            raise
    _give_statistics(injection_of(model, "load"), statistics)
    return model


def _give_statistics(injection: Injection, statistics: Statistics) -> None:
    """Give norm windows and fits of a file to an adapter that was just loaded."""
    injection.calibrated = None
    fits: dict[str, _C.Fit] = {}
    sums: dict[str, _C.FitSums] = {}
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


# ---- Reading ----------------------------------------------------------------------------------


def adapter_folder(
    name: PathLike, op: str, revision: str | None, subfolder: str | None, *others: str
) -> Path:
    """Return an adapter's folder as `local_folder` does; `others` are files to fetch beside."""
    files = [*ADAPTER_FILES, *others]
    return local_folder(
        name, op, "the adapter", revision=revision, subfolder=subfolder, files=files
    )


def read_config(folder: Path) -> ResLoraConfig:
    """Read the config of an adapter's folder, which must hold both of its files."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"[load] an adapter's folder must hold {name}; got {folder}")
    return ResLoraConfig.load(folder / CONFIG_NAME)


def read_adapter(folder: Path) -> tuple[_C.AdapterFile, ResLoraConfig]:
    """Read an adapter's folder; its two files must agree."""
    beside, path = read_config(folder), folder / WEIGHTS_NAME
    adapter = _C.load_adapter(path)
    config = ResLoraConfig.from_json(adapter.config_json, os.fspath(path))
    other = beside.to_dict()
    for name, value in config.to_dict().items():
        if other[name] != value:
            raise ValueError(
                f"[load] {CONFIG_NAME} and {WEIGHTS_NAME} must agree on {name}; got "
                f"{other[name]!r} and {value!r} in {folder}"
            )
    return adapter, config


def _sum_of_factors(tensors: dict[str, Tensor]) -> str:
    """Return what `adapter_sum` does, of an adapter's tensors with those of its heads."""
    return _C.tensors_sum({key: tensor for key, tensor in tensors.items() if is_factor(key)})


def read_statistics(folder: Path, adapter: _C.AdapterFile) -> Statistics:
    """Read the statistics beside an adapter's file, by layer; empty where there are none."""
    path = folder / STATISTICS_NAME
    if not path.is_file():
        return {}
    statistics = _C.load_statistics(path, _sum_of_factors(adapter.tensors))
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


def load_tensors_of(path: PathLike) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file that PEFT wrote, under the names of the model."""
    tensors, _ = _C.load_tensors(path)
    return {key.removeprefix(MODEL_PREFIX): tensor for key, tensor in tensors.items()}


def _copy_adapter(
    model: nn.Module, injection: Injection, adapter: _C.AdapterFile, config: ResLoraConfig
) -> None:
    """Check everything, then copy the values."""
    if injection.applied is not None:
        raise ValueError("[load] the model must not be merged; got a merged one (unmerge it first)")
    for name in FORMULA_OPTIONS:
        own, stored = getattr(injection.config, name), getattr(config, name)
        if own != stored:
            raise ValueError(
                f"[load] model and file must agree on {name}; got {own!r} and {stored!r}"
            )
    _check_chains(injection, adapter)
    own_tensors = _own_tensors(model, injection)
    _check_keys(own_tensors, adapter.tensors)
    with torch.no_grad():
        for key, tensor in own_tensors.items():
            tensor.copy_(adapter.tensors[key])


def _check_chains(injection: Injection, adapter: _C.AdapterFile) -> None:
    stored = dict(adapter.chains)
    own = {chain.key: chain.links.layers for chain in injection.chains}
    for key in [*own, *stored]:
        layers, others = own.get(key, []), stored.get(key, [])
        if list(map(tuple, layers)) == list(map(tuple, others)):
            continue
        first = next(
            (n for n, pair in enumerate(zip(layers, others, strict=False)) if pair[0] != pair[1]),
            min(len(layers), len(others)),
        )
        raise ValueError(
            f"[load] the adapter must be of this model; got chain {key} with {len(layers)} layers "
            f"in the model and {len(others)} in the file, first difference at {first}: "
            f"{_layer_text(layers, first)} and {_layer_text(others, first)}"
        )


def _layer_text(layers: list[tuple[str, int, int, int, float]], n: int) -> str:
    if n >= len(layers):
        return "nothing"
    name, inputs, outputs, r, scaling = layers[n]
    return f"{name} ({inputs} -> {outputs}, r {r}, scaling {scaling:g})"


def _check_keys(own: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(set(own) - set(stored)), sorted(set(stored) - set(own))
    if missing or unexpected:
        way_out = "" if missing else " (PeftModel.from_pretrained reads what PEFT has added)"
        raise ValueError(
            f"[load] keys must fit the model; got {len(missing)} missing {missing[:3]} and "
            f"{len(unexpected)} unexpected {unexpected[:3]}{way_out}"
        )
    for key, tensor in own.items():
        if tensor.shape != stored[key].shape:
            raise ValueError(
                f"[load] shapes must fit the model; got {list(stored[key].shape)} for {key}, which "
                f"is {list(tensor.shape)}"
            )
        if is_sharded(tensor):
            raise ValueError(
                f"[load] the model must not be sharded; got {key} in parts: load the adapter, "
                "then shard the model"
            )
        if tensor.is_meta:
            raise ValueError(f"[load] the model must hold memory; got {key} on the meta device")


# ---- Writing ----------------------------------------------------------------------------------


def saved_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    """Return what modules_to_save hold, under their own names."""
    found: dict[str, Tensor] = {}
    for name in saved_names(model, injection):
        state = saved_module(model, name).state_dict(keep_vars=True)
        found |= {f"{name}.{key}": value for key, value in state.items()}
    return found


def _own_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    return factors_of(injection) | saved_tensors(model, injection)


def make_folder(directory: PathLike) -> Path:
    """Return a folder, made where there was none."""
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"[save] the place to write must be a folder; got the file {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except NotADirectoryError:
        raise ValueError(
            f"[save] the place to write must be a folder; got {folder}, below a file"
        ) from None
    return folder


def base_name(model: nn.Module, given: str | None) -> str | None:
    """Return the name of a model's base as it is known to transformers, unless one is given."""
    if given is not None:
        return given
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or None


def _card(injection: Injection, base: str | None) -> str:
    config = injection.config
    head = f"---\nlibrary_name: reslora\n{base_line(base)}tags: [reslora, lora]\n---\n"
    return (
        f"{head}\n# ResLoRA adapter\n\nShortcut `{config.res_mode}`, pre_num {config.pre_num}, "
        f"r {config.r}, {len(injection.layers)} layers. Not a plain LoRA: load it with\n\n"
        "```python\nimport reslora\n\nmodel = reslora.load(base_model, folder)\n```\n"
    )


def base_line(base: str | None) -> str:
    """Return the line of a model card that names the base."""
    return f"base_model: {base}\n" if base else ""
