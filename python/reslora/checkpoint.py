"""Saving, loading and exporting adapters.

Example::

    save_pretrained(model, "adapter")  # adapter_config.json, adapter_model.safetensors, README.md
    model = load(base_model, "adapter")  # injects by the saved config
    export_lora(model, "lora")  # a plain LoRA in PEFT's format, shortcuts merged away

Files are read and written by the C++ library. Loading is strict: every key and shape must fit.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .config import ResLoraConfig
from .injection import Injection, inject
from .layer import is_conv1d
from .merging import unload
from .planning import make_plan
from .targets import matches_names
from .utils import find_layers, injection_of, write_text

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# Options that change what an adapter computes, beside the ranks and scalings of its chains.
FORMULA_OPTIONS = ("res_mode", "pre_num", "first_block")

PathLike = str | os.PathLike[str]


def save_pretrained(model: nn.Module, directory: PathLike) -> None:
    """Write the unmerged adapter, and `modules_to_save`, to a folder.

    Keys are `<module>.reslora_A.weight` [r, in] and `<module>.reslora_B.weight` [out, r]. The kind
    of the adapter is RESLORA, so that nothing loads it as plain LoRA by mistake.
    """
    injection = injection_of(model, "save_pretrained")
    base = _base_name(model, None)
    text = injection.config.to_json(base_model_name_or_path=base)
    chains = [(chain.key, chain.links.layers) for chain in injection.chains]
    tensors = {key: tensor.detach() for key, tensor in _own_tensors(model, injection).items()}
    folder = _make_folder(directory)
    _C.save_adapter(folder / WEIGHTS_NAME, text, chains, tensors)
    write_text(folder / CONFIG_NAME, text)
    write_text(folder / "README.md", _card(injection, base))


def load(model: nn.Module, directory: PathLike) -> nn.Module:
    """Load an adapter into a model and return it; a plain model is injected first.

    Raises:
        FileNotFoundError: without an adapter in the folder.
        ValueError: for a file that is damaged or belongs to another model. The model is then
            unchanged.
    """
    adapter, config = _read_adapter(Path(directory))
    if find_layers(model):
        _copy_adapter(model, injection_of(model, "load"), adapter, config)
    else:
        inject(model, config)
        try:
            _copy_adapter(model, injection_of(model, "load"), adapter, config)
        except BaseException:
            unload(model)
            raise
    zero = [not t.any() for key, t in adapter.tensors.items() if key.endswith(".reslora_B.weight")]
    if all(zero):
        warnings.warn(
            f"[load] every B of {os.fspath(directory)} is zero: the adapter changes nothing",
            stacklevel=2,
        )
    return model


def export_lora(
    model: nn.Module,
    directory: PathLike,
    merge_method: str | None = None,
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write the adapter as a plain LoRA in PEFT's format; the model is unchanged.

    The shortcuts are merged away by the same rules as in `merge`; scaling and alpha* are folded
    into the factors, all padded with zeros to one rank R with lora_alpha = r = R, so that every
    reader of LoRA files applies the factor 1.

    Args:
        model: an adapted model, merged or not.
        directory: the folder to write.
        merge_method: as in `merge`; of a merged model it is the method it was merged by.
        base_model_name_or_path: for adapter_config.json; by default the model's own.
        task_type: for adapter_config.json, such as "CAUSAL_LM".
    """
    injection = injection_of(model, "export_lora")
    plan = _export_plan(injection, merge_method)
    rank = max(int(layer.A.shape[0]) for layer in plan.layers)
    tensors: dict[str, Tensor] = {}
    for layer in plan.layers:
        A, B = _C.padded_factors(layer, rank)
        tensors[f"base_model.model.{layer.name}.lora_A.weight"] = A
        tensors[f"base_model.model.{layer.name}.lora_B.weight"] = B
    for key, tensor in _saved_tensors(model, injection).items():
        tensors[f"base_model.model.{key}"] = tensor.detach()
    base = _base_name(model, base_model_name_or_path)
    config = _lora_config(model, injection, rank) | {
        "base_model_name_or_path": base,
        "task_type": task_type,
    }
    folder = _make_folder(directory)
    _C.save_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(folder / "README.md", _lora_card(injection, plan, base))


# ---- Reading ----------------------------------------------------------------------------------


def _read_adapter(folder: Path) -> tuple[_C.AdapterFile, ResLoraConfig]:
    path = folder / WEIGHTS_NAME
    config_path = folder / CONFIG_NAME
    for needed in (config_path, path):
        if not needed.is_file():
            raise FileNotFoundError(
                f"[load] an adapter's folder must hold {needed.name}; got {folder}"
            )
    beside = ResLoraConfig.load(config_path)
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
        raise ValueError(
            f"[load] keys must fit the model; got {len(missing)} missing {missing[:3]} and "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    for key, tensor in own.items():
        if tensor.shape != stored[key].shape:
            raise ValueError(
                f"[load] shapes must fit the model; got {list(stored[key].shape)} for {key}, which "
                f"is {list(tensor.shape)}"
            )
        if tensor.is_meta:
            raise ValueError(f"[load] the model must hold memory; got {key} on the meta device")


# ---- Writing ----------------------------------------------------------------------------------


def _saved_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    """Return what modules_to_save hold, under their own names."""
    found: dict[str, Tensor] = {}
    for name in injection.saved_modules:
        state = model.get_submodule(name).state_dict(keep_vars=True)
        found |= {f"{name}.{key}": value for key, value in state.items()}
    return found


def _own_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in injection.layers:
        tensors[f"{layer.name}.reslora_A.weight"] = layer.reslora_A
        tensors[f"{layer.name}.reslora_B.weight"] = layer.reslora_B
    return tensors | _saved_tensors(model, injection)


def _make_folder(directory: PathLike) -> Path:
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"[save] the place to write must be a folder; got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _base_name(model: nn.Module, given: str | None) -> str | None:
    if given is not None:
        return given
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or None


def _export_plan(injection: Injection, merge_method: str | None) -> _C.MergePlan:
    applied = injection.applied
    if applied is None:
        return make_plan(injection, merge_method, "export_lora", use_affine=False)
    if applied.plan is None or merge_method not in (None, applied.merge_method):
        raise ValueError(
            f"[export_lora] a merged model is exported as it was merged, by "
            f"{applied.merge_method or 'default'!r}; got {merge_method!r} (unmerge it first)"
        )
    return applied.plan


def _short_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Return the names' last parts where they mean exactly these modules, else the full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {key for key, _ in model.named_modules() if matches_names(short, key)}
    return short if meant == set(names) else sorted(names)


def _lora_config(model: nn.Module, injection: Injection, rank: int) -> dict[str, Any]:
    names = [layer.name for layer in injection.layers]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": _short_targets(model, names),
        "modules_to_save": injection.saved_modules or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(is_conv1d(layer.base_layer) for layer in injection.layers),
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _card(injection: Injection, base: str | None) -> str:
    config = injection.config
    head = f"---\nlibrary_name: reslora\n{_base_line(base)}tags: [reslora, lora]\n---\n"
    return (
        f"{head}\n# ResLoRA adapter\n\nShortcut `{config.res_mode}`, pre_num {config.pre_num}, "
        f"r {config.r}, {len(injection.layers)} layers. Not a plain LoRA: load it with\n\n"
        "```python\nimport reslora\n\nmodel = reslora.load(base_model, folder)\n```\n"
    )


def _lora_card(injection: Injection, plan: _C.MergePlan, base: str | None) -> str:
    rules = ", ".join(sorted({layer.rule for layer in plan.layers}))
    head = f"---\nlibrary_name: peft\n{_base_line(base)}tags: [lora, reslora]\n---\n"
    return (
        f"{head}\n# LoRA adapter\n\nExported by reslora from a ResLoRA adapter (shortcut "
        f"`{injection.config.res_mode}`, merged by {rules}). Scaling is folded into the factors.\n"
    )


def _base_line(base: str | None) -> str:
    return f"base_model: {base}\n" if base else ""
